"""lm_head_argmax: hidden states -> token of the largest logit per row; logits are never stored.

The product is that of skinny_linear. Each tile of the vocabulary keeps, per row, its largest and
second largest logit and the index of the former; a second kernel joins the tiles. Largest, second
largest and lowest index do not depend on the order in which they are joined.

`round_to` says which values are compared: the float32 sums, or these rounded to a dtype.
transformers compares logits rounded to the model's dtype, where ties are common, and takes the
lowest index among equals, as this does.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from xspec_kernels._dispatch import check_tensor, choose, register
from xspec_kernels._triton import jit, launch, tl, triton
from xspec_kernels.kernels._product import (
    check_product,
    count_rows,
    leave_partial,
    linear_rows,
    narrow,
    product_arguments,
    product_scratch,
    sum_partials,
    tile_product,
)
from xspec_kernels.tiles import BLOCK_M, DTYPES, card_of, tile_of
from xspec_kernels.workspace import Workspace

NEAR_TIE, NOT_A_NUMBER = 1, 2
# Twice the unit in the last place of a number in [1, 2).
_TWO_ULP = {torch.float32: 2.0**-22, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}


class ArgmaxResult(NamedTuple):
    """The greedy token of each row.

    Attributes:
        ids: [M] int64, index of the largest logit, the lowest among equals; -1 for a row in which
            any logit is NaN, which verify_greedy reads as an invalid row.
        flags: [M] int32: 0, 1 (the two largest logits are equal or within two units in the last
            place of the largest, in the dtype compared) or 2 (NaN).
        best: [M] float32, the largest logit as compared; NaN where the flag is 2.
    """

    ids: torch.Tensor
    flags: torch.Tensor
    best: torch.Tensor


def _logits(
    x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, round_to: torch.dtype
) -> torch.Tensor:
    """[M, N] in `round_to`; a product in x's dtype would already be rounded to that."""
    if round_to == x.dtype:
        return linear_rows(x, w, bias)
    step, wide = 8192, x.float()
    parts = zip(w.split(step), [None] * len(w) if bias is None else bias.split(step), strict=False)
    tiles = [linear_rows(wide, part.float(), None if b is None else b.float()) for part, b in parts]
    return torch.cat([tile.to(round_to) for tile in tiles], 1)


def lm_head_argmax_ref(
    x: torch.Tensor,
    w: torch.Tensor,
    num_rows: torch.Tensor | None,
    bias: torch.Tensor | None,
    round_to: torch.dtype | None,
    scratch: list[torch.Tensor],
) -> ArgmaxResult:
    """The definition; computes every row."""
    compared = round_to or torch.float32
    logits = _logits(x, w, bias, compared)
    invalid = logits.isnan().any(1)
    best, ids = logits.max(1)
    logits.scatter_(1, ids[:, None], -torch.inf)
    best, second = best.float(), logits.amax(1).float()
    exponent = (best.view(torch.int32) & 0x7F800000).view(torch.float32)
    near = (best - second <= exponent * _TWO_ULP[compared]) & (exponent < torch.inf)
    flags = torch.where(invalid, NOT_A_NUMBER, (near | (best == second)).int())
    return ArgmaxResult(
        torch.where(invalid, -1, ids), flags.int(), torch.where(invalid, torch.nan, best)
    )


