"""nf4_linear: y = x W^T for few rows and W in NF4, with the epilogues of skinny_linear.

The weights that are multiplied are `nf4.dequantize(w, x.dtype)`, bit for bit, and a row of y is a
function of that row of x and of W alone, as in skinny_linear: same row blocks, same splits, same
order of summation (`_product`).
"""

from __future__ import annotations

import torch

from xspec_kernels import nf4
from xspec_kernels._dispatch import check_tensor, choose, register
from xspec_kernels._triton import INTERPRETED, launch
from xspec_kernels.kernels._epilogue import check_epilogue
from xspec_kernels.kernels._nf4_linear_triton import nf4_linear_kernel
from xspec_kernels.kernels._product import check_alignment, product_scratch
from xspec_kernels.kernels._row_norm import (
    RowNorm,
    check_norm,
    check_squares_out,
    new_squares,
    norm_arguments,
    normed_ref,
    unpack,
)
from xspec_kernels.kernels.skinny_linear import skinny_linear_ref
from xspec_kernels.nf4 import BLOCK, GROUP, Nested, NF4Weight
from xspec_kernels.tiles import BLOCK_M, DTYPES, card_of, early_launch, nf4_tile_of
from xspec_kernels.workspace import Workspace


def looks_through(card: int) -> bool:
    """Whether the layout of a product follows the bits that its operands were made from. It does
    not on 10.x and 11.x, whose matrix units take both operands from shared memory.
    """
    return card // 10 not in (10, 11)


