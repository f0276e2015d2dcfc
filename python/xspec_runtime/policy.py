"""How many rows of a proposal are worth their time: bounded regret for any drafter."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import inf
from time import perf_counter

import torch

from .drafters.base import MAX_ROWS, Drafter, DraftTree, Request
from .targets.base import Target

HEIGHTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # rows that are timed; linear between them
REPEATS = 5
CONTEXT = 64  # tokens in the cache meanwhile
RETRY = 0.02  # part of plain decoding's time that failing drafts may cost for ever
CREDIT = 8.0  # plain steps saved that may be lost again


def row_costs(target: Target, rows: int = MAX_ROWS) -> list[float]:
    """Time of a verify of 1, 2, ... `rows` rows, relative to a single row.

    Measured on `target` (the fastest of a few runs each); what its cache holds is lost.

    Raises:
        ValueError: `rows` is not in 1..64.
    """
    if not 1 <= rows <= MAX_ROWS:
        raise ValueError(f"rows must be in 1..{MAX_ROWS}, got {rows}")
    prompt = torch.ones(1, CONTEXT, dtype=torch.long, device=target.device)
    target.prefill({"input_ids": prompt, "attention_mask": torch.ones_like(prompt)})
    heights = sorted({rows, *(height for height in HEIGHTS if height <= rows)})
    times = dict.fromkeys(heights, inf)
    for _ in range(REPEATS):
        for height in heights:
            tree = DraftTree.chain(1, [1] * (height - 1))
            start = perf_counter()
            target.accept(tree, target.forward(tree), [1])
            times[height] = min(times[height], perf_counter() - start)
    found = [times[1]]
    for low, high in pairwise(heights):
        slope = (times[high] - times[low]) / (high - low)
        found += [times[low] + slope * step for step in range(1, high - low + 1)]
    return [time / times[1] for time in found]


def worthwhile(tree: DraftTree, costs: Sequence[float]) -> DraftTree:
    """The best rows of `tree`, as many as give the most expected tokens per time; the root alone
    where no draft is worth a taller verify.

    Args:
        tree: its scores are the chances that paths are accepted.
        costs: time of a verify of 1, 2, ... rows, any unit; trees are cut to its length.
    """
    best = 1.0 / costs[0]
    tokens, rows = 1.0, 1
    for height, score in enumerate(sorted(tree.scores[1:], reverse=True)[: len(costs) - 1], 2):
        tokens += score
        expected = tokens / costs[height - 1]
        if expected > best:
            best, rows = expected, height
    return tree.best(rows)


class PricedDrafter:
    """Proposes what is worth verifying of what another drafter proposes, on any text.

    Whatever the target says, from any moment on all rounds together cost at most 1 + `RETRY` times
    plain decoding, the surplus of the tallest verify, and `CREDIT` steps saved before.

    Args:
        drafter: its scores must be probabilities, not only an order.
        costs: see `worthwhile` and `row_costs`.

    Raises:
        ValueError: a cost is missing or not positive.
    """

    def __init__(self, drafter: Drafter, costs: Sequence[float]) -> None:
        if not costs or min(costs) <= 0:
            raise ValueError(f"costs must be positive, one a row, got {list(costs)}")
        self.drafter = drafter
        self.costs = list(costs)
        self.name = drafter.name
        # Cost of all rounds beyond plain decoding of the same tokens.
        self._regret = 0.0
        self._round: tuple[int, float] | None = None  # tokens known before it, and its cost

    def begin(self, request: Request) -> None:
        """Start the request."""
        self._round = None
        self.drafter.begin(request)

    def propose(self, context: Sequence[int], rows: int) -> DraftTree:
        """At most `rows` rows, fewer where more would not pay."""
        self._settle(len(context))
        rows = min(rows, len(self.costs))
        plain = self.costs[0]
        limit = max(self.costs) - self._regret
        costs = [plain, *(cost if cost <= limit else inf for cost in self.costs[1:rows])]
        tree = worthwhile(self.drafter.propose(context, rows), costs)
        self._round = len(context), self.costs[len(tree) - 1]
        return tree

    def end(self, answer: Sequence[int]) -> None:
        """End the request in the drafter."""
        self._settle(len(answer))
        self.drafter.end(answer)

    def _settle(self, known: int) -> None:
        """Count the last round, which made the answer `known` tokens long."""
        if self._round:
            before, cost = self._round
            plain = self.costs[0]
            self._regret += cost - (1 + RETRY) * plain * (known - before)
            self._regret = max(self._regret, -CREDIT * plain)
        self._round = None
