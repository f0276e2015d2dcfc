"""layer_linear: a product between the LayerNorms, GELUs and residuals of an encoder's layer.

    y = scale * act(norm_act(x) W^T + bias) + keep * norm(residual)

One launch, on the product of `skinny_linear`: a row of y is a function of that row of x and of the
residual, and of W. LayerNorms of x and of the residual are taken on the way in, from moments that
the makers of the rows left (`_layer_norm`), so no launch of a layer only normalizes. The rest works
in float32 on the complete sum; one rounding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from xspec_kernels._dispatch import check_tensor, choose, exact, register
from xspec_kernels._triton import launch
from xspec_kernels.kernels._layer_linear_triton import layer_linear_kernel
from xspec_kernels.kernels._layer_norm import (
    LayerNorm,
    check_layer_norm,
    check_moments_out,
    layer_norm_ref,
    new_moments,
    norm_arguments,
    pack_norm,
    unpack_norm,
)
from xspec_kernels.kernels._product import (
    check_alignment,
    check_product,
    linear_rows,
    product_arguments,
    product_scratch,
)
from xspec_kernels.tiles import BLOCK_M, card_of, tile_of
from xspec_kernels.workspace import Workspace


def _gelu(x: torch.Tensor) -> torch.Tensor:
    # Vector lanes and the scalar remainder of a loop round differently; rows of one length agree.
    return torch.stack([F.gelu(row) for row in x.contiguous()]) if exact() else F.gelu(x)


def layer_linear_ref(
    x: torch.Tensor,
    w: torch.Tensor,
    num_rows: torch.Tensor | None,
    bias: torch.Tensor | None,
    norm: list[torch.Tensor],
    eps: float,
    moments: torch.Tensor | None,
    gelu_in: bool,
    gelu_out: bool,
    scale: float,
    residual: torch.Tensor | None,
    keep: float,
    residual_norm: list[torch.Tensor],
    residual_eps: float,
    residual_moments: torch.Tensor | None,
    moments_out: torch.Tensor | None,
    scratch: list[torch.Tensor],
) -> torch.Tensor:
    """The definition, but for the rounding of product and norms to x's dtype; computes every
    row.
    """
    x = layer_norm_ref(x, pack_norm(norm, eps, None))
    y = linear_rows(_gelu(x) if gelu_in else x, w, bias)
    y = _gelu(y) if gelu_out else y
    if scale != 1.0:
        y = scale * y.float()
    if residual is not None:
        kept = layer_norm_ref(residual, pack_norm(residual_norm, residual_eps, None))
        y = y.float() + keep * kept.float()
    return y.to(x.dtype)


def _triton(
    x: torch.Tensor,
    w: torch.Tensor,
    num_rows: torch.Tensor | None,
    bias: torch.Tensor | None,
    norm: list[torch.Tensor],
    eps: float,
    moments: torch.Tensor | None,
    gelu_in: bool,
    gelu_out: bool,
    scale: float,
    residual: torch.Tensor | None,
    keep: float,
    residual_norm: list[torch.Tensor],
    residual_eps: float,
    residual_moments: torch.Tensor | None,
    moments_out: torch.Tensor | None,
    scratch: list[torch.Tensor],
) -> torch.Tensor:
    op, y = "layer_linear", x.new_empty(x.shape[0], w.shape[0])
    tile = tile_of(*w.shape, w.dtype, card_of(x.device))
    check_moments_out(op, moments_out, x.shape[0], w.shape[0], tile, x.device)
    partial, semaphore = scratch or product_scratch(Workspace(x.device), x, w.shape[0], tile)
    if residual is not None:
        check_alignment(op, "residual", residual)
    weights, rows, constants = product_arguments(op, x, w, num_rows, tile)
    ours = norm_arguments(op, "norm", x, pack_norm(norm, eps, moments))
    theirs = pack_norm(residual_norm, residual_eps, residual_moments)
    theirs = norm_arguments(op, "residual_norm", residual, theirs)
    if gelu_in:
        # The error function on the way in takes registers that four warps have not left.
        constants["num_warps"] = max(8, tile.num_warps)
    grid = (-(-w.shape[0] // tile.block_n), tile.split_k, -(-x.shape[0] // BLOCK_M))
    launch(
        layer_linear_kernel, grid, x.device, x, *weights, y, bias, residual, *ours[:3],
        *theirs[:3], moments_out, ours.eps, theirs.eps, scale, keep,
        partial if tile.split_k > 1 else None, semaphore,
        semaphore if num_rows is None else num_rows, *rows, GELU_IN=gelu_in, GELU_OUT=gelu_out,
        PARTS=ours.parts, PART=ours.part, RESIDUAL_PARTS=theirs.parts, RESIDUAL_PART=theirs.part,
        **constants,
    )  # fmt: skip
    return y


def _check(
    x: torch.Tensor,
    w: torch.Tensor,
    num_rows: torch.Tensor | None,
    bias: torch.Tensor | None,
    norm: list[torch.Tensor],
    eps: float,
    moments: torch.Tensor | None,
    gelu_in: bool,
    gelu_out: bool,
    scale: float,
    residual: torch.Tensor | None,
    keep: float,
    residual_norm: list[torch.Tensor],
    residual_eps: float,
    residual_moments: torch.Tensor | None,
    moments_out: torch.Tensor | None,
    scratch: list[torch.Tensor],
) -> torch.device:
    op, device = "layer_linear", check_product("layer_linear", x, w, num_rows)
    shape = (x.shape[0], w.shape[0])
    if bias is not None:
        check_tensor(op, "bias", bias, shape[1:], (x.dtype,), device)
    check_layer_norm(op, "norm", x, norm, eps, moments)
    if gelu_in and not norm:
        raise ValueError(f"{op}: gelu_in stands behind a norm, and there is none")
    if residual is not None:
        check_tensor(op, "residual", residual, shape, (x.dtype,), device)
        check_layer_norm(
            op, "residual_norm", residual, residual_norm, residual_eps, residual_moments
        )
    elif residual_norm:
        raise ValueError(f"{op}: residual_norm without a residual")
    return device


def _fake(x: torch.Tensor, w: torch.Tensor, *others: object) -> torch.Tensor:
    return x.new_empty(x.shape[0], w.shape[0])


_OP = register(
    "layer_linear",
    "(Tensor x, Tensor w, Tensor? num_rows, Tensor? bias, Tensor[] norm, float eps,"
    " Tensor? moments, bool gelu_in, bool gelu_out, float scale, Tensor? residual, float keep,"
    " Tensor[] residual_norm, float residual_eps, Tensor? residual_moments,"
    " Tensor(b!)? moments_out, Tensor(a!)[] scratch, str backend) -> Tensor",
    check=_check,
    fake=_fake,
    torch=layer_linear_ref,
    triton=_triton,
)


def layer_linear(
    x: torch.Tensor,
    w: torch.Tensor,
    num_rows: torch.Tensor | None = None,
    *,
    bias: torch.Tensor | None = None,
    norm: LayerNorm | None = None,
    gelu_in: bool = False,
    gelu_out: bool = False,
    scale: float = 1.0,
    residual: torch.Tensor | None = None,
    keep: float = 1.0,
    residual_norm: LayerNorm | None = None,
    with_moments: bool = False,
    workspace: Workspace | None = None,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor | None]:
    """scale * gelu(gelu(norm(x)) W^T + bias) + keep * residual_norm(residual), each part optional.

    Args:
        x: [M, K] float32, float16 or bfloat16, K a multiple of 64.
        w: [N, K], dtype of x, any N.
        num_rows: [1] int32 on the device, rows of x that count; None means all M. The other rows
            of y are unspecified.
        bias: [N], dtype of x.
        norm: LayerNorm of x.
        gelu_in, gelu_out: GELU by the error function, behind that norm, behind the bias.
        scale: times the product.
        residual: [M, N], dtype of x, added last.
        keep: times the residual.
        residual_norm: LayerNorm of the residual.
        with_moments: give y's rows to the norm of a later product.
        workspace: scratch of this decoder and stream; None allocates for this call.
        backend: see `xspec_kernels`. `torch` rounds the product to x's dtype before the epilogue,
            and keeps a row's bits independent of M where XSPEC_EXACT=1.

    Returns:
        [M, N], dtype of x. With `with_moments` a pair: that, and `moments` of the `LayerNorm` that
        takes it; None from `torch`, which has no use for them.

    Raises:
        ValueError: a shape, dtype or device is wrong, or a tensor is not contiguous; the Triton
            kernel also wants x, w, residual and the norms to start at a multiple of 16 bytes.
    """
    head = (x, w, num_rows, bias, *unpack_norm(norm), gelu_in, gelu_out, scale, residual, keep)
    given = (*head, *unpack_norm(residual_norm))
    moments, scratch = None, []
    if (with_moments or workspace is not None) and (
        choose("layer_linear", backend, x.device.type) == "triton"
    ):
        _check(*given, None, scratch)
        tile = tile_of(*w.shape, w.dtype, card_of(x.device))
        if with_moments:
            moments = new_moments(x, w.shape[0], tile)
        if workspace is not None:
            scratch = product_scratch(workspace, x, w.shape[0], tile)
    y = _OP(*given, moments, scratch, backend)
    return (y, moments) if with_moments else y
