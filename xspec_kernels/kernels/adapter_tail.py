"""adapter_tail: behind verify_tail, the next round's drafts from an adapter; nobody waits.

    feed    what the target has just said goes where the adapter reads: tokens, or hidden rows of
            the accepted path, take the place of what the draft said at the same positions
    adapter_forward
    pick    of its tokens, those behind the last one known

A composition, not an argument of `verify_tail`: whoever drafts otherwise launches none of this, and
what the host is told stays published before it starts. The place in the answer follows from the
length of the cache, so there is no counter to keep in step.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from xspec_kernels._dispatch import check_tensor, register
from xspec_kernels.kernels._adapter_tail_triton import NO_DRAFT, launch_feed, launch_pick
from xspec_kernels.kernels.adapter_forward import Network, TokenNetwork, adapter_forward
from xspec_kernels.kernels.verify_tail import TailResult
from xspec_kernels.workspace import Workspace


class AdapterFeed(NamedTuple):
    """What an adapter reads of one request, at addresses that stay.

    Attributes:
        fed: [P] int64 tokens or [P, D] states, place i for token i of the answer, or the state that
            predicts it: the draft's, and the target's as far as they are known.
        prompt: [1] int32, rows of the cache before the answer's token 0.
        drafted: [1] int32, places that the draft has filled.
        num_rows: [1] int32, written: places that are filled.
        drafts: [G] int64, written: tokens that may follow the last one known, `NO_DRAFT` where the
            adapter has none.
        ahead: place i predicts token i + ahead of the answer.
    """

    fed: torch.Tensor
    prompt: torch.Tensor
    drafted: torch.Tensor
    num_rows: torch.Tensor
    drafts: torch.Tensor
    ahead: int = 1


def _feed_ref(
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
    """The definition."""
    places, nodes = len(fed), accept_path.shape[1]
    step = torch.arange(nodes, device=fed.device)
    path = accept_path[0].clamp_min(0).long()
    known = cache_seqlens - prompt + 1
    if fed.dim() == 1:
        said = torch.where(step < accept_len, rows.index_select(0, path), root)
    else:
        said = rows.index_select(0, torch.cat([path.new_zeros(1), path[:-1]]))
    # Place i takes emitted token i - start, where there is one.
    index = torch.arange(places, device=fed.device) - (known - accept_len - 1)
    fresh = (index >= 0) & (index <= accept_len)
    taken = said.index_select(0, index.clamp(0, nodes - 1).long())
    fed.copy_(torch.where(fresh.view(-1, *[1] * (fed.dim() - 1)), taken, fed))
    num_rows.copy_(torch.maximum(known, drafted).clamp(1, places))


def _pick_ref(
    ids: torch.Tensor,
    cache_seqlens: torch.Tensor,
    prompt: torch.Tensor,
    num_rows: torch.Tensor,
    drafts: torch.Tensor,
    ahead: int,
) -> None:
    """The definition."""
    step = torch.arange(len(drafts), device=ids.device)
    place = cache_seqlens - prompt + 1 - ahead + step
    there = (place >= 0) & (place < num_rows)
    found = ids.index_select(0, place.clamp(0, len(ids) - 1).long())
    drafts.copy_(torch.where(there, found, NO_DRAFT))


def _check_words(op: str, device: torch.device, **words: torch.Tensor) -> None:
    for name, tensor in words.items():
        check_tensor(op, name, tensor, (1,), (torch.int32,), device)


def _check_feed(
    accept_len: torch.Tensor,
    accept_path: torch.Tensor,
    rows: torch.Tensor,
    root: torch.Tensor,
    cache_seqlens: torch.Tensor,
    prompt: torch.Tensor,
    drafted: torch.Tensor,
    fed: torch.Tensor,
    num_rows: torch.Tensor,
) -> torch.device:
    op, device = "adapter_feed", fed.device
    if fed.dim() not in (1, 2) or 0 in fed.shape:
        raise ValueError(f"{op}: fed has shape {list(fed.shape)}, expected [P] or [P, D]")
    if accept_path.dim() != 2 or not 1 <= accept_path.shape[1] <= 64:
        raise ValueError(f"{op}: accept_path has shape {list(accept_path.shape)}, expected [1, N]")
    nodes = accept_path.shape[1]
    check_tensor(op, "accept_path", accept_path, (1, nodes), (torch.int32,), device)
    check_tensor(op, "root", root, (1,), (torch.int64,), device)
    wanted = (torch.int64,) if fed.dim() == 1 else (rows.dtype,)
    check_tensor(op, "fed", fed, fed.shape, wanted, device)
    check_tensor(op, "rows", rows, (nodes, *fed.shape[1:]), (fed.dtype,), device)
    _check_words(
        op, device, accept_len=accept_len, cache_seqlens=cache_seqlens, prompt=prompt,
        drafted=drafted, num_rows=num_rows,
    )  # fmt: skip
    return device


def _check_pick(
    ids: torch.Tensor,
    cache_seqlens: torch.Tensor,
    prompt: torch.Tensor,
    num_rows: torch.Tensor,
    drafts: torch.Tensor,
    ahead: int,
) -> torch.device:
    op, device = "adapter_pick", ids.device
    for name, tensor, most in (("ids", ids, 2**31), ("drafts", drafts, 64)):
        if tensor.dim() != 1 or not 1 <= len(tensor) <= most:
            raise ValueError(f"{op}: {name} has shape {list(tensor.shape)}, expected 1..{most}")
        check_tensor(op, name, tensor, tensor.shape, (torch.int64,), device)
    if ahead not in (0, 1):
        raise ValueError(f"{op}: ahead is {ahead}, expected 0 or 1")
    _check_words(op, device, cache_seqlens=cache_seqlens, prompt=prompt, num_rows=num_rows)
    return device


_FEED = register(
    "adapter_feed",
    "(Tensor accept_len, Tensor accept_path, Tensor rows, Tensor root, Tensor cache_seqlens,"
    " Tensor prompt, Tensor drafted, Tensor(a!) fed, Tensor(b!) num_rows, str backend) -> ()",
    check=_check_feed,
    fake=lambda *_: None,
    torch=_feed_ref,
    triton=launch_feed,
)
_PICK = register(
    "adapter_pick",
    "(Tensor ids, Tensor cache_seqlens, Tensor prompt, Tensor num_rows, Tensor(a!) drafts,"
    " int ahead, str backend) -> ()",
    check=_check_pick,
    fake=lambda *_: None,
    torch=_pick_ref,
    triton=launch_pick,
)


def adapter_tail(
    network: Network,
    feed: AdapterFeed,
    tail: TailResult,
    rows: torch.Tensor,
    root: torch.Tensor,
    cache_seqlens: torch.Tensor,
    *,
    round_to: torch.dtype | None = None,
    workspace: Workspace | None = None,
    backend: str = "auto",
) -> None:
    """Feed what a round of one request emitted, run the adapter, pick the next drafts.

    Args:
        network: of `adapter_forward`.
        feed: of the request; `fed`, `num_rows` and `drafts` are written.
        tail: what `verify_tail` returned, B = 1.
        rows: [N] int64, the `token_ids` of the round, or [N, D], the hidden rows of its nodes.
        root, cache_seqlens: as `verify_tail` left them.
        round_to, workspace, backend: as of `adapter_forward`.

    Raises:
        ValueError: a shape, dtype or device is wrong, or a network of tokens is fed states.
    """
    if isinstance(network, TokenNetwork) != (feed.fed.dim() == 1):
        raise ValueError(
            f"adapter_tail: a {type(network).__name__} and fed of shape {list(feed.fed.shape)}"
        )
    _FEED(
        *tail, rows, root, cache_seqlens, feed.prompt, feed.drafted, feed.fed, feed.num_rows,
        backend,
    )  # fmt: skip
    found = adapter_forward(
        network, feed.fed, feed.num_rows, round_to=round_to, workspace=workspace, backend=backend
    )
    pick_drafts(found.ids, feed, cache_seqlens, backend=backend)


def pick_drafts(
    ids: torch.Tensor, feed: AdapterFeed, cache_seqlens: torch.Tensor, *, backend: str = "auto"
) -> None:
    """The last step of `adapter_tail`, of tokens that lie there already: of an adapter that does
    not read what the target says, which runs once a request.

    Args:
        ids: [P] int64, what `adapter_forward` made of `feed.fed`.
        feed: `drafts` is written.
        cache_seqlens: [1] int32, as `verify_tail` left it.

    Raises:
        ValueError: a shape, dtype or device is wrong.
    """
    _PICK(ids, cache_seqlens, feed.prompt, feed.num_rows, feed.drafts, feed.ahead, backend)
