"""Which position predicts which: the one place that training, evaluation and runtime ask.

The target's first token comes from its prefill and is given. Position i of what an adapter reads
(the draft's text, or the target's own prefix) therefore predicts token i + 1 of the target's
answer. Comparing the prediction with token i instead costs nearly all acceptance.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch

T = TypeVar("T")


def target_position(position: int) -> int:
    """The index in the target's answer that input position `position` predicts."""
    return position + 1


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


def continuation(predictions: Sequence[T], known: int, count: int) -> Sequence[T]:
    """Predictions for `count` tokens of the answer behind its first `known`; fewer at the end.

    Args:
        predictions: one for each input position, from position 0 on.

    Raises:
        ValueError: `known` is 0; no position predicts the first token.
    """
    position = known - target_position(0)
    if position < 0:
        raise ValueError(f"the first token of an answer is given; got {known} known tokens")
    return predictions[position : position + count]
