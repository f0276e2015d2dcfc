"""Which heights of a tree cost no more than lower ones, measured on the target."""

from __future__ import annotations

from statistics import median
from time import perf_counter

import torch

from ..drafters.base import DraftTree
from .base import Target

# A greater height counts as cheaper only beyond this share: less is noise.
NOISE = 0.03


def cheap_heights(
    target: Target, rows: int, prompt_rows: int = 256, repeats: int = 5
) -> tuple[int, ...]:
    """Heights for `SpecConfig.pad_rows` such that filling a tree up never costs time.

    Matrix products of some heights are slower than those of greater ones, which ones depends on the
    machine, its libraries and the model. A height is left out where a greater one up to `rows` was
    measured to be cheaper. The target's cache is overwritten.

    Args:
        rows: the tallest tree, 2..64.
        prompt_rows: committed rows while measuring.
        repeats: forward passes a height, of which the median counts; heights take turns.

    Raises:
        ValueError: `rows` is not in 2..64.
        RuntimeError: `prompt_rows` and the tallest tree do not fit the cache.
    """
    heights = range(2, rows + 1)
    if not 2 <= rows <= 64:
        raise ValueError(f"rows must be in 2..64, got {rows}")
    ids = torch.ones(1, prompt_rows, dtype=torch.long, device=target.device)
    target.prefill({"input_ids": ids})
    target.cache.check_room(rows)
    times: dict[int, list[float]] = {height: [] for height in heights}
    for _ in range(repeats + 1):
        for height in heights:
            times[height].append(_milliseconds(target, height))
    # The first pass of each height is its warm-up.
    return cheapest({height: median(spent[1:]) for height, spent in times.items()})


def cheapest(cost: dict[int, float]) -> tuple[int, ...]:
    """The heights that no greater one undercuts, ascending; `cost` is by height."""
    kept: list[int] = []
    least = float("inf")
    for height in sorted(cost, reverse=True):
        if least >= (1 - NOISE) * cost[height]:
            kept.append(height)
        least = min(least, cost[height])
    return tuple(reversed(kept))


def _milliseconds(target: Target, height: int) -> float:
    tree = DraftTree.chain(1, [1] * (height - 1))
    start = perf_counter()
    logits = target.forward(tree)
    target.accept(tree, logits, [1])
    return 1e3 * (perf_counter() - start)