@jit(do_not_specialize=["M", "bounded"], do_not_specialize_on_alignment=["num_rows", "bias"])
def _lm_head_tiles_kernel(
    x,  # [M, K]
    w,  # [N, K] pointer, or its descriptor of [BN, BK] blocks
    weights,  # [N, K] pointer, or None: no early launch
    bias,  # [N] or None
    tile_best,  # [M, TILES] fp32
    tile_second,  # [M, TILES] fp32
    tile_index,  # [M, TILES] int32
    partial,  # [row blocks * BM, SPLIT_K, TILES * BN] fp32, or None for SPLIT_K == 1
    semaphore,  # [row blocks * TILES] int32 zeros
    num_rows,  # [1] int32, read if `bounded`
    M,
    bounded,
    ROUND_TO: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SPLIT_K: tl.constexpr,
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
    total = tile_product(
        x, w, None, None, rows, tile, split, block, N, K, BM, BN, BK, SPLIT_K, TMA, INTERPRETED
    )
    if weights is not None:
        tl.extra.cuda.gdc_launch_dependents()
    if SPLIT_K > 1:
        if not leave_partial(
            total, partial, semaphore, rows, tile, split, block, TILES, BM, BN, SPLIT_K
        ):
            return
        total = sum_partials(partial, semaphore, rows, tile, block, TILES, BM, BN, SPLIT_K)

    n = tile * BN + tl.arange(0, BN)[None, :]
    if bias is not None:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    logits = narrow(total, ROUND_TO, INTERPRETED).to(tl.float32)
    # An infinite x times the zeros past the vocabulary is NaN: only real columns are asked.
    invalid = tl.max(((logits != logits) & (n < N)).to(tl.int32), 1) > 0
    logits = tl.where((n < N) & (logits == logits), logits, float("-inf"))
    best = tl.max(logits, 1)
    index = tl.min(tl.where((logits == best[:, None]) & (n < N), n, N), 1)
    second = tl.max(tl.where(n == index[:, None], float("-inf"), logits), 1)
    m = block * BM + tl.arange(0, BM)
    at = m.to(tl.int64) * TILES + tile
    tl.store(tile_best + at, tl.where(invalid, float("nan"), best), mask=m < rows)
    tl.store(tile_second + at, second, mask=m < rows)
    tl.store(tile_index + at, index, mask=m < rows)


@jit()
def join_tiles(
    tile_best,
    tile_second,
    tile_index,
    row,
    TWO_ULP: tl.constexpr,
    TILES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """(id, flag, best) of one row; WIDTH is the power of two from TILES up."""
    t = tl.arange(0, WIDTH)
    at = row.to(tl.int64) * TILES + t
    inside = t < TILES
    bests = tl.load(tile_best + at, mask=inside, other=float("-inf"))
    seconds = tl.load(tile_second + at, mask=inside, other=float("-inf"))
    indices = tl.load(tile_index + at, mask=inside, other=2147483647)
    invalid = tl.max((bests != bests).to(tl.int32), 0) > 0
    bests = tl.where(bests == bests, bests, float("-inf"))
    best = tl.max(bests, 0)
    index = tl.min(tl.where(bests == best, indices, 2147483647), 0)
    # The winner's tile offers its second largest, every other tile its largest.
    second = tl.max(tl.where(indices == index, seconds, bests), 0)
    exponent = (best.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    near = (best - second <= exponent * TWO_ULP) & (exponent < float("inf"))
    flag = tl.where(invalid, 2, (near | (best == second)).to(tl.int32))
    return tl.where(invalid, -1, index), flag, tl.where(invalid, float("nan"), best)


@jit(do_not_specialize=["M", "bounded"], do_not_specialize_on_alignment=["num_rows"])
def _lm_head_join_kernel(
    tile_best,  # [M, TILES] fp32
    tile_second,  # [M, TILES] fp32
    tile_index,  # [M, TILES] int32
    num_rows,  # [1] int32, read if `bounded`
    ids,  # [M] int64
    flags,  # [M] int32
    best_out,  # [M] fp32
    M,
    bounded,
    TWO_ULP: tl.constexpr,
    TILES: tl.constexpr,
    WIDTH: tl.constexpr,
    EARLY: tl.constexpr,
):
    if EARLY:
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0)
    if row >= tl.minimum(M, tl.load(num_rows, mask=bounded != 0, other=M)):
        return
    index, flag, best = join_tiles(tile_best, tile_second, tile_index, row, TWO_ULP, TILES, WIDTH)
    tl.store(ids + row, index.to(tl.int64))
    tl.store(flags + row, flag)
    tl.store(best_out + row, best)


def _scratch(workspace: Workspace, x: torch.Tensor, w: torch.Tensor) -> list[torch.Tensor]:
    """[partial, semaphore, tile_best, tile_second, tile_index]."""
    tile = tile_of(*w.shape, w.dtype, card_of(x.device))
    shape = (x.shape[0], -(-w.shape[0] // tile.block_n))
    return [
        *product_scratch(workspace, x, w.shape[0], tile),
        workspace.buffer("lm_head.best", shape, torch.float32),
        workspace.buffer("lm_head.second", shape, torch.float32),
        workspace.buffer("lm_head.index", shape, torch.int32),
    ]


def _triton(
    x: torch.Tensor,
    w: torch.Tensor,
    num_rows: torch.Tensor | None,
    bias: torch.Tensor | None,
    round_to: torch.dtype | None,
    scratch: list[torch.Tensor],
) -> ArgmaxResult:
    out = _fake(x, w, num_rows, bias, round_to, scratch)
    compared = round_to or torch.float32
    tile = tile_of(*w.shape, w.dtype, card_of(x.device))
    partial, semaphore, *parts = scratch or _scratch(Workspace(x.device), x, w)
    limit = semaphore if num_rows is None else num_rows
    weights, rows, constants = product_arguments("lm_head_argmax", x, w, num_rows, tile)
    tiles = -(-w.shape[0] // tile.block_n)
    if bias is not None:
        # Beside the two largest, the bias takes registers that four warps have not left.
        constants["num_warps"] = max(8, tile.num_warps)
    launch(
        _lm_head_tiles_kernel, (tiles, tile.split_k, -(-x.shape[0] // BLOCK_M)), x.device,
        x, *weights, bias, *parts, partial if tile.split_k > 1 else None, semaphore, limit, *rows,
        ROUND_TO=getattr(tl, str(compared).removeprefix("torch.")), **constants,
    )  # fmt: skip
    early = weights[1] is not None
    launch(
        _lm_head_join_kernel, (x.shape[0],), x.device, *parts, limit, *out, *rows,
        TWO_ULP=_TWO_ULP[compared], TILES=tiles, WIDTH=triton.next_power_of_2(tiles), EARLY=early,
        num_warps=4, **({"launch_pdl": True} if early else {}),
    )  # fmt: skip
    return out


def _check(
    x: torch.Tensor,
    w: torch.Tensor,
    num_rows: torch.Tensor | None,
    bias: torch.Tensor | None,
    round_to: torch.dtype | None,
    scratch: list[torch.Tensor],
) -> torch.device:
    if round_to not in (None, *DTYPES):
        expected = ", ".join(str(dtype) for dtype in DTYPES)
        raise ValueError(f"lm_head_argmax: round_to is {round_to}, expected None, {expected}")
    device = check_product("lm_head_argmax", x, w, num_rows)
    if bias is not None:
        check_tensor("lm_head_argmax", "bias", bias, w.shape[:1], (x.dtype,), device)
    return device


def _fake(
    x: torch.Tensor,
    w: torch.Tensor,
    num_rows: torch.Tensor | None,
    bias: torch.Tensor | None,
    round_to: torch.dtype | None,
    scratch: list[torch.Tensor],
) -> ArgmaxResult:
    rows = x.shape[0]
    return ArgmaxResult(
        x.new_empty(rows, dtype=torch.int64),
        x.new_empty(rows, dtype=torch.int32),
        x.new_empty(rows, dtype=torch.float32),
    )


_OP = register(
    "lm_head_argmax",
    "(Tensor x, Tensor w, Tensor? num_rows, Tensor? bias, ScalarType? round_to,"
    " Tensor(a!)[] scratch, str backend) -> (Tensor ids, Tensor flags, Tensor best)",
    check=_check,
    fake=_fake,
    torch=lm_head_argmax_ref,
    triton=_triton,
)


def lm_head_argmax(
    x: torch.Tensor,
    w: torch.Tensor,
    num_rows: torch.Tensor | None = None,
    *,
    bias: torch.Tensor | None = None,
    round_to: torch.dtype | None = None,
    workspace: Workspace | None = None,
    backend: str = "auto",
) -> ArgmaxResult:
    """The index of the largest entry of each row of x W^T + bias.

    Args:
        x: [M, K] float32, float16 or bfloat16, K a multiple of 64.
        w: [N, K], dtype of x, any N.
        num_rows: [1] int32 on the device, rows of x that count; None means all M. Results of the
            other rows are unspecified.
        bias: [N], dtype of x.
        round_to: float32, float16 or bfloat16: logits are rounded to it before they are compared;
            None means float32. With a half-precision x, `torch` is slow unless it is x's dtype.
        workspace: scratch of this decoder and stream; None allocates for this call.
        backend: see `xspec_kernels`.

    Raises:
        ValueError: a shape, dtype or device is wrong, or a tensor is not contiguous; the Triton
            kernel also wants x and w to start at a multiple of 16 bytes.
    """
    scratch: list[torch.Tensor] = []
    if workspace is not None and choose("lm_head_argmax", backend, x.device.type) == "triton":
        _check(x, w, num_rows, bias, round_to, scratch)
        scratch = _scratch(workspace, x, w)
    return ArgmaxResult(*_OP(x, w, num_rows, bias, round_to, scratch, backend))
