"""skinny_linear: y = x W^T for few rows, with bias, residual or SiLU-gate, equal bits at every M.

A row of y is a function of that row of x and of W alone (see `_product`). The epilogue works in
float32 on the complete sum, in this order: bias, SiLU-gate, residual, one rounding. For the gate,
rows of W alternate (gate 0, up 0, gate 1, up 1, ...; `interleave_gate`), so that both factors of
an output lie in one thread.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from xspec_kernels._dispatch import choose, exact, register
from xspec_kernels._triton import jit, launch, tl
from xspec_kernels.kernels._epilogue import check_epilogue, finish
from xspec_kernels.kernels._product import (
    check_alignment,
    check_product,
    count_rows,
    leave_partial,
    linear_rows,
    product_arguments,
    product_scratch,
    sum_partials,
    tile_product,
)
from xspec_kernels.kernels._row_norm import (
    RowNorm,
    check_norm,
    check_squares_out,
    new_squares,
    norm_arguments,
    normed_ref,
    row_scale,
    unpack,
)
from xspec_kernels.tiles import BLOCK_M, card_of, tile_of
from xspec_kernels.workspace import Workspace


def interleave_gate(w_gate: torch.Tensor, w_up: torch.Tensor) -> torch.Tensor:
    """[N/2, K] twice -> [N, K] with rows gate 0, up 0, gate 1, ...; biases [N/2] likewise.

    Raises:
        ValueError: the two differ in shape, dtype or device.
    """
    if w_gate.shape != w_up.shape:
        raise ValueError(
            f"interleave_gate: shapes {list(w_gate.shape)} and {list(w_up.shape)} differ"
        )
    if w_gate.dtype != w_up.dtype or w_gate.device != w_up.device:
        raise ValueError(
            f"interleave_gate: {w_gate.dtype} on {w_gate.device} and {w_up.dtype} on "
            f"{w_up.device} differ"
        )
    return torch.stack([w_gate, w_up], 1).flatten(0, 1).contiguous()


def _silu(gate: torch.Tensor) -> torch.Tensor:
    # Vector lanes and the scalar remainder of a loop round differently; rows of one length agree.
    return torch.stack([F.silu(row) for row in gate.contiguous()]) if exact() else F.silu(gate)


def skinny_linear_ref(
    x: torch.Tensor,
    w: torch.Tensor,
    num_rows: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    gate: bool,
    norm: torch.Tensor | None,
    eps: float,
    squares: torch.Tensor | None,
    squares_out: torch.Tensor | None,
    scratch: list[torch.Tensor],
) -> torch.Tensor:
    """The definition, but for the rounding of the product to x's dtype; computes every row."""
    product = linear_rows(normed_ref(x, norm, eps), w, bias)
    if gate:
        pairs = product.float().unflatten(1, (-1, 2))
        product = _silu(pairs[:, :, 0]) * pairs[:, :, 1]
    if residual is not None:
        product = product.float() + residual.float()
    return product.to(x.dtype)


