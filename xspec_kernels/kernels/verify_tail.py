"""verify_tail: what follows the target's tokens: accept, publish, commit, advance; two launches.

Decides as `verify_greedy`, moves rows as `kv_commit`, and keeps on the device what the next round
reads: the lengths of the caches and the roots. What the host needs is published before any row
moves, as one record of int64 words a request in device or pinned host memory:

    SEQUENCE    the round's number, stored last, with release order at system scope: a host that
                sees it change may read the rest
    STATUS      0, or the sum of INVALID (the last token comes from a row of NaN and is -1) and
                CACHE_FULL (rows that had no place in the cache were left out)
    NEAR_TIES   tokens whose row's two best logits lie close together
    COUNT       tokens emitted: accepted drafts + 1, or 0 for an idle request
    LENGTH      committed rows, this round's included
    TOKENS ...  the tokens; words behind the last one are left as they are

A row whose logits are NaN matches nothing below it. A row beyond the end of the cache never had its
K and V written (see rope_append), so it counts as absent; the others do not depend on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch

from xspec_kernels import _native
from xspec_kernels._dispatch import check_nodes, check_tensor, register
from xspec_kernels.kernels._verify_tail_triton import launch_accept
from xspec_kernels.kernels.kv_commit import check_caches, kv_commit, launch_commit
from xspec_kernels.kernels.verify_greedy import verify_greedy

SEQUENCE, STATUS, NEAR_TIES, COUNT, LENGTH, TOKENS = range(6)
INVALID, CACHE_FULL = 1, 2
# Flags of a row, as lm_head_argmax gives them.
_NEAR_TIE, _NAN = 1, 2


class TailResult(NamedTuple):
    """What was accepted, for kernels that follow on the device; as in `VerifyResult`."""

    accept_len: torch.Tensor
    accept_path: torch.Tensor


class TailRecord(NamedTuple):
    """A request's record on the host."""

    sequence: int
    status: int
    near_ties: int
    length: int
    tokens: list[int]


def await_record(record: torch.Tensor, request: int, before: int, microseconds: int) -> bool:
    """Look at the SEQUENCE word of one row of a record in host memory until it is not `before`;
    False once the time is over. Other Python threads run meanwhile.
    """
    return _native.await_change(record[request, SEQUENCE], before, microseconds)


def read_record(record: torch.Tensor, request: int = 0) -> TailRecord:
    """Parse one row of a record in host memory, whose SEQUENCE word has been seen to change.

    Raises:
        ValueError: there is no such row, or it is not as `verify_tail` takes it.
    """
    if record.dim() != 2 or not 0 <= request < len(record) or record.shape[1] <= TOKENS:
        raise ValueError(
            f"read_record: record has shape {list(record.shape)}, expected [B, W] with B above "
            f"{request} and W above {TOKENS}"
        )
    words = record[request].tolist()
    return TailRecord(
        words[SEQUENCE],
        words[STATUS],
        words[NEAR_TIES],
        words[LENGTH],
        words[TOKENS : TOKENS + words[COUNT]],
    )


def _compose(
    target_ids: torch.Tensor,
    flags: torch.Tensor,
    token_ids: torch.Tensor,
    parent_idx: torch.Tensor,
    ancestor_bits: torch.Tensor,
    caches: Sequence[torch.Tensor],
    cache_seqlens: torch.Tensor,
    root: torch.Tensor,
    sequence: torch.Tensor,
    record: torch.Tensor,
    num_rows: torch.Tensor | None,
    max_new: torch.Tensor | None,
    *,
    backend: str,
) -> TailResult:
    """The definition, on the ops it is made of."""
    nodes, slots = token_ids.shape[1], caches[0].shape[2]
    node = torch.arange(nodes, device=token_ids.device)
    asked = torch.full_like(cache_seqlens, nodes)
    if num_rows is not None:
        asked = num_rows.clamp(0, nodes)
    room = torch.where(cache_seqlens < 0, 0, slots - cache_seqlens).clamp_min(0)
    rows = torch.minimum(asked, room)

    valid = torch.where(flags == _NAN, -1, target_ids)
    found = verify_greedy(token_ids, parent_idx, valid, ancestor_bits, rows, backend=backend)
    accept_len = found.accept_len
    if max_new is not None:
        accept_len = torch.minimum(accept_len, max_new.clamp_min(0) - 1)
    taken = node < accept_len[:, None]
    accept_path = torch.where(taken, found.accept_path, -1)
    count = accept_len + 1
    last = found.output_ids.gather(1, accept_len.clamp_min(0)[:, None].long())[:, 0]

    ties = (flags == _NEAR_TIE).gather(1, accept_path.clamp_min(0).long()) & taken
    ties = ties.sum(1) + ((flags[:, 0] == _NEAR_TIE) & (count > 0))
    status = INVALID * ((count > 0) & (last < 0)) + CACHE_FULL * (asked > rows)
    root.copy_(torch.where(count > 0, last, root))
    cache_seqlens.copy_(kv_commit(caches, accept_path, accept_len, cache_seqlens, backend=backend))
    sequence += 1
    words = torch.stack((status, ties, count, cache_seqlens), 1).to(record.device)
    emitted = (node < count[:, None]).to(record.device)
    tokens = record[:, TOKENS : TOKENS + nodes]
    tokens.copy_(torch.where(emitted, found.output_ids.to(record.device), tokens))
    record[:, STATUS:TOKENS] = words
    record[:, SEQUENCE] = sequence.to(record.device)
    return TailResult(accept_len, accept_path)


