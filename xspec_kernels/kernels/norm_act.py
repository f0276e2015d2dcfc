"""norm_act: RMSNorm of M rows, with the residual added first where there is one.

The arithmetic of transformers' LlamaRMSNorm: mean of squares and scaling in float32, rounded to the
model's dtype, then times the weight. The sum with the residual is rounded to the model's dtype
before it is normalized, as it is when two modules compute the two steps.

One program a row and no argument that names M, so a row's bits do not depend on the other rows. The
order of a sum in a program follows the width of its loads, hence the 16-byte alignment asked for.
"""

from __future__ import annotations

from typing import overload

import torch

from xspec_kernels._dispatch import check_tensor, register
from xspec_kernels._triton import jit, launch, tl

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_MAX_WIDTH = 16384


def rms_norm_ref(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """transformers' LlamaRMSNorm over the last dimension."""
    wide = x.float()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * (wide * scale).to(x.dtype)


def norm_act_ref(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None
) -> list[torch.Tensor]:
    """The definition: [normalized], or [normalized, sum]."""
    if residual is None:
        return [rms_norm_ref(x, weight, eps)]
    total = residual + x
    return [rms_norm_ref(total, weight, eps), total]


@jit()
def rms_scale(sum_of_squares, eps, D: tl.constexpr):
    """1 / sqrt(mean + eps), float32."""
    return tl.rsqrt(sum_of_squares / D + eps)


@jit()
def _norm_act_kernel(
    x,  # [M, D]
    weight,  # [D]
    residual,  # [M, D] or None
    y,  # [M, D]
    total,  # [M, D] or None
    eps,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    dtype = y.dtype.element_ty
    start = tl.program_id(0).to(tl.int64) * D
    column = tl.arange(0, BLOCK)
    inside = column < D
    scale = tl.load(weight + column, mask=inside, other=0).to(tl.float32)
    row = tl.load(x + start + column, mask=inside, other=0).to(tl.float32)
    if residual is not None:
        row += tl.load(residual + start + column, mask=inside, other=0).to(tl.float32)
        summed = row.to(dtype)
        tl.store(total + start + column, summed, mask=inside)
        row = summed.to(tl.float32)
    normed = row * rms_scale(tl.sum(row * row, 0), eps, D)
    normed = normed.to(dtype).to(tl.float32)
    tl.store(y + start + column, (scale * normed).to(dtype), mask=inside)


def require_aligned(op: str, **tensors: torch.Tensor | None) -> None:
    """Raise ValueError unless every tensor starts at a multiple of 16 bytes."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.data_ptr() % 16:
            raise ValueError(
                f"{op}: {name} starts at {tensor.data_ptr() % 16} bytes past a multiple of 16; "
                "the kernel needs that alignment, so that every call runs the same code"
            )


def _empty(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None
) -> list[torch.Tensor]:
    return [torch.empty_like(x) for _ in range(1 if residual is None else 2)]


def _triton(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None
) -> list[torch.Tensor]:
    require_aligned("norm_act", x=x, weight=weight, residual=residual)
    out = _empty(x, weight, eps, residual)
    rows, width = x.shape
    block = 1 << (width - 1).bit_length()
    launch(
        _norm_act_kernel, (rows,), x.device, x, weight, residual, out[0],
        None if residual is None else out[1], eps, D=width, BLOCK=block,
        num_warps=min(8, max(1, block // 256)), enable_fp_fusion=False,
    )  # fmt: skip
    return out


def _check(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None
) -> torch.device:
    op, device = "norm_act", x.device
    if x.dim() != 2 or not x.shape[0] or not 1 <= x.shape[1] <= _MAX_WIDTH:
        raise ValueError(
            f"{op}: x has shape {list(x.shape)}, expected [M, D] with M >= 1, D 1..{_MAX_WIDTH}"
        )
    check_tensor(op, "x", x, x.shape, FLOATS, device)
    check_tensor(op, "weight", weight, x.shape[1:], (x.dtype,), device)
    if residual is not None:
        check_tensor(op, "residual", residual, x.shape, (x.dtype,), device)
    check_eps(op, eps)
    return device


def check_eps(op: str, eps: float) -> None:
    """Raise ValueError unless `eps` is a number >= 0."""
    if not eps >= 0:
        raise ValueError(f"{op}: eps is {eps}, expected a number >= 0")


_OP = register(
    "norm_act",
    "(Tensor x, Tensor weight, float eps, Tensor? residual, str backend) -> Tensor[]",
    check=_check,
    fake=_empty,
    torch=norm_act_ref,
    triton=_triton,
)


@overload
def norm_act(
    x: torch.Tensor, weight: torch.Tensor, eps: float, *, residual: None = None, backend: str = ...
) -> torch.Tensor: ...


@overload
def norm_act(
    x: torch.Tensor, weight: torch.Tensor, eps: float, *, residual: torch.Tensor, backend: str = ...
) -> tuple[torch.Tensor, torch.Tensor]: ...


def norm_act(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    residual: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """RMSNorm of x, or of x + residual.

    Args:
        x: [M, D] float32, float16 or bfloat16, D <= 16384.
        weight: [D], dtype of x.
        eps: added to the mean of squares.
        residual: [M, D], dtype of x.
        backend: see `xspec_kernels`.

    Returns:
        [M, D] normalized; with a residual the pair (normalized, x + residual).

    Raises:
        ValueError: a shape, dtype or device is wrong, a tensor is not contiguous or, for Triton,
            not aligned to 16 bytes.
    """
    out = _OP(x, weight, eps, residual, backend)
    return out[0] if residual is None else (out[0], out[1])