@jit(
    do_not_specialize=["M", "bounded"],
    do_not_specialize_on_alignment=["num_rows", "bias", "squares", "squares_out"],
)
def _skinny_linear_kernel(
    x,  # [M, K]
    w,  # [N, K] pointer, or its descriptor of [BN, BK] blocks
    weights,  # [N, K] pointer, or None: no early launch
    y,  # [M, N], [M, N/2] for the gate
    bias,  # [N] or None
    residual,  # [M, N] or None
    norm,  # [K], weight of the RMSNorm of x, or None
    squares,  # [PARTS, M] fp32 of x's rows, or None
    squares_out,  # [TILES, M] fp32 of y's rows, or None
    eps,
    partial,  # [row blocks * BM, SPLIT_K, TILES * BN] fp32, or None for SPLIT_K == 1
    semaphore,  # [row blocks * TILES] int32 zeros
    num_rows,  # [1] int32, read if `bounded`
    M,
    bounded,
    N: tl.constexpr,
    K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SPLIT_K: tl.constexpr,
    GATE: tl.constexpr,
    PARTS: tl.constexpr,
    TMA: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    tile = tl.program_id(0)
    split = tl.program_id(1)
    block = tl.program_id(2)
    TILES: tl.constexpr = (N + BN - 1) // BN
    rows = count_rows(weights, num_rows, M, bounded, tile, split, N, K, BN, BK, SPLIT_K)
    if block * BM >= rows:
        return
    scale = None
    if norm is not None:
        scale = row_scale(squares, eps, M, rows, block, K, BM, PARTS)
    total = tile_product(
        x, w, norm, scale, rows, tile, split, block, N, K, BM, BN, BK, SPLIT_K, TMA, INTERPRETED
    )
    if weights is not None:
        tl.extra.cuda.gdc_launch_dependents()
    if SPLIT_K > 1:
        if not leave_partial(
            total, partial, semaphore, rows, tile, split, block, TILES, BM, BN, SPLIT_K
        ):
            return
        total = sum_partials(partial, semaphore, rows, tile, block, TILES, BM, BN, SPLIT_K)
    finish(
        total, y, bias, residual, squares_out, M, rows, tile, block, N, BM, BN, GATE, INTERPRETED
    )


def _triton(
    x: torch.Tensor,
    w: torch.Tensor,
    num_rows: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    gate: bool,
    norm: torch.Tensor | None,
    eps: float,
    squares: torch.Tensor | None,
    squares_out: torch.Tensor | None,
    scratch: list[torch.Tensor],
) -> torch.Tensor:
    op, y = "skinny_linear", _fake(x, w, num_rows, bias, residual, gate)
    tile = tile_of(*w.shape, w.dtype, card_of(x.device))
    check_squares_out(op, squares_out, w.shape[0], tile)
    partial, semaphore = scratch or product_scratch(Workspace(x.device), x, w.shape[0], tile)
    if residual is not None:
        check_alignment(op, "residual", residual)
    weights, rows, constants = product_arguments(op, x, w, num_rows, tile)
    squares, parts = norm_arguments(op, x, norm, squares)
    grid = (-(-w.shape[0] // tile.block_n), tile.split_k, -(-x.shape[0] // BLOCK_M))
    launch(
        _skinny_linear_kernel, grid, x.device, x, *weights, y, bias, residual, norm, squares,
        squares_out, eps, partial if tile.split_k > 1 else None, semaphore,
        semaphore if num_rows is None else num_rows, *rows, GATE=gate, PARTS=parts, **constants,
    )  # fmt: skip
    return y


def _check(
    x: torch.Tensor,
    w: torch.Tensor,
    num_rows: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    gate: bool,
    norm: torch.Tensor | None,
    eps: float,
    squares: torch.Tensor | None,
    squares_out: torch.Tensor | None,
    scratch: list[torch.Tensor],
) -> torch.device:
    device = check_product("skinny_linear", x, w, num_rows)
    check_epilogue("skinny_linear", x, w.shape[0], bias, residual, gate)
    check_norm("skinny_linear", x, norm, eps, squares, squares_out)
    return device


def _fake(
    x: torch.Tensor,
    w: torch.Tensor,
    num_rows: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    gate: bool,
    *others,
) -> torch.Tensor:
    return x.new_empty(x.shape[0], w.shape[0] // 2 if gate else w.shape[0])


_OP = register(
    "skinny_linear",
    "(Tensor x, Tensor w, Tensor? num_rows, Tensor? bias, Tensor? residual, bool gate,"
    " Tensor? norm, float eps, Tensor? squares, Tensor(b!)? squares_out, Tensor(a!)[] scratch,"
    " str backend) -> Tensor",
    check=_check,
    fake=_fake,
    torch=skinny_linear_ref,
    triton=_triton,
)


def skinny_linear(
    x: torch.Tensor,
    w: torch.Tensor,
    num_rows: torch.Tensor | None = None,
    *,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    gate: bool = False,
    norm: RowNorm | None = None,
    with_squares: bool = False,
    workspace: Workspace | None = None,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor | None]:
    """y = x W^T, x normalized first where there is a norm, then bias, SiLU-gate or residual.

    Args:
        x: [M, K] float32, float16 or bfloat16, K a multiple of 64.
        w: [N, K], dtype of x, any N; with `gate`, rows as `interleave_gate` lays them out.
        num_rows: [1] int32 on the device, rows of x that count; None means all M. The other rows
            of y are unspecified.
        bias: [N], dtype of x.
        residual: [M, N], dtype of x, added last.
        gate: y[:, j] = silu(product[:, 2j]) * product[:, 2j + 1].
        norm: RMSNorm of x, rounded as `norm_act` rounds it.
        with_squares: give y's rows to the norm of a later product.
        workspace: scratch of this decoder and stream; None allocates for this call.
        backend: see `xspec_kernels`. `torch` rounds the product to x's dtype before the epilogue,
            and keeps a row's bits independent of M where XSPEC_EXACT=1.

    Returns:
        [M, N], dtype of x; [M, N/2] with `gate`. With `with_squares` a pair: that, and `squares` of
        the `RowNorm` that takes it as x; None from `torch`, which has no use for them.

    Raises:
        ValueError: a shape, dtype or device is wrong, or a tensor is not contiguous; the Triton
            kernel also wants x, w, residual and norm.weight to start at a multiple of 16 bytes.
    """
    given = (x, w, num_rows, bias, residual, gate, *unpack(norm))
    squares_out, scratch = None, []
    if (with_squares or workspace is not None) and (
        choose("skinny_linear", backend, x.device.type) == "triton"
    ):
        _check(*given, None, scratch)
        tile = tile_of(*w.shape, w.dtype, card_of(x.device))
        if with_squares:
            squares_out = new_squares(x, w.shape[0], tile)
        if workspace is not None:
            scratch = product_scratch(workspace, x, w.shape[0], tile)
    y = _OP(*given, squares_out, scratch, backend)
    return (y, squares_out) if with_squares else y
