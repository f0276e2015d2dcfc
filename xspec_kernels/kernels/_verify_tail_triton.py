"""The Triton kernel of verify_tail's first launch: accept, publish, advance."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from xspec_kernels._triton import INTERPRETED, jit, launch, tl
from xspec_kernels.kernels.verify_greedy import longest_path


@jit()
def _release(address, word, INTERPRET: tl.constexpr):
    """Store one int64 after every earlier store of the program, for any observer."""
    tl.debug_barrier()
    if INTERPRET:
        tl.store(address, word)
    else:
        # Triton has no plain store with release order, and an atomic on host memory would read it
        # back over the bus.
        tl.inline_asm_elementwise(
            "{ .reg .pred first; .reg .b32 thread; mov.u32 thread, %tid.x; "
            "setp.eq.u32 first, thread, 0; @first st.release.sys.global.b64 [$1], $2; "
            "mov.b32 $0, 0; }",
            "=r,l,l",
            [address.to(tl.int64), word],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


# Arguments are slices of packed buffers: their alignment must not choose another binary.
_POINTERS = (
    "target_ids", "flags", "token_ids", "parent_idx", "ancestor_bits", "cache_seqlens", "root",
    "sequence", "record", "num_rows", "max_new", "accept_len", "accept_path", "start_out",
)  # fmt: skip


@jit(
    do_not_specialize=["N", "slots", "stride_record"],
    do_not_specialize_on_alignment=_POINTERS,
)
def _accept_kernel(
    target_ids,  # [B, N] int64
    flags,  # [B, N] int32
    token_ids,  # [B, N] int64
    parent_idx,  # [B, N] int32
    ancestor_bits,  # [B, N] int64
    cache_seqlens,  # [B] int32
    root,  # [B] int64
    sequence,  # [B] int64
    record,  # [B, stride_record] int64
    num_rows,  # [B] int32 or None
    max_new,  # [B] int32 or None
    accept_len,  # [B] int32
    accept_path,  # [B, N] int32
    start_out,  # [B] int32, a copy that the commit may read while cache_seqlens advances
    N,
    slots,
    stride_record,
    NODES: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    base = request * N
    i = tl.arange(0, NODES)
    asked = N
    if num_rows is not None:
        asked = tl.minimum(tl.maximum(tl.load(num_rows + request), 0), N)
    start = tl.load(cache_seqlens + request)
    rows = tl.minimum(asked, tl.maximum(tl.where(start < 0, 0, slots - start), 0))
    real = i < rows

    token = tl.load(token_ids + base + i, mask=real, other=-1)
    parent = tl.load(parent_idx + base + i, mask=real, other=-1)
    flag = tl.load(flags + base + i, mask=real, other=0)
    precedes = real & (parent >= 0) & (parent < i)
    want = tl.load(target_ids + base + parent, mask=precedes, other=-1)
    invalid = tl.load(flags + base + parent, mask=precedes, other=2) == 2
    ancestors = tl.load(ancestor_bits + base + i, mask=real, other=0)
    want = tl.where(invalid, -1, want)
    found, last, best = longest_path(token, parent, want, ancestors, real, i, NODES)

    length = found
    if max_new is not None:
        length = tl.minimum(found, tl.maximum(tl.load(max_new + request), 0) - 1)
    count = length + 1
    on_path = (((best >> i.to(tl.int64)) & 1) != 0) & (i > 0) & (found > 0)
    slot = tl.cumsum(on_path.to(tl.int32), 0) - 1
    taken = on_path & (slot < length)
    tl.store(accept_path + base + slot, i, mask=taken)
    beyond = (i >= length) & (i < N)
    tl.store(accept_path + base + i, tl.full((NODES,), -1, tl.int32), mask=beyond)
    tl.store(accept_len + request, length)

    # A path cut short by max_new ends in a draft that equals the target's token above it.
    final = tl.maximum(tl.load(target_ids + base + last), -1)
    final = tl.where(tl.sum(tl.where(i == last, flag, 0), 0) == 2, -1, final)
    cut = tl.sum(tl.where(on_path & (slot == length), token, 0), 0)
    final = tl.where(length < found, cut, final)
    near = tl.sum(((taken | ((i == 0) & (count > 0))) & (flag == 1)).to(tl.int32), 0)
    status = tl.where((count > 0) & (final < 0), 1, 0) + tl.where(asked > rows, 2, 0)

    tl.store(start_out + request, start)
    tl.store(cache_seqlens + request, start + count)
    tl.store(root + request, final, mask=count > 0)
    number = tl.load(sequence + request) + 1
    tl.store(sequence + request, number)

    line = record + request * stride_record
    tl.store(line + 5 + slot, token, mask=taken)
    tl.store(line + 5 + length, final, mask=count > 0)
    tl.store(line + 1, status.to(tl.int64))
    tl.store(line + 2, near.to(tl.int64))
    tl.store(line + 3, count.to(tl.int64))
    tl.store(line + 4, (start + count).to(tl.int64))
    _release(line, number, INTERPRET)


def launch_accept(
    tree: Sequence[torch.Tensor],
    state: Sequence[torch.Tensor | None],
    out: Sequence[torch.Tensor],
    slots: int,
) -> None:
    """The kernel on checked arguments.

    Args:
        tree: target_ids, flags, token_ids, parent_idx, ancestor_bits.
        state: cache_seqlens, root, sequence, record, num_rows, max_new.
        out: accept_len, accept_path and [B] int32 for the lengths before this round.
        slots: of the caches.
    """
    batch, nodes = tree[0].shape
    launch(
        _accept_kernel, (batch,), tree[0].device, *tree, *state, *out, nodes, slots,
        state[3].shape[1], NODES=64, INTERPRET=INTERPRETED, num_warps=2,
    )  # fmt: skip
