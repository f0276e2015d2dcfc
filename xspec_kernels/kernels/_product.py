"""x W^T for few rows: the part that skinny_linear and lm_head_argmax share.

One 64-row tile serves every M: the number of rows is read on the device and row blocks of 64 lie
in the grid, so 1 and 64 rows run one binary and one matrix instruction. K is cut at fixed places;
each program of a tile stores its partial sum in float32 and the last to arrive adds them all in
ascending order from memory, whoever it is. A row of the sum is thus a function of that row of x
and of W.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from xspec_kernels._dispatch import check_tensor, exact
from xspec_kernels._triton import INTERPRETED, TensorDescriptor, jit, tl
from xspec_kernels.tiles import BLOCK_M, DTYPES, K_MULTIPLE, Tile, card_of, early_launch
from xspec_kernels.workspace import Workspace


def linear_rows(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """F.linear on [M, K]; in exact mode, a row's bits depend neither on M nor on its place.

    Libraries choose another order of summation for few rows. In exact mode every call therefore
    has 64 rows, zeros where there are fewer.
    """
    if not exact():
        return F.linear(x, w, bias)
    blocks = F.pad(x, (0, 0, 0, -x.shape[0] % BLOCK_M)).split(BLOCK_M)
    return torch.cat([F.linear(block, w, bias) for block in blocks])[: x.shape[0]]


@jit()
def narrow(value, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """fp32 -> dtype, to nearest, ties to even; Triton's interpreter would truncate to bfloat16."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        value = tl.where(value == value, bits.to(tl.float32, bitcast=True), value)
    return value.to(dtype)


@jit()
def normalized(a, scale, weight, INTERPRETED: tl.constexpr):
    """A block of x as RMSNorm leaves it: rounded after the scale and again after the weight."""
    dtype: tl.constexpr = a.dtype
    a = narrow(a.to(tl.float32) * scale[:, None], dtype, INTERPRETED).to(tl.float32)
    return narrow(a * weight.to(tl.float32)[None, :], dtype, INTERPRETED)


@jit()
def settled(total):
    """`total` unchanged, used once more: the loop then waits for the instructions that make it.

    On 9.0 matrix instructions run on behind their issue. With x in registers, Triton 3.6 lets those
    of a step still read them while the next step writes them (triton-lang/triton#9433), unless
    something in the loop needs their result.
    """
    return tl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [total], dtype=tl.float32, is_pure=True, pack=1
    )


