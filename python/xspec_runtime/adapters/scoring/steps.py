"""What adapters of states are worth on recorded answers: tokens first, similarity beside them.

Every state is predicted from true ones, a single step: the upper bound of what a chain can do.
Acceptance of whole chains is measured live, by the end-to-end arms.
"""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F

from ...metrics.similarity import consecutive_similar, cosine, published_similarity
from .. import alignment
from ..eagle import EagleFusion
from ..hidden import READS_DRAFT, HiddenAdapter
from ..training.states import Batch, States

HIGH = 0.9  # the similarity that the research called accepted
FIRST = 16  # positions listed one by one
ROWS = 64
StateAdapter = HiddenAdapter | EagleFusion


def level_of(adapter: StateAdapter) -> str:
    """One of `alignment.STATE_LEVELS`."""
    return alignment.EAGLE if isinstance(adapter, EagleFusion) else adapter.config.level


def predict(
    adapter: StateAdapter, batch: Batch, head: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """States ``[B, P, D]`` that `adapter` predicts and their logits ``[B, P, V]``, one for each
    state it reads; `alignment.state_position` says for which token.
    """
    level = level_of(adapter)
    if level not in alignment.AHEAD:
        states = adapter(draft=batch.draft, mask=batch.has_draft)
        return states, states @ head.T
    width = batch.target.shape[1]
    draft = F.pad(batch.draft[:, :width], (0, 0, 0, max(0, width - batch.draft.shape[1])))
    if level == alignment.EAGLE:
        inner = adapter.fused(batch.tokens.clamp(min=0), draft)
        return adapter.feature(inner), adapter.head(adapter.norm(inner))
    states = adapter(draft=draft if level in READS_DRAFT else None, target=batch.target)
    return states, states @ head.T


def wanted(
    adapter: StateAdapter, batch: Batch, positions: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of every state read: the target state ``[B, P, D]`` and id ``[B, P]`` to predict, and
    whether there is one.
    """
    level = level_of(adapter)
    states = alignment.state_labels(level, batch.target, positions)
    ids = alignment.state_labels(level, batch.tokens + 1, positions) - 1
    there = alignment.state_labels(level, batch.has_target, positions)
    if level not in alignment.AHEAD:
        there = there & batch.has_draft[:, :positions]
    return states, ids.clamp(min=0), there


@torch.inference_mode()
def score(
    adapter: StateAdapter,
    states: States,
    rows: torch.Tensor,
    head: torch.Tensor,
    hide_draft: bool = False,
) -> dict[str, Any]:
    """Figures of `adapter` on some rows of `states`; None where nothing was counted.

    Returns:
        ``token_match``, ``consecutive_tokens`` (right ones from the first predicted on, a mean over
        answers), ``token_match_at`` position, the published similarities, ``consecutive_90``,
        ``match_above_90`` (token match where the cosine is above 0.9) and ``correlation`` of the
        cosine with the match.
    """
    was_training = adapter.training
    adapter.eval()
    parts = list(_compared(adapter, states, rows, head, hide_draft))
    adapter.train(was_training)
    width = max(similarity.shape[1] for similarity, _, _ in parts)
    similarity, match, there = (
        torch.cat([F.pad(part[i], (0, width - part[i].shape[1])) for part in parts])
        for i in range(3)
    )
    lengths = there.sum(1).tolist()
    right, alike = match[there].float(), similarity[there]
    high = right[alike > HIGH]
    spread = right.numel() > 1 and right.std() > 0 and alike.std() > 0
    by_position = [
        match[:, i][there[:, i]].float().mean().item()
        for i in range(min(FIRST, width))
        if there[:, i].any()
    ]
    return {
        "answers": len(rows),
        "tokens": right.numel(),
        "token_match": right.mean().item() if right.numel() else None,
        "consecutive_tokens": (match & there).int().cumprod(1).sum(1).float().mean().item(),
        "token_match_at": by_position,
        **published_similarity(similarity, lengths),
        "consecutive_90": fmean(consecutive_similar(similarity, HIGH, lengths)),
        "match_above_90": high.mean().item() if high.numel() else None,
        "correlation": torch.corrcoef(torch.stack([alike, right]))[0, 1].item() if spread else None,
    }


def _compared(
    adapter: StateAdapter, states: States, rows: torch.Tensor, head: torch.Tensor, hide: bool
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Similarity, whether the token is right, and whether there is one, ``[B, P]`` each; valid
    positions come first in every row.
    """
    for part in rows.split(ROWS):
        batch = states.rows(part)
        if hide:
            batch = batch.hide(torch.ones(len(part), dtype=torch.bool))
        predicted, logits = predict(adapter, batch, head)
        target, ids, there = wanted(adapter, batch, predicted.shape[1])
        yield cosine(predicted, target), logits.argmax(-1) == ids, there
