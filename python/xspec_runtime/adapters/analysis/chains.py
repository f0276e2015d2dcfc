"""Chains of an adapter of states on recorded answers: acceptance by predicted features, rounds
replayed, and the viability targets of the research.

A chain begins behind the first k tokens of an answer and proposes the next ones as the runtime's
drafter does: B1 and L5F read the target's states of those tokens, then their own predictions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from .. import alignment
from ..hidden import READS_DRAFT, READS_TARGET
from ..scoring.steps import StateAdapter, level_of, predict, wanted
from ..training.states import Batch, States
from .steps import run_lengths

GROUP = 8  # answers whose chains are kept at once
CHAINS = 32  # chains a pass
# https://github.com/xifan-zhang/EventGPT, feasible/token_alignment: target metrics for viability.
TARGETS = {
    "consecutive_match_rate": 0.5,
    "tokens_accepted": 3.0,
    "first_token": 0.7,
    "speedup": 1.5,
}


@dataclass(frozen=True)
class Chains:
    """A chain behind the first k tokens of every answer, ``[N, T]`` by k; zeros where there is
    none.

    Attributes:
        accepted: drafts that are right, from the first on.
        reach: drafts that have a token of the answer to be compared with.
        proposed: drafts, those behind the answer's end included.
        lengths: of the answers, ``[N]``.
    """

    accepted: torch.Tensor
    reach: torch.Tensor
    proposed: torch.Tensor
    lengths: torch.Tensor


@torch.inference_mode()
def chains(
    adapter: StateAdapter,
    states: States,
    head: torch.Tensor,
    gamma: int = 5,
    hide_draft: bool = False,
    progress: Callable[[int, int], None] = lambda done, count: None,
) -> Chains:
    """The chain of at most `gamma` drafts behind every prefix of every answer.

    Arguments as of `analysis.compare`.

    Raises:
        ValueError: `gamma` is below 1.
    """
    if gamma < 1:
        raise ValueError(f"gamma must be at least 1, got {gamma}")
    was_training, level = adapter.training, level_of(adapter)
    adapter.eval()
    accepted = []
    for rows in torch.arange(len(states)).split(GROUP):
        batch = states.rows(rows)
        if hide_draft:
            batch = _hidden(batch)
        part = _rolled_out if level in READS_TARGET else _in_place
        accepted.append(part(adapter, batch, head, gamma))
        progress(int(rows[-1]) + 1, len(states))
    adapter.train(was_training)
    known = torch.arange(states.target.shape[1])
    lengths, positions = states.lengths[:, 1], adapter.config.positions
    begins = (known >= 1) & (known < lengths[:, None])
    if level in alignment.AHEAD:
        room = (positions + 1 - known).expand(len(lengths), -1)
    else:
        read = torch.full_like(lengths, positions) if hide_draft else states.lengths[:, 0]
        room = read.clamp(max=positions)[:, None] - known
    proposed = room.clamp(0, gamma) * begins
    reach = torch.minimum(proposed, (lengths[:, None] - known).clamp(min=0))
    return Chains(torch.minimum(torch.cat(accepted), reach), reach, proposed, lengths)


def predicted_features(found: Chains, gamma: int = 5) -> list[dict[str, float | int | None]]:
    """n-alpha as EAGLE (https://arxiv.org/abs/2401.15077) defines it, n from 0 to `gamma` - 1: the
    share accepted of drafts whose chain holds n predicted features before them, counted where all
    n drafts before were accepted. Chains begin behind every token of every answer.

    B1 and L5F read those predictions. The other levels read none: for them n is the draft's place
    in its chain.

    Returns:
        ``n``, ``drafts`` counted, ``accepted`` of them and their share ``alpha``, None without any.
    """
    points = []
    for n in range(gamma):
        tried = (found.reach > n) & (found.accepted >= n)
        drafts, held = int(tried.sum()), int((tried & (found.accepted > n)).sum())
        alpha = held / drafts if drafts else None
        points.append({"n": n, "drafts": drafts, "accepted": held, "alpha": alpha})
    return points


def replay(found: Chains) -> dict[str, float | int | None]:
    """Rounds of greedy decoding: a verify of the chain behind what is known, its accepted drafts
    and one more token become known, until the answer is over.

    Returns:
        ``verifies``; ``acceptance_rate``, accepted of all proposed; ``tokens_accepted`` a verify;
        ``tokens_per_verify`` behind the given first token; ``first_token``, the share of answers
        whose first draft is accepted. None where nothing was counted.
    """
    verifies = accepted = proposed = 0
    known = torch.ones_like(found.lengths)
    rows = torch.arange(len(known))
    while len(rows := rows[known[rows] < found.lengths[rows]]):
        taken = found.accepted[rows, known[rows]]
        verifies += len(rows)
        accepted += int(taken.sum())
        proposed += int(found.proposed[rows, known[rows]].sum())
        known[rows] += taken + 1
    begun = found.lengths > 1
    first = found.accepted[begun, 1] > 0 if begun.any() else begun[:0]
    tokens = int((found.lengths - 1).sum())
    return {
        "verifies": verifies,
        "acceptance_rate": accepted / proposed if proposed else None,
        "tokens_accepted": accepted / verifies if verifies else None,
        "tokens_per_verify": tokens / verifies if verifies else None,
        "first_token": first.float().mean().item() if len(first) else None,
    }


def viability(
    replayed: Mapping[str, Any], speedup: float | None = None
) -> dict[str, dict[str, float | bool | None]]:
    """The research's four targets: `TARGETS`, the figure here and whether it is met; None where it
    was not measured.

    Args:
        replayed: what `replay` gives.
        speedup: of whole requests against the target alone, measured end to end.
    """
    figures = {
        "consecutive_match_rate": replayed["acceptance_rate"],
        "tokens_accepted": replayed["tokens_accepted"],
        "first_token": replayed["first_token"],
        "speedup": speedup,
    }
    return {
        name: {"target": target, "value": figures[name],
               "met": None if figures[name] is None else figures[name] >= target}
        for name, target in TARGETS.items()
    }  # fmt: skip


def _hidden(batch: Batch) -> Batch:
    """Zeros for the draft at every position of the answer, as the drafter gives them."""
    shape = (*batch.tokens.shape, batch.draft.shape[2])
    there = torch.ones(shape[:2], dtype=torch.bool)
    zeros = batch.draft.new_zeros(shape)
    return Batch(zeros, batch.target, there, batch.has_target, batch.tokens)


def _in_place(adapter: StateAdapter, batch: Batch, head: torch.Tensor, gamma: int) -> torch.Tensor:
    """Accepted drafts ``[B, T]`` by known tokens, where no prediction is read: a draft behind right
    ones is what a single step gives.
    """
    logits = predict(adapter, batch, head)[1]
    _, ids, there = wanted(adapter, batch, logits.shape[1])
    first = alignment.state_position(level_of(adapter), 0)
    runs = F.pad(run_lengths((logits.argmax(-1) == ids) & there).clamp(max=gamma), (first, 0))
    width = batch.tokens.shape[1]
    return F.pad(runs[:, :width], (0, max(0, width - runs.shape[1])))


def _rolled_out(
    adapter: StateAdapter, batch: Batch, head: torch.Tensor, gamma: int
) -> torch.Tensor:
    """The same where an adapter reads its own predictions behind the first draft."""
    width = batch.tokens.shape[1]
    lengths = batch.has_target.sum(1)
    place = torch.arange(width)
    row, known = ((place >= 1) & (place < lengths[:, None])).nonzero().T
    accepted = torch.zeros(len(lengths), width, dtype=torch.long)
    own = batch.target.new_zeros(len(row), gamma, batch.target.shape[2])
    own[:, 0] = predict(adapter, batch, head)[0][row, known - 1]
    alive = torch.arange(len(row))
    for step in range(gamma):
        at = known[alive] + step
        hit = (own[alive, step] @ head.T).argmax(-1) == batch.tokens[row[alive], at]
        accepted[row[alive], known[alive]] += hit
        alive = alive[hit & (at + 1 < lengths[row[alive]])]
        if step + 1 == gamma or not len(alive):
            break
        # Chains of like length pass together.
        alive = alive[known[alive].argsort()]
        for part in alive.split(CHAINS):
            own[part, step + 1] = _next(adapter, batch, row[part], known[part], own[part], step)
    return accepted


def _next(
    adapter: StateAdapter,
    batch: Batch,
    row: torch.Tensor,
    known: torch.Tensor,
    own: torch.Tensor,
    step: int,
) -> torch.Tensor:
    """The state ``[C, D]`` behind `known` true ones and the first ``step + 1`` of `own`."""
    longest = int(known.max()) + step + 1
    target = batch.target[row, :longest].clone()
    chain = torch.arange(len(row))
    for j in range(step + 1):
        target[chain, known + j] = own[:, j]
    draft = None
    if level_of(adapter) in READS_DRAFT:
        held = batch.draft[row, :longest]
        draft = F.pad(held, (0, 0, 0, longest - held.shape[1]))
    return adapter(draft=draft, target=target)[chain, known + step]
