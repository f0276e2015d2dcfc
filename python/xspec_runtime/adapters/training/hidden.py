"""Hidden-state adapters and EAGLE fusion, trained on recorded states. Files for a test are opened
by scoring alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from .. import alignment
from ..eagle import EagleConfig, EagleFusion
from ..hidden import READS_DRAFT, HiddenAdapter, HiddenAdapterConfig
from ..scoring.steps import StateAdapter, level_of, predict, score, wanted
from .loop import Progress, Training, fit, run_key
from .states import Batch, States

TERMS = ("mse", "cos", "kl", "ce")
# Published weights of the terms; EAGLE's cross entropy smooths its labels.
PUBLISHED = dict.fromkeys(alignment.STATE_LEVELS, (1.0, 0.5, 0.0, 0.0))
PUBLISHED[alignment.EAGLE] = (0.1, 0.0, 0.5, 1.0)
SMOOTHING = {alignment.EAGLE: 0.1}


@dataclass(frozen=True)
class HiddenTraining(Training):
    """How an adapter is trained; a hidden draft is one of zeros.

    Attributes:
        weights: of `TERMS`, in place of the published ones.
    """

    weights: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises `ValueError` naming the first value out of range."""
        super().__post_init__()
        for name, value in self.weights.items():
            if name not in TERMS or not 0 <= value < math.inf:
                raise ValueError(
                    f"weights are of {', '.join(TERMS)}, 0 or more, got {name}={value}"
                )

    def terms(self, level: str) -> dict[str, float]:
        """The weight of every term for a level.

        Raises:
            ValueError: there is no such level.
        """
        alignment.state_position(level, 0)
        return dict(zip(TERMS, PUBLISHED[level], strict=True)) | dict(self.weights)


def build(level: str, states: States, vocab_size: int, sizes: Mapping[str, int]) -> StateAdapter:
    """An untrained adapter of `level` for these states.

    Raises:
        ValueError: no such level, or a size out of range.
    """
    alignment.state_position(level, 0)
    width, draft_width = states.target.shape[2], states.draft.shape[2]
    try:
        if level == alignment.EAGLE:
            return EagleFusion(
                EagleConfig(vocab_size, token_width=width, draft_width=draft_width, **sizes)
            )
        config = HiddenAdapterConfig(level, width, draft_width, **sizes)
    except TypeError as error:
        raise ValueError(f"{level} has no such size: {error}") from None
    return HiddenAdapter(config)


def weighted_loss(
    adapter: StateAdapter, batch: Batch, head: torch.Tensor, plan: HiddenTraining
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss summed over positions, and the sum of their weights: their ratio is the loss, over
    however many parts of a batch both are summed.
    """
    level = level_of(adapter)
    terms = plan.terms(level)
    predicted, logits = predict(adapter, batch, head)
    states, ids, there = wanted(adapter, batch, predicted.shape[1])
    weight = plan.position_weights(predicted.shape[1]).expand_as(there)[there]
    predicted, states, logits, ids = predicted[there], states[there], logits[there], ids[there]
    loss = torch.zeros_like(weight)
    if terms["mse"]:
        loss = loss + terms["mse"] * (predicted - states).square().mean(-1)
    if terms["cos"]:
        loss = loss + terms["cos"] * (1 - F.cosine_similarity(predicted, states, dim=-1))
    if terms["kl"]:
        said = (states @ head.T).log_softmax(-1)
        missed = F.kl_div(logits.log_softmax(-1), said, reduction="none", log_target=True)
        loss = loss + terms["kl"] * missed.sum(-1)
    if terms["ce"]:
        smooth = SMOOTHING.get(level, 0.0)
        loss = loss + terms["ce"] * F.cross_entropy(
            logits, ids, reduction="none", label_smoothing=smooth
        )
    return (weight * loss).sum(), weight.sum()


@dataclass(frozen=True)
class StateLesson:
    """An adapter and the states it learns from, see `loop.Lesson`."""

    module: StateAdapter
    states: States
    head: torch.Tensor
    plan: HiddenTraining

    @property
    def reads_draft(self) -> bool:
        """Whether the adapter reads the draft's states."""
        return level_of(self.module) in (*READS_DRAFT, alignment.EAGLE)

    def loss(self, rows: torch.Tensor, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `weighted_loss`."""
        batch = self.states.rows(rows).hide(hidden)
        return weighted_loss(self.module, batch, self.head, self.plan)

    def figures(self, rows: torch.Tensor) -> dict[str, Any]:
        """See `score`."""
        return score(self.module, self.states, rows, self.head)


def train_hidden(
    level: str,
    states: States,
    head: torch.Tensor,
    plan: HiddenTraining | None = None,
    sizes: Mapping[str, int] | None = None,
    state: Path | None = None,
    progress: Progress = lambda step, steps, loss: None,
) -> tuple[StateAdapter, list[dict[str, Any]]]:
    """The adapter of the best validation loss, and what every epoch measured.

    Args:
        head: the target's language-model head ``[V, D]``, frozen.
        sizes: of the configuration, beside the states' widths.
        state, progress: see `fit`.

    Raises:
        ValueError: see `build`, `split_rows`, `fit`.
    """
    plan, sizes = plan or HiddenTraining(), dict(sizes or {})
    rows = states.split(plan.held_out)
    torch.manual_seed(plan.seed)
    lesson = StateLesson(build(level, states, head.shape[0], sizes), states, head, plan)
    said = sha256(states.tokens.numpy().tobytes() + head.numpy().tobytes()).hexdigest()
    key = run_key(plan, level, states.digest, said, sizes)
    history = fit(lesson, rows, plan, key, state, progress)
    return lesson.module.requires_grad_(False), history
