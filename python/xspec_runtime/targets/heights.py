"""Time of a verify by its height, and the heights that cost no more than lower ones."""

from __future__ import annotations

from collections.abc import Iterable
from math import inf
from time import perf_counter

import torch

from ..drafters.base import MAX_ROWS, DraftTree
from .base import Target

# A greater height counts as cheaper only beyond this share: less is noise.
NOISE = 0.03
CONTEXT = 64  # committed rows while measuring


def verify_seconds(
    target: Target, heights: Iterable[int], prompt_rows: int = CONTEXT, repeats: int = 5
) -> dict[int, float]:
    """Seconds of a verify by its rows: the fastest of `repeats` after a warm-up, heights in turns.

    The target's cache is overwritten.

    Raises:
        ValueError: a height is not in 1..64.
        RuntimeError: `prompt_rows` and the tallest tree do not fit the cache.
    """
    heights = sorted(set(heights))
    for height in heights:
        if not 1 <= height <= MAX_ROWS:
            raise ValueError(f"rows must be in 1..{MAX_ROWS}, got {height}")
    ids = torch.ones(1, prompt_rows, dtype=torch.long, device=target.device)
    target.prefill({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    target.cache.check_room(max(heights))
    times = dict.fromkeys(heights, inf)
    for repeat in range(repeats + 1):
        for height in heights:
            seconds = _seconds(target, height)
            if repeat:
                times[height] = min(times[height], seconds)
    return times


def cheap_heights(
    target: Target, rows: int, prompt_rows: int = 256, repeats: int = 5
) -> tuple[int, ...]:
    """Heights for `SpecConfig.pad_rows` such that filling a tree up never costs time.

    Matrix products of some heights are slower than those of greater ones, which ones depends on the
    machine, its libraries and the model. A height is left out where a greater one up to `rows` was
    measured to be cheaper. The target's cache is overwritten.

    Args:
        rows: the tallest tree, 2..64.
        prompt_rows, repeats: see `verify_seconds`, which says what else is raised.

    Raises:
        ValueError: `rows` is not in 2..64.
    """
    if not 2 <= rows <= MAX_ROWS:
        raise ValueError(f"rows must be in 2..{MAX_ROWS}, got {rows}")
    return cheapest(verify_seconds(target, range(2, rows + 1), prompt_rows, repeats))


def cheapest(cost: dict[int, float]) -> tuple[int, ...]:
    """The heights that no greater one undercuts, ascending; `cost` is by height."""
    kept: list[int] = []
    least = inf
    for height in sorted(cost, reverse=True):
        if least >= (1 - NOISE) * cost[height]:
            kept.append(height)
        least = min(least, cost[height])
    return tuple(reversed(kept))


def _seconds(target: Target, height: int) -> float:
    # Every parent has two children: a chain may be deeper than the target takes.
    parents = [(i - 1) // 2 for i in range(height)]
    tree = DraftTree([1 + i % 2 for i in range(height)], parents, [1.0] * height)
    start = perf_counter()
    target.accept(tree, target.forward(tree), [1])
    return perf_counter() - start
