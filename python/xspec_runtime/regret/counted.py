"""Recorded answers in counted cost: what drafting saves, and the most it ever loses, without a
clock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ..budget import worthwhile
from ..calibration import Calibration
from ..data.pairs import Pair, contiguous_folds
from ..drafters.base import Drafter, DraftTree, Request
from ..policy import PricedDrafter
from ..replay.arms import Arm, replay_arms, request_of
from ..replay.run import ReplayRound, replay

POLICIES = ("all rows", "claims", "priced")


# v(M)/v(1) of three kinds of machine: what this project aims at on a GPU, SmolLM2 on two CPU cores
# (bench/results/verify_smollm2_cpu.json), and 4-bit weights that only one row has a kernel for.
TABLES = {
    "flat": Calibration({1: 1.0, 22: 1.05, 64: 1.2}).costs(),
    "CPU": Calibration({1: 1.0, 4: 1.47, 8: 1.72, 16: 2.26, 32: 3.3, 64: 5.85}).costs(),
    "step": [1.0, *[4.3] * 63],
}


class ByClaims:
    """The rows that a drafter's own scores say are worth it; neither corrected nor bounded."""

    def __init__(self, drafter: Drafter, costs: Sequence[float]) -> None:
        self.name, self._drafter, self._costs = drafter.name, drafter, costs

    def begin(self, request: Request) -> None:
        self._drafter.begin(request)

    def propose(self, context: Sequence[int], rows: int) -> DraftTree:
        return worthwhile(self._drafter.propose(context, rows), self._costs[:rows])

    def end(self, answer: Sequence[int]) -> None:
        self._drafter.end(answer)


def losses(rounds: Sequence[ReplayRound], costs: Sequence[float]) -> list[float]:
    """After every round, what all rounds so far cost beyond a plain step a token."""
    lost, found = 0.0, []
    for step in rounds:
        lost += costs[len(step.tree) - 1] / costs[0] - step.emitted
        found.append(lost)
    return found


@dataclass(frozen=True, slots=True)
class Counted:
    """One drafter under one policy on one table, over all folds; costs in plain steps.

    Attributes:
        cost: of a token, plain decoding's being 1.
        worst: most ever lost within an answer, against plain decoding of the same tokens.
        surplus: that of the tallest verify, which `worst` must not exceed where it is priced.
        slower: share of answers that cost more than plain decoding.
    """

    table: str
    drafter: str
    policy: str
    rows: int
    cost: float
    worst: float
    surplus: float
    slower: float


def count_costs(
    pairs: Sequence[Pair], folds: int = 5, gamma: int = 5, rows: int = 16, backend: str = "auto"
) -> Iterator[Counted]:
    """Every drafter of a replay under every policy on every table, from contiguous folds.

    Drafters learn from the other folds, "memory tree, cold" from nothing but the answers before.

    Raises:
        ValueError: see `contiguous_folds` and `replay`.
    """
    parts = contiguous_folds(len(pairs), folds)
    for name, arm in _arms(gamma, rows):
        for kind, costs in TABLES.items():
            for policy in POLICIES:
                spent = tokens = slower = 0.0
                worst = -float("inf")
                for number, part in enumerate(parts):
                    others = [*pairs[: part.start], *pairs[part.stop :]]
                    # An arm keeps what it learned of a fold under the fold's number.
                    known = (-1 - number, ()) if name.endswith("cold") else (number, others)
                    drafter = _under(policy, arm.make(*known), costs[: arm.rows])
                    for i in part:
                        target = pairs[i].target
                        rounds = replay(drafter, target, arm.rows, request_of(pairs[i]), backend)
                        lost = losses(rounds, costs)
                        worst = max(worst, *lost)
                        slower += lost[-1] > 1e-9
                        tokens += len(target) - 1
                        spent += lost[-1] + len(target) - 1
                most = max(costs[: arm.rows]) / costs[0] - 1
                cost, share = spent / tokens, slower / len(pairs)
                yield Counted(kind, name, policy, arm.rows, cost, worst, most, share)


def _arms(gamma: int, rows: int) -> Iterator[tuple[str, Arm]]:
    for arm in replay_arms(gamma, [rows]):
        if arm.drafter == "memory tree":
            yield f"memory tree, {'online' if arm.online else 'static'}", arm
            if arm.online:
                yield "memory tree, cold", arm
        elif not arm.drafter.startswith("memory"):
            yield arm.drafter, arm


def _under(policy: str, drafter: Drafter, costs: Sequence[float]) -> Drafter:
    wrap: dict[str, Callable[[], Drafter]] = {
        "all rows": lambda: drafter,
        "claims": lambda: ByClaims(drafter, costs),
        "priced": lambda: PricedDrafter(drafter, costs),
    }
    return wrap[policy]()
