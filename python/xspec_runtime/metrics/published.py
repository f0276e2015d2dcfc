"""Figures of https://github.com/xifan-zhang/EventGPT, computed as they were, under its keys, and
what is to be read instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .tokens import consecutive_matches, match_rate, without_bos


def published_run(
    adapted: Sequence[int], target: Sequence[int], shift: int = 0
) -> dict[str, int | float | None]:
    """One run of the TokenAdapter benchmark.

    The adapter's position i predicts token i + 1: `shift` 0 is the published comparison, off by
    one, and 1 the right one. ``acceptance_rate`` is a share of the shorter text.
    """
    overlap = min(len(adapted), len(target[shift:]))
    rate = match_rate(adapted, target, shift)
    return {
        "consecutive_matches": consecutive_matches(adapted, target, shift),
        "total_matches": round((rate or 0.0) * overlap),
        "total_tokens": overlap,
        "acceptance_rate": rate,
    }


def published_acceptance(
    draft: Sequence[int], target: Sequence[int], bos: int | None = 1
) -> dict[str, int | float | str | None]:
    """Position matches of two retokenized texts over the target's length.

    Args:
        bos: this id in front of a text is left out; None keeps it, as was published, which counts
            one match that no model predicted.
    """
    if bos is not None:
        draft, target = without_bos(draft, bos), without_bos(target, bos)
    matched = sum(d == t for d, t in zip(draft, target, strict=False))
    return {
        "acceptance_rate": matched / len(target) if target else None,
        "matched_tokens": matched,
        "total_tokens": len(target),
        "draft_tokens": len(draft),
        "method": "token_level_matching",
    }


class VerifyCost(NamedTuple):
    """Times of a fitted line, in the unit of what was fitted."""

    step: float
    verify: float


def verify_cost(
    decode: Sequence[float], tokens: Sequence[int], accepted: Sequence[int]
) -> VerifyCost:
    """Time of the one verify and of a plain step, from answers that were verified once and then
    decoded plainly.

    Such an answer takes ``tokens - 1 - accepted`` forward passes after its prefill, the first of
    them the verify. Least squares of the decode time on that number: the slope is a step, the line
    at one pass the verify.

    Raises:
        ValueError: fewer than two different numbers of passes, or not as many of everything.
    """
    passes = [n - 1 - a for n, a in zip(tokens, accepted, strict=True)]
    if len(passes) != len(decode) or len(set(passes)) < 2:
        raise ValueError(
            f"the fit needs answers of different lengths, one time each, got {len(decode)} times "
            f"and {len(set(passes))} different numbers of passes"
        )
    mean_x, mean_y = sum(passes) / len(passes), sum(decode) / len(decode)
    spread = sum((x - mean_x) ** 2 for x in passes)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in zip(passes, decode, strict=True)) / spread
    return VerifyCost(slope, mean_y + slope * (1 - mean_x))
