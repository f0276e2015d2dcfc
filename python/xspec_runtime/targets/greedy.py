"""The greedy decision on verified trees: what is accepted, what is emitted, how close it was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers import LogitsProcessorList

from xspec_kernels import VerifyResult, ranges, tree_mask, verify_greedy

from ..drafters.base import MAX_ROWS, DraftTree


@dataclass(slots=True)
class Verdict:
    """What one verify decided.

    Attributes:
        tokens: emitted tokens, accepted ones and then the recovered or bonus token.
        accepted: accepted draft tokens.
        near_ties: emitted tokens whose two best logits lay within 2 ulp.
        path, length: the accepted path and its length on the device; absent for a single row and
            for a request of a batch.
        drafted: draft tokens that were verified in a prefill.
    """

    tokens: list[int]
    accepted: int
    near_ties: int
    path: torch.Tensor | None = None
    length: torch.Tensor | None = None
    drafted: int = 0


class TreeRows(NamedTuple):
    """Draft trees as tensors; rows past a tree's own are inert and can never be accepted.

    Attributes:
        tokens: int64 ``[B, N]``.
        parents: int32 ``[B, N]``, as the op `tree_mask` takes them.
        bits: int64 ``[B, N]``, the ancestors of every row.
        depth: int32 ``[B, N]``.
        num_rows: int32 ``[B]``, the rows of each tree; None: all N.
    """

    tokens: torch.Tensor
    parents: torch.Tensor
    bits: torch.Tensor
    depth: torch.Tensor
    num_rows: torch.Tensor | None


def lay_out(
    trees: Sequence[DraftTree], rows: int, device: torch.device, backend: str = "auto"
) -> TreeRows:
    """`trees` side by side, each filled up to `rows` (at least its own) with inert rows.

    An inert row is a copy of the root below the root: its attention has something to look at, so
    what it writes is finite.
    """
    if all(len(tree) == rows for tree in trees):
        tokens, parents = [t.tokens for t in trees], [t.parent_idx for t in trees]
        num_rows = None
    else:
        tokens = [t.tokens + t.tokens[:1] * (rows - len(t)) for t in trees]
        parents = [t.parent_idx + [0] * (rows - len(t)) for t in trees]
        num_rows = torch.tensor([len(t) for t in trees], dtype=torch.int32, device=device)
    parents = torch.tensor(parents, dtype=torch.int32, device=device)
    mask = tree_mask(parents, max_depth=MAX_ROWS, backend=backend)
    tokens = torch.tensor(tokens, device=device)
    return TreeRows(tokens, parents, mask.ancestor_bits, mask.depth, num_rows)


def decide(
    logits: torch.Tensor, laid: TreeRows, backend: str = "auto"
) -> tuple[list[Verdict], VerifyResult]:
    """Verdicts on B trees from logits ``[B, N, V]``; the device's result comes along, for
    `kv_commit`.

    Raises:
        RuntimeError: the logits are NaN on an accepted path.
    """
    batch, rows = logits.shape[:2]
    best, ties = logits.argmax(-1), row_flags(logits)
    result = verify_greedy(
        laid.tokens, laid.parents, best, laid.bits, laid.num_rows, backend=backend
    )
    # All the host needs comes in one copy, here and below: one wait a round.
    parts = (result.accept_len[:, None], result.accept_path, result.output_ids, ties)
    verdicts = []
    for accepted, *rest in _read(torch.cat(parts, 1)):
        path, emitted, flags = rest[:rows], rest[rows : 2 * rows], rest[2 * rows :]
        count = count_ties([flags[node] for node in (0, *path[:accepted])])
        verdicts.append(Verdict(emitted[: accepted + 1], accepted, count))
    if batch == 1:
        verdicts[0].path, verdicts[0].length = result.accept_path, result.accept_len
    return verdicts, result


def decide_steps(logits: torch.Tensor) -> list[Verdict]:
    """Verdicts on single rows, logits ``[B, V]``: plain decoding. Raises like `decide`."""
    pairs = _read(torch.stack((logits.argmax(-1), row_flags(logits)), 1))
    return [Verdict([token], 0, count_ties([flag])) for token, flag in pairs]


def walk(
    tree: DraftTree,
    logits: torch.Tensor,
    prefix: torch.Tensor,
    processor: LogitsProcessorList,
) -> Verdict:
    """The decision where what follows a node depends on the tokens before it: node by node.

    Args:
        logits: ``[N, V]``.
        prefix: ids ``[1, L]`` of prompt and answer, the root's included.

    Raises:
        RuntimeError: the logits are NaN on the accepted path.
    """
    path, emitted, flags = [0], [], []
    while True:
        scores = processor(prefix, logits[path[-1]][None].to(torch.float32, copy=True))
        token, flag = _read(torch.stack((scores.argmax(), row_flags(scores)[0])))
        emitted.append(token)
        flags.append(flag)
        child = tree.child(path[-1], token)
        if child is None:
            break
        path.append(child)
        prefix = torch.cat([prefix, prefix.new_tensor([[token]])], 1)
    accepted = torch.tensor([path[1:]], dtype=torch.int32, device=logits.device)
    length = torch.tensor([len(path) - 1], dtype=torch.int32, device=logits.device)
    return Verdict(emitted, len(path) - 1, count_ties(flags), accepted, length)


def row_flags(logits: torch.Tensor) -> torch.Tensor:
    """int64 ``[...]`` for logits ``[..., V]``: 1 where the best two lie within 2 ulp, 2 for NaN."""
    best, second = logits.topk(2, dim=-1).values.unbind(-1)
    ulp = torch.finfo(logits.dtype).eps * torch.exp2(best.abs().clamp_min(1e-30).log2().floor())
    return torch.where(best.isnan(), 2, (best - second < 2 * ulp).long())


def count_ties(flags: Sequence[int]) -> int:
    """Near ties among `flags`; argmax would silently pick a NaN's place, so that is an error."""
    if 2 in flags:
        raise RuntimeError("the target's logits are NaN: its weights or inputs are damaged")
    return sum(flags)


def _read(values: torch.Tensor) -> list:
    """One copy to the host, which waits for the device."""
    with ranges.range_("readback", values.numel()):
        return values.tolist()


def check_ids(inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """`input_ids` of one request.

    Raises:
        ValueError: they are not ``[1, L]``.
    """
    ids = inputs["input_ids"]
    if ids.dim() != 2 or ids.shape[0] != 1:
        raise ValueError(f"input_ids must be [1, length], got shape {tuple(ids.shape)}")
    return ids
