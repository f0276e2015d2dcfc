"""The decision on verified trees: what is accepted, what is emitted, how close it was.

Greedy, or where `Draws` are given, sampled; a sampled token is never counted as a near tie.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers import LogitsProcessorList

from xspec_kernels import VerifyResult, ranges, tree_mask, verify_greedy

from ..drafters.base import MAX_ROWS, DraftTree
from .sampling import Draws


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
        invalid: the logits on the accepted path were NaN; nothing else here means anything.
    """

    tokens: list[int]
    accepted: int
    near_ties: int
    path: torch.Tensor | None = None
    length: torch.Tensor | None = None
    drafted: int = 0
    invalid: bool = False

    def checked(self, owner: str = "target") -> Verdict:
        """This verdict, on a model that messages call `owner`.

        Raises:
            RuntimeError: it is invalid.
        """
        if self.invalid:
            raise RuntimeError(f"the {owner}'s logits are NaN: its weights or inputs are damaged")
        return self


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
    logits: torch.Tensor, laid: TreeRows, backend: str = "auto", draws: Draws | None = None
) -> tuple[list[Verdict], VerifyResult]:
    """Verdicts on B trees from logits ``[B, N, V]``; the device's result comes along, for
    `kv_commit`. They may be invalid.
    """
    batch, rows = logits.shape[:2]
    if draws:
        result, ties = draws.verify(logits, laid), torch.zeros_like(laid.tokens)
    else:
        best, ties = logits.argmax(-1), row_flags(logits)
        result = verify_greedy(
            laid.tokens, laid.parents, best, laid.bits, laid.num_rows, backend=backend
        )
    # All the host needs comes in one copy, here and below: one wait a round.
    parts = (result.accept_len[:, None], result.accept_path, result.output_ids, ties)
    verdicts = []
    for accepted, *rest in _read(torch.cat(parts, 1)):
        path, emitted, flags = rest[:rows], rest[rows : 2 * rows], rest[2 * rows :]
        way = [flags[node] for node in (0, *path[:accepted])]
        verdicts.append(_verdict(emitted[: accepted + 1], way))
    if batch == 1:
        verdicts[0].path, verdicts[0].length = result.accept_path, result.accept_len
    return verdicts, result


def decide_steps(logits: torch.Tensor, draws: Draws | None = None) -> list[Verdict]:
    """Verdicts on single rows, logits ``[B, V]``: plain decoding. They may be invalid."""
    pairs = _read(torch.stack(_next_tokens(logits, draws), 1))
    return [_verdict([token], [flag]) for token, flag in pairs]


def walk(
    tree: DraftTree,
    logits: torch.Tensor,
    prefix: torch.Tensor,
    processor: LogitsProcessorList,
    draws: Draws | None = None,
) -> Verdict:
    """The decision where what follows a node depends on the tokens before it: node by node. It may
    be invalid.

    Args:
        logits: ``[N, V]``.
        prefix: ids ``[1, L]`` of prompt and answer, the root's included.
    """
    path, emitted, flags = [0], [], []
    while True:
        scores = processor(prefix, logits[path[-1]][None].to(torch.float32, copy=True))
        here = draws and draws.after(len(emitted))
        ((token, flag),) = _read(torch.stack(_next_tokens(scores, here), 1))
        emitted.append(token)
        flags.append(flag)
        child = tree.child(path[-1], token)
        if child is None:
            break
        path.append(child)
        prefix = torch.cat([prefix, prefix.new_tensor([[token]])], 1)
    accepted = torch.tensor([path[1:]], dtype=torch.int32, device=logits.device)
    length = torch.tensor([len(path) - 1], dtype=torch.int32, device=logits.device)
    verdict = _verdict(emitted, flags)
    verdict.path, verdict.length = accepted, length
    return verdict


def _next_tokens(logits: torch.Tensor, draws: Draws | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, flags) after rows of logits ``[B, V]``."""
    if draws is None:
        return logits.argmax(-1), row_flags(logits)
    tokens = draws.tokens(logits)
    return tokens, torch.zeros_like(tokens)


def row_flags(logits: torch.Tensor) -> torch.Tensor:
    """int64 ``[...]`` for logits ``[..., V]``: 1 where the best two lie within 2 ulp, 2 for NaN."""
    best, second = logits.topk(2, dim=-1).values.unbind(-1)
    ulp = torch.finfo(logits.dtype).eps * torch.exp2(best.abs().clamp_min(1e-30).log2().floor())
    return torch.where(best.isnan(), 2, (best - second < 2 * ulp).long())


def _verdict(tokens: list[int], flags: Sequence[int]) -> Verdict:
    """Of emitted tokens with their flags; argmax would silently pick a NaN's place, a draw is -1
    there.
    """
    invalid = 2 in flags or tokens[-1] < 0
    return Verdict(tokens, len(tokens) - 1, flags.count(1), invalid=invalid)


def _read(values: torch.Tensor) -> list:
    """One copy to the host, which waits for the device."""
    with ranges.range_("readback", values.numel()):
        return values.tolist()


def check_ids(inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """`input_ids` of one request.

    Raises:
        ValueError: there are none, or they are no integers ``[1, L]``.
    """
    ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else None
    if not isinstance(ids, torch.Tensor):
        raise ValueError(
            'inputs must be a mapping with a tensor under "input_ids", got '
            f"{type(inputs if ids is None else ids).__name__}"
        )
    if ids.dim() != 2 or ids.shape[0] != 1 or not ids.shape[1]:
        raise ValueError(f"input_ids must be [1, length], got shape {tuple(ids.shape)}")
    if ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"input_ids must be int64 or int32, got {ids.dtype}")
    return ids
