"""layer_norm: LayerNorm of M rows, once, or a second one of what the first gives.

What stands at the end of an encoder, where no product follows that could take the norm on its way
in: post-norm layers end in a norm, and the norm behind the last layer is one more.
"""

from __future__ import annotations

import torch

from xspec_kernels._dispatch import check_tensor, register
from xspec_kernels._triton import INTERPRETED, jit, launch, tl
from xspec_kernels.kernels._layer_norm import (
    LayerNorm,
    check_layer_norm,
    layer_norm_ref,
    pack_norm,
    unpack_norm,
)
from xspec_kernels.kernels._product import narrow
from xspec_kernels.kernels.norm_act import require_aligned
from xspec_kernels.tiles import DTYPES, card_of, early_launch

_MAX_WIDTH = 16384


def _ref(
    x: torch.Tensor, norm: list[torch.Tensor], eps: float, then: list[torch.Tensor], then_eps: float
) -> torch.Tensor:
    """The definition."""
    return layer_norm_ref(
        layer_norm_ref(x, pack_norm(norm, eps, None)), pack_norm(then, then_eps, None)
    )


@jit()
def _normed(
    row, weight, bias, eps, column, inside, D: tl.constexpr, dtype: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    mean = tl.sum(row, 0) / D
    off = tl.where(inside, row - mean, 0.0)
    off *= tl.rsqrt(tl.sum(off * off, 0) / D + eps)
    factor = tl.load(weight + column, mask=inside, other=0).to(tl.float32)
    row = off * factor + tl.load(bias + column, mask=inside, other=0).to(tl.float32)
    return narrow(row, dtype, INTERPRETED)


@jit()
def _layer_norm_kernel(
    x,  # [M, D]
    weight,  # [D]
    bias,  # [D]
    then_weight,  # [D], of the second norm, or None
    then_bias,  # [D] or None
    y,  # [M, D]
    eps,
    then_eps,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    if EARLY:
        tl.extra.cuda.gdc_wait()
    start = tl.program_id(0).to(tl.int64) * D
    column = tl.arange(0, BLOCK)
    inside = column < D
    dtype: tl.constexpr = y.dtype.element_ty
    row = tl.load(x + start + column, mask=inside, other=0).to(tl.float32)
    row = _normed(row, weight, bias, eps, column, inside, D, dtype, INTERPRETED)
    if then_weight is not None:
        row = _normed(
            row.to(tl.float32), then_weight, then_bias, then_eps, column, inside, D, dtype,
            INTERPRETED,
        )  # fmt: skip
    tl.store(y + start + column, row, mask=inside)


def _triton(
    x: torch.Tensor, norm: list[torch.Tensor], eps: float, then: list[torch.Tensor], then_eps: float
) -> torch.Tensor:
    given = dict(zip(("weight", "bias", "then_weight", "then_bias"), [*norm, *then], strict=False))
    require_aligned("layer_norm", x=x, **given)
    y = torch.empty_like(x)
    rows, width = x.shape
    block = 1 << (width - 1).bit_length()
    early = early_launch(card_of(x.device))
    launch(
        _layer_norm_kernel, (rows,), x.device, x, *norm, *(then or (None, None)), y, eps, then_eps,
        D=width, BLOCK=block, EARLY=early, INTERPRETED=INTERPRETED,
        num_warps=min(8, max(1, block // 256)), **({"launch_pdl": True} if early else {}),
    )  # fmt: skip
    return y


def _check(
    x: torch.Tensor, norm: list[torch.Tensor], eps: float, then: list[torch.Tensor], then_eps: float
) -> torch.device:
    op, device = "layer_norm", x.device
    if x.dim() != 2 or not x.shape[0] or not 1 <= x.shape[1] <= _MAX_WIDTH:
        raise ValueError(
            f"{op}: x has shape {list(x.shape)}, expected [M, D] with M >= 1, D 1..{_MAX_WIDTH}"
        )
    check_tensor(op, "x", x, x.shape, DTYPES, device)
    check_layer_norm(op, "norm", x, norm, eps, None)
    check_layer_norm(op, "then", x, then, then_eps, None)
    return device


def _fake(x: torch.Tensor, *others: object) -> torch.Tensor:
    return torch.empty_like(x)


_OP = register(
    "layer_norm",
    "(Tensor x, Tensor[] norm, float eps, Tensor[] then, float then_eps, str backend) -> Tensor",
    check=_check,
    fake=_fake,
    torch=_ref,
    triton=_triton,
)


def layer_norm(
    x: torch.Tensor, norm: LayerNorm, *, then: LayerNorm | None = None, backend: str = "auto"
) -> torch.Tensor:
    """`norm` of x, and `then` of that, in one launch.

    Args:
        x: [M, D] float32, float16 or bfloat16, D <= 16384.
        norm, then: weight and bias [D], dtype of x; their `moments` are not read.
        backend: see `xspec_kernels`.

    Returns:
        [M, D], dtype of x, rounded behind each norm.

    Raises:
        ValueError: a shape, dtype or device is wrong, a tensor is not contiguous or, for Triton,
            not aligned to 16 bytes.
    """
    return _OP(x, *unpack_norm(norm)[:2], *unpack_norm(then)[:2], backend)