def _empty(target_ids: torch.Tensor, *inputs: object) -> TailResult:
    batch, nodes = target_ids.shape
    new = partial(target_ids.new_empty, dtype=torch.int32)
    return TailResult(new((batch,)), new((batch, nodes)))


def _triton(
    target_ids: torch.Tensor,
    flags: torch.Tensor,
    token_ids: torch.Tensor,
    parent_idx: torch.Tensor,
    ancestor_bits: torch.Tensor,
    caches: Sequence[torch.Tensor],
    cache_seqlens: torch.Tensor,
    *rest: torch.Tensor | None,
) -> TailResult:
    out = _empty(target_ids)
    start = torch.empty_like(cache_seqlens)
    tree = (target_ids, flags, token_ids, parent_idx, ancestor_bits)
    launch_accept(tree, (cache_seqlens, *rest), (*out, start), caches[0].shape[2])
    launch_commit(caches, out.accept_path, out.accept_len, start, cache_seqlens)
    return out


def _check(
    target_ids: torch.Tensor,
    flags: torch.Tensor,
    token_ids: torch.Tensor,
    parent_idx: torch.Tensor,
    ancestor_bits: torch.Tensor,
    caches: Sequence[torch.Tensor],
    cache_seqlens: torch.Tensor,
    root: torch.Tensor,
    sequence: torch.Tensor,
    record: torch.Tensor,
    num_rows: torch.Tensor | None,
    max_new: torch.Tensor | None,
) -> torch.device:
    op, device = "verify_tail", token_ids.device
    check_nodes(op, "token_ids", token_ids)
    batch, nodes = token_ids.shape
    tree, narrow, wide = (batch, nodes), (torch.int32,), (torch.int64,)
    for name, tensor, shape, dtypes in (
        ("token_ids", token_ids, tree, wide),
        ("target_ids", target_ids, tree, wide),
        ("flags", flags, tree, narrow),
        ("parent_idx", parent_idx, tree, narrow),
        ("ancestor_bits", ancestor_bits, tree, wide),
        ("cache_seqlens", cache_seqlens, (batch,), narrow),
        ("root", root, (batch,), wide),
        ("sequence", sequence, (batch,), wide),
        ("num_rows", num_rows, (batch,), narrow),
        ("max_new", max_new, (batch,), narrow),
    ):
        if tensor is not None:
            check_tensor(op, name, tensor, shape, dtypes, device)
    check_caches(op, caches, batch, device)
    words = TOKENS + nodes
    if record.dim() != 2 or record.shape[0] != batch or record.shape[1] < words:
        raise ValueError(
            f"{op}: record has shape {list(record.shape)}, expected [{batch}, W] with W >= {words}"
        )
    pinned = record.device.type == "cpu" and device.type == "cuda" and record.is_pinned()
    check_tensor(op, "record", record, record.shape, wide, record.device if pinned else device)
    return device


_OP = register(
    "verify_tail",
    "(Tensor target_ids, Tensor flags, Tensor token_ids, Tensor parent_idx, Tensor ancestor_bits,"
    " Tensor(a!)[] caches, Tensor(b!) cache_seqlens, Tensor(c!) root, Tensor(d!) sequence,"
    " Tensor(e!) record, Tensor? num_rows, Tensor? max_new, str backend)"
    " -> (Tensor accept_len, Tensor accept_path)",
    check=_check,
    fake=_empty,
    torch=partial(_compose, backend="torch"),
    cpp=partial(_compose, backend="auto"),
    triton=_triton,
)


def verify_tail(
    target_ids: torch.Tensor,
    flags: torch.Tensor,
    token_ids: torch.Tensor,
    parent_idx: torch.Tensor,
    ancestor_bits: torch.Tensor,
    caches: Sequence[torch.Tensor],
    cache_seqlens: torch.Tensor,
    root: torch.Tensor,
    sequence: torch.Tensor,
    record: torch.Tensor,
    num_rows: torch.Tensor | None = None,
    *,
    max_new: torch.Tensor | None = None,
    backend: str = "auto",
) -> TailResult:
    """Accept the longest path, publish its tokens, commit its rows and advance to the next round.

    Args:
        target_ids: [B, N] int64, the target's token after each node, from `lm_head_argmax`.
        flags: [B, N] int32 of the same rows: 0, 1 near tie, 2 NaN.
        token_ids: [B, N] int64, token of each node, N <= 64.
        parent_idx: [B, N] int32, -1 for node 0, a lower index elsewhere.
        ancestor_bits: [B, N] int64 from `tree_mask` of the same parents.
        caches: K and V of all layers as `kv_commit` takes them, changed in place.
        cache_seqlens: [B] int32, committed rows; advanced by the tokens emitted.
        root: [B] int64, set to the last token emitted, the next round's node 0; left as it is
            for an idle request.
        sequence: [B] int64, one more after every round.
        record: [B, W] int64, W >= TOKENS + N, see the module; on the device or pinned.
        num_rows: [B] int32, nodes of each tree, 0 for an idle request; None means N.
        max_new: [B] int32, tokens each request may still emit; a longer path is cut there, 0 makes
            it idle. None means no limit.
        backend: see `xspec_kernels`.

    Raises:
        ValueError: a shape, stride, dtype or device is wrong. A full cache and rows of NaN do not
            raise, see STATUS.
    """
    return TailResult(
        *_OP(
            target_ids, flags, token_ids, parent_idx, ancestor_bits, list(caches), cache_seqlens,
            root, sequence, record, num_rows, max_new, backend,
        )
    )  # fmt: skip
