"""The Triton kernels of tree_attention, their constants and their launcher.

Two launches. In the first every (request, KV head) has near programs, BR packed rows each, and far
programs, one per split and block of BM packed rows; packed row = row * G + query head in the group.
Each leaves a partial row of `scratch`: D sums, the running maximum, the running weight, padding.
The second merges a row's partials in order.

One cubin serves every N, length and capacity, and the body of either loop exists once in it: a
second copy, for instance of the tile that only some rows use, could round differently.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch

from xspec_kernels._triton import INTERPRETED, jit, launch, tl
from xspec_kernels.kernels._product import narrow
from xspec_kernels.tiles import INTERPRETER, card_of

TILE = 32
SPLIT = 256
_PAD = 8  # floats behind a partial row's sums: rows stay a whole number of 32-byte sectors
_LOG2E = 1.4426950408889634


@jit()
def _dot(a, b, acc, INTERPRETED: tl.constexpr):
    """a @ b + acc; the interpreter's product of bf16 is wrong, and fp32 must not become TF32."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision="ieee")


@jit()
def _far_end(p, TILE: tl.constexpr, WINDOW: tl.constexpr):
    return tl.maximum(p - (WINDOW - 1), 0) // TILE * TILE


@jit()
def _load_q(q, b, h, N, r, d, ok, G: tl.constexpr, HQ: tl.constexpr, D: tl.constexpr):
    at = ((b * N + r // G) * HQ + h * G + r % G).to(tl.int64)
    return tl.load(q + at[:, None] * D + d[None, :], mask=ok[:, None], other=0.0)


@jit()
def _store_partial(scratch, line, d, m, weight, acc, keep, D: tl.constexpr, ROW: tl.constexpr):
    at = scratch + line.to(tl.int64) * ROW
    tl.store(at[:, None] + d[None, :], acc, mask=keep[:, None])
    tl.store(at + D, m, mask=keep)
    tl.store(at + D + 1, weight, mask=keep)


@jit()
def _near(
    block, q, k, v, depth, path_slot, scratch, scale, N, b, h, n, rows, head, line,
    G: tl.constexpr, HQ: tl.constexpr, D: tl.constexpr, ROW: tl.constexpr, SLOT: tl.constexpr,
    TILE: tl.constexpr, WINDOW: tl.constexpr, BR: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Keys [far end, p] of BR packed rows, gathered along each row's path, in position order."""
    r = block * BR + tl.arange(0, BR)
    row = r // G
    ok = row < rows
    node = b * N + tl.minimum(row, N - 1)
    d = tl.arange(0, D)
    p = n + tl.load(depth + node, mask=ok, other=0)
    first = _far_end(p, TILE, WINDOW)
    query = _load_q(q, b, h, N, r, d, ok, G, HQ, D).to(tl.float32)
    m = tl.full((BR,), -float("inf"), tl.float32)
    weight = tl.zeros((BR,), tl.float32)
    acc = tl.zeros((BR, D), tl.float32)
    # Pipelined, not unrolled: the gathers run ahead and there is one copy of the arithmetic.
    for e in tl.range(0, tl.max(tl.where(ok, p - first + 1, 0), 0), num_stages=STAGES):
        pos = first + e
        use = ok & (pos <= p)
        new = use & (pos >= n)
        slot = tl.load(path_slot + node * WINDOW + tl.where(new, pos - n, 0), mask=new, other=0)
        at = (head + tl.where(new, n + slot, pos).to(tl.int64) * SLOT) * D
        key = tl.load(k + at[:, None] + d[None, :], mask=use[:, None], other=0.0).to(tl.float32)
        value = tl.load(v + at[:, None] + d[None, :], mask=use[:, None], other=0.0).to(tl.float32)
        s = tl.sum(query * key, 1) * scale
        m_new = tl.maximum(m, s)
        alpha = tl.exp2(m - m_new)
        w = tl.exp2(s - m_new)
        weight = tl.where(use, weight * alpha + w, weight)
        acc = tl.where(use[:, None], acc * alpha[:, None] + w[:, None] * value, acc)
        m = tl.where(use, m_new, m)
    _store_partial(scratch, line + r, d, m, weight, acc, ok, D, ROW)


@jit()
def _far(
    block, split, q, k, v, depth, scratch, scale, N, b, h, n, rows, head, line,
    G: tl.constexpr, HQ: tl.constexpr, D: tl.constexpr, ROW: tl.constexpr, SLOT: tl.constexpr,
    TILE: tl.constexpr, SPLIT: tl.constexpr, WINDOW: tl.constexpr, BM: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Keys [split * SPLIT, ..) below each row's far end, in whole tiles, of BM packed rows."""
    r = block * BM + tl.arange(0, BM)
    row = r // G
    ok = row < rows
    d = tl.arange(0, D)
    p = n + tl.load(depth + b * N + row, mask=ok, other=0)
    end = tl.where(ok, _far_end(p, TILE, WINDOW), 0)
    low = split * SPLIT
    high = tl.minimum(low + SPLIT, tl.max(end, 0))
    if low < high:
        query = _load_q(q, b, h, N, r, d, ok, G, HQ, D)
        m = tl.full((BM,), -float("inf"), tl.float32)
        weight = tl.zeros((BM,), tl.float32)
        acc = tl.zeros((BM, D), tl.float32)
        t = tl.arange(0, TILE)
        for start in tl.range(low, high, TILE):
            at = (head + (start + t).to(tl.int64) * SLOT) * D
            key = tl.load(k + at[:, None] + d[None, :])
            value = tl.load(v + at[:, None] + d[None, :])
            s = _dot(query, tl.trans(key), tl.zeros((BM, TILE), tl.float32), INTERPRETED)
            s *= scale
            m_new = tl.maximum(m, tl.max(s, 1))
            alpha = tl.exp2(m - m_new)
            w = tl.exp2(s - m_new[:, None])
            summed = weight * alpha + tl.sum(w, 1)
            added = _dot(
                narrow(w, value.dtype, INTERPRETED), value, acc * alpha[:, None], INTERPRETED
            )
            # A row past its far end keeps its state, bit for bit; no tile is used in part.
            use = start < end
            weight = tl.where(use, summed, weight)
            acc = tl.where(use[:, None], added, acc)
            m = tl.where(use, m_new, m)
        _store_partial(scratch, line + r, d, m, weight, acc, low < end, D, ROW)


@jit()
def _num_rows(num_rows, b, n, N, ragged, slots, max_splits, SPLIT: tl.constexpr):
    """Rows of request b, and -1 where they would not fit the cache or the grid."""
    rows = N
    if ragged != 0:
        rows = tl.maximum(tl.minimum(tl.load(num_rows + b), N), 0)
    fits = (n >= 0) & (n + rows <= slots) & (n <= max_splits * SPLIT)
    return tl.where(fits, rows, -1)


# Numbers that vary and pointers that may be slices are kept out of the specialization key.
_VARYING = ["N", "max_splits", "ragged", "slots", "kv_batch", "kv_head"]
_SLICED = ["depth", "path_slot", "cache_seqlens", "num_rows"]


@jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_SLICED)
def _partials_kernel(
    q,  # [B, N, HQ, D]
    k,  # [B, HKV, slots, D], strides in units of D: kv_batch, kv_head, SLOT
    v,
    depth,  # [B, N] int32
    path_slot,  # [B, N, WINDOW] int32
    cache_seqlens,  # [B] int32
    num_rows,  # [B] int32, not read unless ragged
    scratch,  # [B * HKV, max_splits + 1, N * G, ROW] fp32, the near part last
    scale,  # of the scores, times log2(e)
    N, max_splits, ragged, slots, kv_batch, kv_head,
    HQ: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, ROW: tl.constexpr, SLOT: tl.constexpr,
    TILE: tl.constexpr, SPLIT: tl.constexpr, WINDOW: tl.constexpr,
    BM: tl.constexpr, BR: tl.constexpr, STAGES: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    G: tl.constexpr = HQ // HKV
    program = tl.program_id(0)
    b = tl.program_id(1) // HKV
    h = tl.program_id(1) % HKV
    n = tl.load(cache_seqlens + b)
    rows = _num_rows(num_rows, b, n, N, ragged, slots, max_splits, SPLIT)
    packed = N * G
    near_blocks = tl.cdiv(packed, BR)
    head = b.to(tl.int64) * kv_batch + h.to(tl.int64) * kv_head
    line = tl.program_id(1).to(tl.int64) * (max_splits + 1) * packed
    # Near programs first: theirs is the longer chain of dependent steps.
    if program < near_blocks:
        _near(
            program, q, k, v, depth, path_slot, scratch, scale, N, b, h, n, rows, head,
            line + max_splits * packed, G, HQ, D, ROW, SLOT, TILE, WINDOW, BR, STAGES,
        )  # fmt: skip
    else:
        split = (program - near_blocks) % max_splits
        _far(
            (program - near_blocks) // max_splits, split, q, k, v, depth, scratch, scale, N, b, h,
            n, rows, head, line + split * packed, G, HQ, D, ROW, SLOT, TILE, SPLIT, WINDOW, BM,
            INTERPRETED,
        )  # fmt: skip


@jit(
    do_not_specialize=["N", "max_splits", "ragged", "slots"],
    do_not_specialize_on_alignment=["depth", "cache_seqlens", "num_rows"],
)
def _merge_kernel(
    scratch, depth, cache_seqlens, num_rows, out,  # as above; out [B, N, HQ, D]
    N, max_splits, ragged, slots,
    HQ: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, ROW: tl.constexpr,
    TILE: tl.constexpr, SPLIT: tl.constexpr, WINDOW: tl.constexpr,
    RB: tl.constexpr, CHUNK: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One program per RB packed rows; a row adds the splits that its position has, ascending."""
    G: tl.constexpr = HQ // HKV
    b = tl.program_id(1) // HKV
    h = tl.program_id(1) % HKV
    d = tl.arange(0, D)
    n = tl.load(cache_seqlens + b)
    rows = _num_rows(num_rows, b, n, N, ragged, slots, max_splits, SPLIT)
    packed = N * G
    r = tl.program_id(0) * RB + tl.arange(0, RB)
    row = r // G
    inside = r < packed
    ok = inside & (row < rows)
    p = n + tl.load(depth + b * N + row, mask=ok, other=0)
    splits = tl.where(ok, tl.cdiv(_far_end(p, TILE, WINDOW), SPLIT), 0)
    line = tl.program_id(1).to(tl.int64) * (max_splits + 1) * packed + r
    near = scratch + (line + max_splits * packed) * ROW
    m_near = tl.load(near + D, mask=ok, other=0.0)
    last = tl.max(splits, 0)
    top = m_near
    for start in range(0, last, CHUNK):
        i = start + tl.arange(0, CHUNK)
        at = scratch + (line[:, None] + (i * packed)[None, :]) * ROW
        m = tl.load(at + D, mask=i[None, :] < splits[:, None], other=-float("inf"))
        top = tl.maximum(top, tl.max(m, 1))
    weight = tl.zeros((RB,), tl.float32)
    acc = tl.zeros((RB, D), tl.float32)
    for i in range(0, last):
        use = i < splits
        at = scratch + (line + i * packed) * ROW
        w = tl.exp2(tl.load(at + D, mask=use, other=0.0) - top)
        part = tl.load(at[:, None] + d[None, :], mask=use[:, None], other=0.0)
        part_weight = tl.load(at + D + 1, mask=use, other=0.0)
        weight = tl.where(use, weight + w * part_weight, weight)
        acc = tl.where(use[:, None], acc + w[:, None] * part, acc)
    w = tl.exp2(m_near - top)
    weight += w * tl.load(near + D + 1, mask=ok, other=0.0)
    acc += w[:, None] * tl.load(near[:, None] + d[None, :], mask=ok[:, None], other=0.0)
    # Rows of no request are zero, those of a request that does not fit the cache are NaN.
    idle = tl.where(rows < 0, float("nan"), tl.zeros((RB,), tl.float32))
    mean = tl.where(ok[:, None], acc / tl.where(ok, weight, 1.0)[:, None], idle[:, None])
    at = ((b * N + row) * HQ + h * G + r % G).to(tl.int64)
    value = narrow(mean, out.dtype.element_ty, INTERPRETED)
    tl.store(out + at[:, None] * D + d[None, :], value, mask=inside[:, None])


class Config(NamedTuple):
    """Constants of a card, head size and dtype. BM picks the matrix instruction, so all of them are
    part of the result's bits."""

    BM: int
    BR: int
    STAGES: int
    num_warps: int = 4
    num_stages: int = 3


@cache
def config(card: int, head_dim: int, itemsize: int) -> Config:
    """The constants for a card as `card_of` gives it, a head size and bytes an element."""
    if itemsize == 4 and card != INTERPRETER:
        return Config(16, 8 if head_dim > 128 else 16, 2, num_stages=1 if head_dim > 128 else 2)
    if head_dim > 128:
        return Config(16, 8, 4)
    # With 64 rows registers spill on 8.x and 12.x, and on 10.x the tile's body is there twice.
    return Config(64 if card in (90, INTERPRETER) else 32, 16, 4)


def max_splits(max_seqlen: int) -> int:
    """Far splits that caches of up to `max_seqlen` committed rows can need."""
    return -(-max_seqlen // SPLIT)


def scratch_floats(q: torch.Tensor, max_seqlen: int) -> int:
    """fp32 elements of workspace for queries [B, N, H_q, D]."""
    batch, rows, heads, head_dim = q.shape
    return batch * rows * heads * (max_splits(max_seqlen) + 1) * (head_dim + _PAD)


def run(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    depth: torch.Tensor,
    path_slot: torch.Tensor,
    cache_seqlens: torch.Tensor,
    num_rows: torch.Tensor | None,
    scratch: torch.Tensor | None,
    scale: float,
    max_seqlen: int,
) -> torch.Tensor:
    """Launch both kernels; arguments as `tree_attention`'s, checked before."""
    batch, rows, heads, head_dim = q.shape
    kv_heads, slots = k_cache.shape[1:3]
    packed = rows * heads // kv_heads
    splits = max_splits(max_seqlen)
    if scratch is None:
        scratch = q.new_empty(scratch_floats(q, max_seqlen), dtype=torch.float32)
    tuned = config(card_of(q.device), head_dim, q.element_size())
    merged = max(1, 128 // head_dim)  # rows of a warp that loads 16 bytes a lane
    if INTERPRETED:  # all rows in one near and one merge program: time goes by program there
        merged = 1 << (packed - 1).bit_length()
        tuned = tuned._replace(BR=merged)
    out = torch.empty_like(q)
    ragged = cache_seqlens if num_rows is None else num_rows
    numbers = (rows, splits, int(num_rows is not None), slots)
    constants = dict(
        HQ=heads, HKV=kv_heads, D=head_dim, ROW=head_dim + _PAD,
        TILE=TILE, SPLIT=SPLIT, WINDOW=path_slot.shape[2],
    )  # fmt: skip
    stride_batch, stride_head, stride_slot = (s // head_dim for s in k_cache.stride()[:3])
    blocks = -(-packed // tuned.BR) + splits * -(-packed // tuned.BM)
    launch(
        _partials_kernel, (blocks, batch * kv_heads), q.device,
        q, k_cache, v_cache, depth, path_slot, cache_seqlens, ragged, scratch, scale * _LOG2E,
        *numbers, stride_batch, stride_head,
        SLOT=stride_slot, **constants, **tuned._asdict(), INTERPRETED=INTERPRETED,
    )  # fmt: skip
    launch(
        _merge_kernel, (-(-packed // merged), batch * kv_heads), q.device,
        scratch, depth, cache_seqlens, ragged, out, *numbers, **constants, RB=merged, CHUNK=32,
        INTERPRETED=INTERPRETED, num_warps=1,
    )  # fmt: skip
    return out