@jit()
def count_rows(
    weights,  # [N, K] or None: no early launch
    num_rows,  # [1] int32, read if `bounded`
    M,
    bounded,
    tile,
    split,
    N: tl.constexpr,
    K: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SPLIT_K: tl.constexpr,
):
    """The rows to compute, after waiting for the kernel before this one.

    Weights depend on no kernel: their first lines of 128 bytes are brought into L2 before the
    wait. Nothing may return before it, since the next kernel relies on a chain of waits.
    """
    if weights is not None:
        LINE: tl.constexpr = 1024 // weights.dtype.element_ty.primitive_bitwidth
        n = tl.minimum(tile * BN + tl.arange(0, BN), N - 1).to(tl.int64)
        k = split * (K // BK) // SPLIT_K * BK + tl.arange(0, 4) * LINE
        lines = weights + n[:, None] * K + tl.minimum(k, K - 1)[None, :]
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [lines.to(tl.int64, bitcast=True)],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
        tl.extra.cuda.gdc_wait()
    return tl.minimum(M, tl.load(num_rows, mask=bounded != 0, other=M))


@jit()
def tile_product(
    x,  # [M, K]
    w,  # [N, K] pointer, or its descriptor of [BN, BK] blocks
    norm,  # [K], weight of the RMSNorm of x, or None
    scale,  # [BM] fp32 of that norm, or None
    M,
    tile,
    split,
    block,
    N: tl.constexpr,
    K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SPLIT_K: tl.constexpr,
    TMA: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """This split's sum for one tile, [BM, BN] fp32; rows from M on read nothing and are zero."""
    STEPS: tl.constexpr = K // BK
    row = tl.arange(0, BM)
    column = tl.arange(0, BN)
    k = tl.arange(0, BK)
    rows = (block * BM + row < M)[:, None]
    x_at = x + block.to(tl.int64) * (BM * K) + row[:, None] * K + k[None, :]
    if not TMA:
        w_at = w + tile.to(tl.int64) * (BN * K) + column[:, None] * K + k[None, :]
        columns = (tile * BN + column < N)[:, None]
    if norm is not None:
        factor = tl.load(norm + split * STEPS // SPLIT_K * BK + k)
    total = tl.zeros((BM, BN), tl.float32)
    for step in tl.range(split * STEPS // SPLIT_K, (split + 1) * STEPS // SPLIT_K):
        a = tl.load(x_at + step * BK, mask=rows, other=0.0)
        if norm is not None:
            # Too narrow for the compiler to fetch ahead.
            following = tl.load(norm + tl.minimum(step + 1, STEPS - 1) * BK + k)
            a = normalized(a, scale, factor, INTERPRETED)
            factor = following
        if TMA:
            b = w.load([tile * BN, step * BK])
        elif N % BN == 0:
            b = tl.load(w_at + step * BK)
        else:
            b = tl.load(w_at + step * BK, mask=columns, other=0.0)
        if INTERPRETED:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        total = tl.dot(a, tl.trans(b), total, input_precision="ieee")
        if TMA and norm is not None and not INTERPRETED:
            total = settled(total)
    return total


@jit()
def leave_partial(
    total,
    partial,  # [row blocks * BM, SPLIT_K, TILES * BN] fp32
    semaphore,  # [row blocks * TILES] int32
    M,
    tile,
    split,
    block,
    TILES: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    SPLIT_K: tl.constexpr,
):
    """Store this split's sum; true for the program that finds all others stored."""
    m = block * BM + tl.arange(0, BM)
    n = tile * BN + tl.arange(0, BN)
    at = (m.to(tl.int64) * SPLIT_K + split)[:, None] * (TILES * BN) + n[None, :]
    tl.store(partial + at, total, mask=(m < M)[:, None])
    # The store of every thread comes before the count by one of them.
    tl.debug_barrier()
    before = tl.atomic_add(semaphore + block * TILES + tile, 1, sem="acq_rel", scope="gpu")
    return before == SPLIT_K - 1


@jit()
def sum_partials(
    partial,
    semaphore,
    M,
    tile,
    block,
    TILES: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    SPLIT_K: tl.constexpr,
):
    """All splits' sums, ascending and all from memory: no trace of who came last."""
    tl.debug_barrier()
    m = block * BM + tl.arange(0, BM)
    n = tile * BN + tl.arange(0, BN)
    rows = (m < M)[:, None]
    at = partial + (m.to(tl.int64) * SPLIT_K)[:, None] * (TILES * BN) + n[None, :]
    total = tl.load(at, mask=rows, other=0.0, cache_modifier=".cg")
    # Unrolled, every load would be hoisted to the top and registers would spill.
    for split in tl.range(1, SPLIT_K, num_stages=1, loop_unroll_factor=1):
        part = at + split * (TILES * BN)
        total += tl.load(part, mask=rows, other=0.0, cache_modifier=".cg")
    tl.store(semaphore + block * TILES + tile, 0)
    return total


def product_scratch(
    workspace: Workspace, x: torch.Tensor, N: int, tile: Tile
) -> list[torch.Tensor]:
    """[partial, semaphore] of a product with a weight of N rows, shared by all ops of a stream."""
    blocks, tiles = -(-x.shape[0] // BLOCK_M), -(-N // tile.block_n)
    shape = (blocks * BLOCK_M, tile.split_k, tiles * tile.block_n)
    partial = workspace.buffer("linear.partial", shape if tile.split_k > 1 else (1,), torch.float32)
    return [partial, workspace.semaphores("linear.semaphore", blocks * tiles)]


def product_arguments(
    op: str, x: torch.Tensor, w: torch.Tensor, num_rows: torch.Tensor | None, tile: Tile
) -> tuple[tuple, tuple, dict]:
    """(weights in two forms, row count, constants) for a kernel built on `tile_product`.

    Raises:
        ValueError: x or w does not start at a multiple of 16 bytes.
    """
    for name, tensor in (("x", x), ("w", w)):
        check_alignment(op, name, tensor)
    early = early_launch(card_of(x.device))
    blocks = TensorDescriptor.from_tensor(w, [tile.block_n, tile.block_k]) if tile.tma else w
    constants = {
        "N": w.shape[0],
        "K": w.shape[1],
        "BM": BLOCK_M,
        "BN": tile.block_n,
        "BK": tile.block_k,
        "SPLIT_K": tile.split_k,
        "TMA": tile.tma,
        "INTERPRETED": INTERPRETED,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        **({"launch_pdl": True} if early else {}),
    }
    return (blocks, w if early else None), (x.shape[0], int(num_rows is not None)), constants


def check_alignment(op: str, name: str, tensor: torch.Tensor) -> None:
    """Raise ValueError unless `tensor` starts at a multiple of 16 bytes."""
    if tensor.data_ptr() % 16:
        raise ValueError(f"{op}: {name} starts at {tensor.data_ptr():#x}, expected 16-byte steps")


def check_product(
    op: str, x: torch.Tensor, w: torch.Tensor, num_rows: torch.Tensor | None
) -> torch.device:
    """Raise ValueError unless x [M, K], w [N, K] and num_rows [1] can be multiplied."""
    device = x.device
    if x.dim() != 2 or w.dim() != 2 or 0 in (*x.shape, *w.shape) or x.shape[1] != w.shape[1]:
        raise ValueError(
            f"{op}: x has shape {list(x.shape)} and w {list(w.shape)}, expected [M, K] and [N, K], "
            "none of them 0"
        )
    if x.shape[1] % K_MULTIPLE:
        raise ValueError(f"{op}: K is {x.shape[1]}, expected a multiple of {K_MULTIPLE}")
    check_tensor(op, "x", x, x.shape, DTYPES, device)
    check_tensor(op, "w", w, w.shape, (x.dtype,), device)
    if num_rows is not None:
        check_tensor(op, "num_rows", num_rows, (1,), (torch.int32,), device)
    return device
