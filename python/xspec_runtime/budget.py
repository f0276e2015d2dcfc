"""What drafting costs, what it may lose, and how many rows are worth their time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .drafters.base import DraftTree

# Over all requests, failing drafts may cost this part of plain decoding's time for ever: what they
# are tried again from. Within one request nothing is owed to it.
RETRY = 0.02
CREDIT = 8.0  # plain steps saved in a request that may be lost again


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


@dataclass(frozen=True, slots=True)
class DraftingCosts:
    """What a drafter's own work costs, in steps of plain decoding; what is hidden behind other work
    costs nothing.

    Attributes:
        begin: once a request.
        rows: a proposal of 1, 2, ... rows, root included, not falling; beyond the last one the
            same; none: nothing.
    """

    begin: float = 0.0
    rows: tuple[float, ...] = ()

    def of(self, rows: int) -> float:
        """A proposal of `rows` rows; not asking costs nothing."""
        return self.rows[min(rows, len(self.rows)) - 1] if self.rows and rows > 1 else 0.0


class Budget:
    """What drafting may lose against plain decoding, in steps of it.

    Attributes:
        surplus: never more than this in one request, nor, but for `RETRY`, in all together.
    """

    def __init__(self, surplus: float) -> None:
        self.surplus = surplus
        self._request = self._overall = 0.0

    @property
    def left(self) -> float:
        """What may still be lost."""
        return self.surplus - max(self._request, self._overall)

    def begin(self) -> None:
        """Another request."""
        self._request = 0.0

    def spend(self, cost: float, tokens: int) -> None:
        """Work that plain decoding would have done in `tokens` steps has cost `cost`."""
        self._request = max(self._request + cost - tokens, -CREDIT)
        self._overall = max(self._overall + cost - (1 + RETRY) * tokens, -CREDIT)