def nf4_linear_ref(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    nested: list[torch.Tensor],
    parts: int,
    dense: torch.Tensor | None,
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
    """skinny_linear on the dequantized weights, about a million of them at a time."""
    w = _weight(packed, scales, nested, parts, x.dtype)
    whole = nf4.absmax(w) if dense is None else None
    x = normed_ref(x, norm, eps)
    found = []
    for rows in nf4.pieces(w):
        if dense is None:
            piece = nf4.dequantize_rows(packed[rows], whole[rows], x.dtype)
        else:
            piece = dense[rows]
        own = (
            None if bias is None else bias[rows],
            None if residual is None else residual[:, rows],
        )
        found.append(
            skinny_linear_ref(x, piece, num_rows, *own, gate, None, 0.0, None, None, scratch)
        )
    return torch.cat(found, 1)


def _triton(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    nested: list[torch.Tensor],
    parts: int,
    dense: torch.Tensor | None,
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
    N, K = packed.shape[0], x.shape[1]
    y = x.new_empty(x.shape[0], N // 2 if gate else N)
    op = "nf4_linear"
    for name, tensor in (("x", x), ("w.packed", packed), ("residual", residual)):
        if tensor is not None:
            check_alignment(op, name, tensor)
    card = card_of(x.device)
    tile = nf4_tile_of(N, K, x.dtype, card)
    check_squares_out(op, squares_out, N, tile)
    partial, semaphore = scratch or product_scratch(Workspace(x.device), x, N, tile)
    squares, norm_parts = norm_arguments(op, x, norm, squares)
    scale_code, levels = nested or (None, None)
    words = packed.view(torch.int32)
    early = early_launch(card)
    launch(
        nf4_linear_kernel, (-(-N // tile.block_n), tile.split_k, -(-x.shape[0] // BLOCK_M)),
        x.device, x, words, words if early else None, scales, nf4.codebook(x.device), scale_code,
        levels, y, bias, residual, norm, squares, squares_out, eps,
        partial if tile.split_k > 1 else None, semaphore,
        semaphore if num_rows is None else num_rows, x.shape[0], int(num_rows is not None),
        N=N, K=K, BM=BLOCK_M, BN=tile.block_n, BK=BLOCK, SPLIT_K=tile.split_k,
        GROUPS=levels.shape[1] if nested else 0, PARTS=parts, GROUP_SIZE=GROUP, GATE=gate,
        NORM_PARTS=norm_parts, OPAQUE=looks_through(card), INTERPRETED=INTERPRETED,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
        **({"launch_pdl": True} if early else {}),
    )  # fmt: skip
    return y


def _weight(
    packed: torch.Tensor,
    scales: torch.Tensor,
    nested: list[torch.Tensor],
    parts: int,
    dtype: torch.dtype,
) -> NF4Weight:
    return NF4Weight(packed, scales, dtype, Nested(*nested, parts) if nested else None)


def _check(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    nested: list[torch.Tensor],
    parts: int,
    dense: torch.Tensor | None,
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
    op, device = "nf4_linear", x.device
    if x.dim() != 2 or packed.dim() != 2 or 0 in (*x.shape, *packed.shape):
        raise ValueError(
            f"{op}: x has shape {list(x.shape)} and w.packed {list(packed.shape)}, expected [M, K] "
            "and [N, K/2], none of them 0"
        )
    K, N = x.shape[1], packed.shape[0]
    if 2 * packed.shape[1] != K:
        raise ValueError(f"{op}: x has K {K}, w has shape [{N}, {2 * packed.shape[1]}]")
    if K % BLOCK:
        raise ValueError(f"{op}: K is {K}, expected a multiple of {BLOCK}")
    check_tensor(op, "x", x, x.shape, DTYPES, device)
    check_tensor(op, "w.packed", packed, packed.shape, (torch.uint8,), device)
    kind = torch.uint8 if nested else torch.float32
    check_tensor(op, "w.scales", scales, (N, K // BLOCK), (kind,), device)
    if nested:
        rows = -(-N // parts) if parts in (1, 2) else 0
        groups = parts * -(-rows * (K // BLOCK) // GROUP)
        code, levels = nested
        if not rows or N % parts or levels.dim() != 2 or levels.shape[1] < groups:
            raise ValueError(
                f"{op}: w has levels {list(levels.shape)} and {parts} parts, expected [2, {groups}]"
                " and 1 part, or 2 with N even"
            )
        check_tensor(op, "w.nested.code", code, (256,), (torch.float32,), device)
        check_tensor(op, "w.nested.levels", levels, (2, levels.shape[1]), (torch.float32,), device)
    if dense is not None:
        check_tensor(op, "w.dense", dense, (N, K), (x.dtype,), device)
    if num_rows is not None:
        check_tensor(op, "num_rows", num_rows, (1,), (torch.int32,), device)
    check_epilogue(op, x, N, bias, residual, gate)
    check_norm(op, x, norm, eps, squares, squares_out)
    return device


def _fake(x: torch.Tensor, packed: torch.Tensor, *others) -> torch.Tensor:
    gate = others[7]
    return x.new_empty(x.shape[0], packed.shape[0] // 2 if gate else packed.shape[0])


_OP = register(
    "nf4_linear",
    "(Tensor x, Tensor packed, Tensor scales, Tensor[] nested, int parts, Tensor? dense,"
    " Tensor? num_rows, Tensor? bias, Tensor? residual, bool gate, Tensor? norm, float eps,"
    " Tensor? squares, Tensor(b!)? squares_out, Tensor(a!)[] scratch, str backend) -> Tensor",
    check=_check,
    fake=_fake,
    torch=nf4_linear_ref,
    triton=_triton,
)


def nf4_linear(
    x: torch.Tensor,
    w: NF4Weight,
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
    """y = x W^T with W in NF4, x normalized first where there is a norm, then the epilogue.

    Args:
        x: [M, K] float32, float16 or bfloat16, K a multiple of 64.
        w: [N, K], any N; with `gate`, as `nf4.interleave` lays it out. Its weights are those of
            `nf4.dequantize(w, x.dtype)`.
        num_rows, bias, residual, gate, norm, with_squares, workspace: as of `skinny_linear`.
        backend: see `xspec_kernels`. `torch` dequantizes about a million weights at a time (some
            12 MB), at every call, unless `w.dense` has x's dtype; it keeps a row's bits
            independent of M where XSPEC_EXACT=1.

    Returns:
        As `skinny_linear`.

    Raises:
        ValueError: a shape, dtype or device is wrong, or a tensor is not contiguous; the Triton
            kernel also wants x, w.packed, residual and norm.weight to start at multiples of 16
            bytes.
    """
    chosen = choose("nf4_linear", backend, x.device.type)
    nested, parts = ([w.nested.code, w.nested.levels], w.nested.parts) if w.nested else ([], 1)
    dense = w.dense if chosen == "torch" and w.dense is not None else None
    if dense is not None and dense.dtype != x.dtype:
        dense = None
    given = (
        x, w.packed, w.scales, nested, parts, dense, num_rows, bias, residual, gate, *unpack(norm),
    )  # fmt: skip
    squares_out, scratch = None, []
    if chosen == "triton" and (with_squares or workspace is not None):
        _check(*given, None, scratch)
        tile = nf4_tile_of(*w.shape, x.dtype, card_of(x.device))
        if with_squares:
            squares_out = new_squares(x, w.shape[0], tile)
        if workspace is not None:
            scratch = product_scratch(workspace, x, w.shape[0], tile)
    y = _OP(*given, squares_out, scratch, backend)
    return (y, squares_out) if with_squares else y
