"""The Triton kernels of adapter_tail: what was said goes in, what may be said next comes out."""

from __future__ import annotations

import torch

from xspec_kernels._triton import jit, launch, tl, triton

NO_DRAFT = -1
_MAX_BLOCK = 1024
_POINTERS = (
    "accept_len", "accept_path", "root", "cache_seqlens", "prompt", "drafted", "num_rows",
)  # fmt: skip


@jit(do_not_specialize=["P"], do_not_specialize_on_alignment=_POINTERS)
def _feed_kernel(
    accept_len,  # [1] int32
    accept_path,  # [1, N] int32
    rows,  # [N] int64, or [N, D]
    root,  # [1] int64
    cache_seqlens,  # [1] int32
    prompt,  # [1] int32
    drafted,  # [1] int32
    fed,  # [P] int64, or [P, D]
    num_rows,  # [1] int32
    P,
    TOKENS: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    step = tl.program_id(0)
    length = tl.load(accept_len)
    known = tl.load(cache_seqlens) - tl.load(prompt) + 1
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if step == 0:
        filled = tl.minimum(tl.maximum(tl.maximum(known, tl.load(drafted)), 1), P)
        tl.store(num_rows + column, filled, mask=column == 0)
    place = known - length - 1 + step
    inside = (column < D) & (step <= length) & (place >= 0) & (place < P)
    if TOKENS:
        node = tl.load(accept_path + step, mask=step < length, other=0)
        last = tl.load(root)
        said = tl.load(rows + node + column, mask=inside & (step < length), other=0)
        said = tl.where(step < length, said, last)
    else:
        node = tl.load(accept_path + step - 1, mask=(step > 0) & (step <= length), other=0)
        said = tl.load(rows + node.to(tl.int64) * D + column, mask=inside, other=0)
    tl.store(fed + place.to(tl.int64) * D + column, said, mask=inside)


@jit(
    do_not_specialize=["P", "G", "ahead"],
    do_not_specialize_on_alignment=["ids", "cache_seqlens", "prompt", "num_rows", "drafts"],
)
def _pick_kernel(
    ids,  # [P] int64
    cache_seqlens,  # [1] int32
    prompt,  # [1] int32
    num_rows,  # [1] int32
    drafts,  # [G] int64
    P,
    G,
    ahead,
    BLOCK: tl.constexpr,
    NONE: tl.constexpr,
):
    step = tl.arange(0, BLOCK)
    place = tl.load(cache_seqlens) - tl.load(prompt) + 1 - ahead + step
    there = (place >= 0) & (place < tl.minimum(tl.load(num_rows), P)) & (step < G)
    tl.store(drafts + step, tl.load(ids + place, mask=there, other=NONE), mask=step < G)


def launch_feed(
    accept_len: torch.Tensor,
    accept_path: torch.Tensor,
    rows: torch.Tensor,
    root: torch.Tensor,
    cache_seqlens: torch.Tensor,
    prompt: torch.Tensor,
    drafted: torch.Tensor,
    fed: torch.Tensor,
    num_rows: torch.Tensor,
) -> None:
    """The kernel on checked arguments."""
    width = 1 if fed.dim() == 1 else fed.shape[1]
    block = min(triton.next_power_of_2(width), _MAX_BLOCK)
    launch(
        _feed_kernel, (accept_path.shape[1], -(-width // block)), fed.device, accept_len,
        accept_path, rows, root, cache_seqlens, prompt, drafted, fed, num_rows, len(fed),
        TOKENS=fed.dim() == 1, D=width, BLOCK=block, num_warps=max(1, block // 256),
    )  # fmt: skip


def launch_pick(
    ids: torch.Tensor,
    cache_seqlens: torch.Tensor,
    prompt: torch.Tensor,
    num_rows: torch.Tensor,
    drafts: torch.Tensor,
    ahead: int,
) -> None:
    """The kernel on checked arguments."""
    launch(
        _pick_kernel, (1,), ids.device, ids, cache_seqlens, prompt, num_rows, drafts, len(ids),
        len(drafts), ahead, BLOCK=64, NONE=NO_DRAFT, num_warps=2,
    )  # fmt: skip
