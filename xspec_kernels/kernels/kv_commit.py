"""kv_commit: accepted rows into place, in the K and V caches of all layers at once.

A verify writes node i of the tree at slot cache_seqlens + i. The root's row is in place already;
the j-th accepted node moves from cache_seqlens + accept_path[j] to cache_seqlens + 1 + j. Paths
ascend, so a row only ever moves down; a chain moves nothing.

The move is in place and defined as if all rows were read before any is written. A Triton program
therefore loads the whole path of one (cache, request, head, column block), waits at a barrier that
the compiler would not insert by itself, then stores. Rows move as integers: their bits are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

from xspec_kernels import _native
from xspec_kernels._addresses import address_table
from xspec_kernels._dispatch import check_nodes, check_tensor, register
from xspec_kernels._triton import jit, launch, tl

_WORD_DTYPES = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def kv_commit_ref(
    caches: Sequence[torch.Tensor],
    accept_path: torch.Tensor,
    accept_len: torch.Tensor,
    cache_seqlens: torch.Tensor,
) -> torch.Tensor:
    """The definition: gather all source rows, then scatter them."""
    batch, heads, slots, head_dim = caches[0].shape
    if accept_path.device.type == "cpu":
        _check_values(accept_path, accept_len, cache_seqlens, slots)
    step = torch.arange(accept_path.shape[1], device=accept_path.device)
    root = cache_seqlens[:, None].long()
    source = root + accept_path
    moves = (step < accept_len[:, None]) & (accept_path > step + 1) & (source < slots)
    # Idle entries copy the root's row, which is nobody's destination, onto itself.
    root = root.clamp(0, slots - 1)
    source = torch.where(moves, source, root)
    target = torch.where(moves, root + 1 + step, root)
    shape = (batch, heads, source.shape[1], head_dim)
    source = source[:, None, :, None].expand(shape)
    target = target[:, None, :, None].expand(shape)
    for cache in caches:
        bits = cache.view(_WORD_DTYPES[cache.element_size()])
        bits.scatter_(2, target, bits.gather(2, source))
    return cache_seqlens + accept_len.clamp_min(-1) + 1


def _check_values(
    accept_path: torch.Tensor, accept_len: torch.Tensor, cache_seqlens: torch.Tensor, slots: int
) -> None:
    rows = zip(accept_path.tolist(), accept_len.tolist(), cache_seqlens.tolist(), strict=True)
    for request, (nodes, length, start) in enumerate(rows):
        steps = [0, *nodes[: max(length, 0)]]
        ascends = all(low < high for low, high in pairwise(steps))
        fits = length < 0 or start + steps[-1] < slots
        if length > len(nodes) or start < 0 or not ascends or not fits:
            _reject(request, nodes, length, start, slots)


def _reject(request: int, path: list[int], length: int, start: int, slots: int) -> None:
    raise ValueError(
        f"kv_commit: request {request} commits {length} nodes of path {path} at cache_seqlens "
        f"{start}; expected ascending nodes from 1 up, within {slots} slots"
    )


_INDICES = ("accept_path", "accept_len", "cache_seqlens", "new_seqlens")


@jit(do_not_specialize=["P"], do_not_specialize_on_alignment=_INDICES)
def _kv_commit_kernel(
    caches,  # [num_caches] int64 addresses
    accept_path,  # [B, P] int32
    accept_len,  # [B] int32
    cache_seqlens,  # [B] int32
    new_seqlens,  # [B] int32
    P,
    slots,
    stride_batch,  # in words, as the two below
    stride_head,
    stride_slot,
    HEADS: tl.constexpr,
    ROW_WORDS: tl.constexpr,
    WORD: tl.constexpr,
    NODES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    cache = tl.program_id(0)
    request = (tl.program_id(1) // HEADS).to(tl.int64)
    head = (tl.program_id(1) % HEADS).to(tl.int64)
    j = tl.arange(0, NODES)
    start = tl.load(cache_seqlens + request).to(tl.int64)
    length = tl.load(accept_len + request)
    if (cache == 0) & (head == 0) & (tl.program_id(2) == 0):
        tl.store(new_seqlens + request, start.to(tl.int32) + tl.maximum(length, -1) + 1)

    node = tl.load(accept_path + request * P + j, mask=(j < length) & (j < P), other=-1)
    moves = (node > j + 1) & (start >= 0) & (start + node < slots)
    word = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    mask = moves[:, None] & (word < ROW_WORDS)[None, :]

    base = tl.load(caches + cache).to(tl.pointer_type(WORD))
    base += request * stride_batch + head * stride_head
    source = (start + node) * stride_slot
    target = (start + 1 + j) * stride_slot
    rows = tl.load(base + source[:, None] + word[None, :], mask=mask)
    # One row's destination can be another row's source, held by another thread.
    tl.debug_barrier()
    tl.store(base + target[:, None] + word[None, :], rows, mask=mask)


def _geometry(caches: Sequence[torch.Tensor]) -> tuple[int, int, tuple[int, int, int]]:
    """(word bytes, words in a row, strides in words): the widest word that every address allows."""
    size = caches[0].element_size()
    strides = [stride * size for stride in caches[0].stride()[:3]]
    row = caches[0].shape[3] * size
    spread = row
    for number in (*strides, *(cache.data_ptr() for cache in caches)):
        spread |= number
    word = next(bytes_ for bytes_ in (8, 4, 2, 1) if spread % bytes_ == 0)
    return word, row // word, tuple(stride // word for stride in strides)


def launch_commit(
    caches: Sequence[torch.Tensor],
    accept_path: torch.Tensor,
    accept_len: torch.Tensor,
    cache_seqlens: torch.Tensor,
    new_seqlens: torch.Tensor,
) -> None:
    """The Triton kernel on checked arguments; new_seqlens [B] int32 is other memory than its input.

    Some programs read cache_seqlens after another has written new_seqlens.
    """
    batch, heads, slots, _ = caches[0].shape
    word, row_words, strides = _geometry(caches)
    block = 32
    launch(
        _kv_commit_kernel, (len(caches), batch * heads, -(-row_words // block)),
        accept_path.device, address_table(caches), accept_path, accept_len, cache_seqlens,
        new_seqlens, accept_path.shape[1], slots, *strides, HEADS=heads, ROW_WORDS=row_words,
        WORD={1: tl.int8, 2: tl.int16, 4: tl.int32, 8: tl.int64}[word], NODES=64, BLOCK=block,
        num_warps=4,
    )  # fmt: skip


def _triton(
    caches: Sequence[torch.Tensor],
    accept_path: torch.Tensor,
    accept_len: torch.Tensor,
    cache_seqlens: torch.Tensor,
) -> torch.Tensor:
    new_seqlens = torch.empty_like(cache_seqlens)
    launch_commit(caches, accept_path, accept_len, cache_seqlens, new_seqlens)
    return new_seqlens


def _launch_native(
    caches: Sequence[torch.Tensor],
    accept_path: torch.Tensor,
    accept_len: torch.Tensor,
    cache_seqlens: torch.Tensor,
) -> torch.Tensor:
    batch, heads, slots, _ = caches[0].shape
    word, row_words, strides = _geometry(caches)
    sizes = (len(caches), batch, heads, slots, row_words, accept_path.shape[1], word)
    new_seqlens = torch.empty_like(cache_seqlens)
    tensors = (accept_path, accept_len, cache_seqlens, new_seqlens)
    pointers = [tensor.data_ptr() for tensor in tensors]
    device, stream = _native.device_and_stream(accept_path)
    if device >= 0:
        table = address_table(caches).data_ptr()
        _native.module.kv_commit_cuda(table, *pointers, strides, sizes, device, stream)
        return new_seqlens
    addresses = [cache.data_ptr() for cache in caches]
    bad = _native.module.kv_commit_cpu(addresses, *pointers, strides, sizes)
    if bad >= 0:
        _reject(
            bad, accept_path[bad].tolist(), int(accept_len[bad]), int(cache_seqlens[bad]), slots
        )
    return new_seqlens


def check_caches(op: str, caches: Sequence[torch.Tensor], batch: int, device: torch.device) -> None:
    """Raise ValueError unless all caches are alike, [batch, H_kv, S, D] with rows of D together."""
    if not caches:
        raise ValueError(f"{op}: caches is empty, expected at least one [B, H_kv, S, D] tensor")
    first = caches[0]
    shape, strides, dtype = first.shape, first.stride(), first.dtype
    if len(shape) != 4 or shape[0] != batch or 0 in shape:
        raise ValueError(f"{op}: caches[0] has shape {list(shape)}, expected [{batch}, H_kv, S, D]")
    if strides[3] != 1 or strides[2] < shape[3] or first.element_size() not in _WORD_DTYPES:
        raise ValueError(
            f"{op}: caches[0] has strides {strides} and dtype {dtype}, expected rows of D "
            "contiguous elements that do not overlap"
        )
    for index, cache in enumerate(caches):
        same = cache.shape == shape and cache.stride() == strides and cache.dtype == dtype
        if not same or cache.device != device:
            raise ValueError(
                f"{op}: caches[{index}] is {cache.dtype} {list(cache.shape)} with strides "
                f"{cache.stride()} on {cache.device}, expected {dtype} {list(shape)} with strides "
                f"{strides} on {device}"
            )


def _check(
    caches: Sequence[torch.Tensor],
    accept_path: torch.Tensor,
    accept_len: torch.Tensor,
    cache_seqlens: torch.Tensor,
) -> torch.device:
    op, device = "kv_commit", accept_path.device
    check_nodes(op, "accept_path", accept_path)
    batch = accept_path.shape[:1]
    check_tensor(op, "accept_path", accept_path, accept_path.shape, (torch.int32,), device)
    check_tensor(op, "accept_len", accept_len, batch, (torch.int32,), device)
    check_tensor(op, "cache_seqlens", cache_seqlens, batch, (torch.int32,), device)
    check_caches(op, caches, batch[0], device)
    return device


def _fake(
    caches: Sequence[torch.Tensor],
    accept_path: torch.Tensor,
    accept_len: torch.Tensor,
    cache_seqlens: torch.Tensor,
) -> torch.Tensor:
    return torch.empty_like(cache_seqlens)


_OP = register(
    "kv_commit",
    "(Tensor(a!)[] caches, Tensor accept_path, Tensor accept_len, Tensor cache_seqlens,"
    " str backend) -> Tensor",
    check=_check,
    fake=_fake,
    torch=kv_commit_ref,
    cpp=_launch_native,
    triton=_triton,
    cuda=_launch_native,
)


def kv_commit(
    caches: Sequence[torch.Tensor],
    accept_path: torch.Tensor,
    accept_len: torch.Tensor,
    cache_seqlens: torch.Tensor,
    *,
    backend: str = "auto",
) -> torch.Tensor:
    """Move the accepted rows of every cache into place; returns the new lengths.

    Args:
        caches: K and V of all layers, each [B, H_kv, S, D], changed in place. All share one
            shape, dtype, device and set of strides; D is contiguous, other strides are free
            ([B, S, H_kv, D] transposed is fine), and caches do not overlap.
        accept_path: [B, N] int32 from `verify_greedy`: nodes >= 1, ascending, then -1.
        accept_len: [B] int32; -1 leaves the request as it is.
        cache_seqlens: [B] int32, committed rows before this round, the root not counted.
        backend: see `xspec_kernels`.

    Returns:
        [B] int32: cache_seqlens + accept_len + 1. The argument itself is not changed.

    Raises:
        ValueError: a shape, stride, dtype or device is wrong. On CPU tensors also for a path
            that does not ascend or leaves the cache, before any row moves (except under Triton's
            interpreter); on a GPU such rows are skipped, since a check would wait for the device.
    """
    return _OP(list(caches), accept_path, accept_len, cache_seqlens, backend)
