"""A drafter that is asked, and verified, no more than pays: bounded regret on any text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import inf

from .acceptance import AGING, Acceptance
from .budget import Budget, DraftingCosts, worthwhile
from .drafters.base import Drafter, DraftTree, OpeningDrafter, Request
from .drafters.merge import merge

# Part of what may still be lost that one verify of doubtful drafts may risk. Risking all of it at
# once would leave a long answer without drafts after the first wrong one.
PACE = 0.25
ROUNDING = 1e-9


@dataclass(slots=True)
class _Round:
    """A tree as it was proposed (None: nobody was asked), the tokens known then, and the cost."""

    known: int
    tree: DraftTree | None
    cost: float


class PricedDrafter:
    """Proposes what is worth verifying of what another drafter proposes, on any text.

    With the cost of plain decoding counted as one a token, whatever the target says:

    - at any moment of a request, its drafting and verifies have cost at most `surplus` more than
      plain decoding of the tokens it has: the surplus of the tallest verify, with the drafting
      that goes before it;
    - from any moment of a request on, at most `surplus` and `CREDIT` more;
    - over all requests, at most `surplus` and the part `RETRY` more.

    The drafter is asked for as many rows as its running acceptance pays for, or not at all; the
    rows that are verified follow from its scores, lowered to what came true of earlier ones.

    Args:
        drafter: its scores should be probabilities; where they are too high that is found out.
        costs: see `worthwhile`, of which the unit does not matter here; see `calibration`.
        drafting: what asking the drafter costs.
        riding: cost of one more row in the target's prefill, in steps of plain decoding.

    Raises:
        ValueError: a cost of a row is missing or not positive, or another one is negative.
    """

    def __init__(
        self,
        drafter: Drafter,
        costs: Sequence[float],
        drafting: DraftingCosts | None = None,
        riding: float = 0.0,
    ) -> None:
        if not costs or min(costs) <= 0:
            raise ValueError(f"costs must be positive, one a row, got {list(costs)}")
        self.drafting = drafting or DraftingCosts()
        if min(self.drafting.begin, riding, *self.drafting.rows, 0.0) < 0:
            raise ValueError(
                f"costs of drafting must not be negative, got {self.drafting} and {riding} a row "
                "of the prefill"
            )
        self.drafter = drafter
        self.name = drafter.name
        self.costs = [cost / costs[0] for cost in costs]
        self.riding = riding
        taller = range(2, len(costs) + 1)
        # The least that asking for 2, 3, ... rows can lose, and the most that a round can.
        self._least = max(0.0, min((self.costs[m - 1] for m in taller), default=1.0) - 1.0)
        most = max((self.costs[m - 1] + self.drafting.of(m) - 1.0 for m in taller), default=0.0)
        self._budget = Budget(self.drafting.begin + max(most, 0.0))
        self._acceptance, self._openings = Acceptance(), Acceptance()
        self._round: _Round | None = None
        self._ridden: list[int] = []
        self._ride_cost = 0.0
        self._asking = False
        self._answers = self._tokens = 0
        # Of requests in which the drafter was begun: how many, and steps saved but for that.
        self._begun = self._saved = self._gained = 0.0

    @property
    def surplus(self) -> float:
        """See above; steps of plain decoding."""
        return self._budget.surplus

    def begin(self, request: Request) -> None:
        """Start the request, and the drafter's where its work can pay."""
        self._budget.begin()
        self._round, self._gained = None, 0.0
        self._asking = self._worth_beginning()
        if self._asking:
            self._budget.spend(self.drafting.begin, 0)
            self.drafter.begin(request)
        else:
            self._acceptance.age()
            self._begun, self._saved = AGING * self._begun, AGING * self._saved

    def opening(self, rows: int) -> list[int]:
        """Drafts for the prefill: as many of the drafter's as pay there."""
        if not self._asking or not isinstance(self.drafter, OpeningDrafter):
            return []
        costs = [self.drafting.of(count + 1) for count in range(1, rows + 1)]
        count = self._rows_riding(costs)
        return self._ride(self.drafter.opening(count), self.drafting.of(count + 1)) if count else []

    def admit(self, drafted: Sequence[int]) -> list[int]:
        """Those of the drafts that exist before the prefill which pay as rows of it."""
        count = self._rows_riding([0.0] * len(drafted))
        return self._ride(drafted[:count], 0.0)

    def propose(
        self, context: Sequence[int], rows: int, seed: DraftTree | None = None
    ) -> DraftTree:
        """At most `rows` rows, fewer where more would not pay.

        Args:
            seed: drafts that exist already and compete for the rows.
        """
        self._settle(context)
        rows = min(rows, len(self.costs))
        asked = self._rows_to_ask(rows)
        if asked < 2 and not seed:
            self._round = _Round(len(context), None, 1.0)
            return DraftTree.root(context[-1])
        tree = self.drafter.propose(context, asked) if asked > 1 else DraftTree.root(context[-1])
        if seed:
            tree = merge([tree, seed], rows)
        drafting = self.drafting.of(asked)
        chances = self._acceptance.correct(tree)
        likely = sum(
            score for score, up in zip(chances.scores, tree.parent_idx, strict=True) if up == 0
        )
        left = self._left - drafting
        share = max(PACE, min(likely, 1.0) ** 2)
        limit = 1.0 + max(0.0, min(left, max(share * left, self._least))) + ROUNDING
        costs = [cost + drafting if cost <= limit else inf for cost in self.costs[1:rows]]
        kept = worthwhile(chances, [1.0 + drafting, *costs])
        self._round = _Round(len(context), tree, self.costs[len(kept) - 1] + drafting)
        return kept

    def end(self, answer: Sequence[int]) -> None:
        """End the request in the drafter. Without an answer it was given up: what became of the
        last round is unknown, and neither counted nor learned from.
        """
        if answer:
            self._settle(answer)
            self._answers += 1
            self._tokens += len(answer)
            self._begun += self._asking
            self._saved += self._gained if self._asking else 0.0
        self._round = None
        self._ridden, self._ride_cost = [], 0.0
        self._asking = False
        self._budget.begin()
        self.drafter.end(answer)

    @property
    def _left(self) -> float:
        """What may still be lost, once what is running has been lost."""
        return self._budget.left - self._ride_cost

    def _settle(self, context: Sequence[int]) -> None:
        """Count what has been decided since: the drafts in the prefill, and the last round."""
        if self._ridden or self._ride_cost:
            self._openings.learn(DraftTree.chain(-1, self._ridden), context)
            self._budget.spend(self._ride_cost, len(context) - 1)
            self._ridden, self._ride_cost = [], 0.0
        if self._round:
            following = context[self._round.known :]
            self._budget.spend(self._round.cost, len(following))
            self._gained += len(following) - self._round.cost
            if self._round.tree:
                self._acceptance.learn(self._round.tree, following)
        self._round = None

    def _rate(self, height: int, tokens: float) -> float:
        """Tokens per plain step of a round that asks for `height` rows."""
        return tokens / (self.costs[height - 1] + self.drafting.of(height))

    def _rates(self, rows: int) -> list[float]:
        """The same of 1, 2, ... `rows` rows, each one token deeper than the one before."""
        tokens = accumulate([1.0, *self._acceptance.by_depth(rows - 1)])
        return [self._rate(height, expected) for height, expected in enumerate(tokens, 1)]

    def _worth_beginning(self) -> bool:
        """Whether a request is expected to save more than its drafter's begin costs."""
        cost = self.drafting.begin
        if cost == 0.0:
            return True
        rate = max(self._rates(len(self.costs)))
        if cost + self.drafting.of(2) + self._least > self._left:
            return False
        if not self._answers:
            return rate > 1.0
        # What is hoped for counts like one request that was seen.
        hope = (self._tokens / self._answers - 1) * (1.0 - 1.0 / rate)
        return (self._saved + hope) / (self._begun + 1) > cost

    def _rows_to_ask(self, rows: int) -> int:
        """Rows to ask the drafter for; 0: it is not asked."""
        if not self._asking or rows < 2:
            return 0
        if self.drafting.of(rows) == 0.0:
            return rows
        affordable = self._left - self._least
        rates = [
            rate if self.drafting.of(height) <= affordable else 0.0
            for height, rate in enumerate(self._rates(rows), 1)
        ]
        asked = max(range(rows), key=rates.__getitem__) + 1
        if asked == 1:
            self._acceptance.age()
            return 0
        # Rows that cost the drafter nothing more.
        same = self.drafting.of(asked)
        return max(height for height in range(asked, rows + 1) if self.drafting.of(height) == same)

    def _rows_riding(self, drafting: Sequence[float]) -> int:
        """How many drafts the prefill should carry, of which 1, 2, ... cost `drafting`."""
        best, kept = 0.0, 0
        left = self._left - (0.0 if self._asking else self.drafting.begin)
        worth = 1.0 / max(self._rates(len(self.costs)))
        saved = accumulate(self._openings.by_depth(len(drafting)))
        for count, (tokens, cost) in enumerate(zip(saved, drafting, strict=True), 1):
            cost += count * self.riding
            if cost <= left and tokens * worth - cost > best:
                best, kept = tokens * worth - cost, count
        if not kept:
            self._openings.age()
        return kept

    def _ride(self, drafted: Sequence[int], drafting: float) -> list[int]:
        self._ridden = list(drafted)
        self._ride_cost = drafting + self.riding * len(self._ridden)
        return self._ridden
