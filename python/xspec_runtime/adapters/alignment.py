"""Which position predicts which: the one place that training, evaluation and runtime ask.

The target's first token comes from its prefill and is given. Position i of what an adapter reads
(the draft's text, or the target's own prefix) therefore predicts token i + 1 of the target's
answer. Comparing the prediction with token i instead costs nearly all acceptance.

State i of a model is the row that predicts token i of its answer. What is made of the draft's state
i stands for the target's state i; what is made of the target's own states up to i, for state i + 1,
since state i is in the input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch

from .hidden import LEVELS, READS_TARGET

T = TypeVar("T")
EAGLE = "EAGLE"
STATE_LEVELS = (*LEVELS, EAGLE)
AHEAD = (*READS_TARGET, EAGLE)


def target_position(position: int) -> int:
    """The index in the target's answer that input position `position` predicts."""
    return position + 1


def state_position(level: str, position: int) -> int:
    """The index in the target's answer that an adapter of `level` predicts at state `position`.

    Raises:
        ValueError: the level is none of `STATE_LEVELS`.
    """
    if level not in STATE_LEVELS:
        raise ValueError(f"level must be one of {', '.join(STATE_LEVELS)}, got {level!r}")
    return target_position(position) if level in AHEAD else position


def state_labels(level: str, rows: torch.Tensor, positions: int) -> torch.Tensor:
    """What each of `positions` states read has to predict.

    Args:
        rows: one for each token of the answers, ``[B, T, ...]``: states, ids, or whether it is.

    Returns:
        ``[B, positions, ...]``; zeros where the answer has no such token.
    """
    first = state_position(level, 0)
    out = rows.new_zeros(len(rows), positions, *rows.shape[2:])
    held = rows[:, first : first + positions]
    out[:, : held.shape[1]] = held
    return out


def labels(answers: torch.Tensor, positions: int, pad: int) -> torch.Tensor:
    """What each of `positions` input positions has to predict.

    Args:
        answers: target ids ``[B, L]``, `pad` behind.

    Returns:
        Ids ``[B, positions]``; `pad` where the answer has no such token.
    """
    first = target_position(0)
    out = answers.new_full((answers.shape[0], positions), pad)
    held = answers[:, first : first + positions]
    out[:, : held.shape[1]] = held
    return out


def continuation(
    predictions: Sequence[T], known: int, count: int, level: str | None = None
) -> Sequence[T]:
    """Predictions for `count` tokens of the answer behind its first `known`; fewer at the end.

    Args:
        predictions: one for each input position, from position 0 on.
        level: of an adapter that reads states; None: tokens were read.

    Raises:
        ValueError: no position predicts the token behind `known`.
    """
    position = known - (state_position(level, 0) if level else target_position(0))
    if position < 0:
        raise ValueError(f"the first token of an answer is given; got {known} known tokens")
    return predictions[position : position + count]
