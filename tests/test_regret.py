"""Bounded regret in counted cost, after every round of recorded, adversarial and random traces."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xspec_runtime.budget import CREDIT, RETRY, DraftingCosts
from xspec_runtime.data.pairs import Pair, read_pairs
from xspec_runtime.drafters.base import DraftTree, Request
from xspec_runtime.drafters.ngram import NgramDrafter, NgramMemory
from xspec_runtime.policy import PricedDrafter
from xspec_runtime.regret.counted import TABLES, ByClaims, Counted, count_costs, losses
from xspec_runtime.replay.run import replay

SLACK = 1e-6  # of sums of rounded costs
COSTS = {
    **{name: costs[:16] for name, costs in TABLES.items()},
    "cheap heights": [1.0, 1.2, 0.9, 0.95, 1.3, 1.25, 1.6, 2.0],
    "free": [1.0] * 8,
    "one row": [1.0],
}
DRAFTING = {
    "none": DraftingCosts(),
    "begin": DraftingCosts(4.0),
    "steps": DraftingCosts(1.5, tuple(0.4 * m for m in range(16))),
    "asking": DraftingCosts(0.0, (0.0, 0.3)),
}


class Ledger:
    """Walks answers as a target would and holds the policy to its promises after every round.

    The drafter proposes a chain of `claims`, right where `right` says so for that moment.
    """

    name = "adversary"

    def __init__(
        self,
        costs: Sequence[float],
        drafting: DraftingCosts,
        right: Callable[[int], int],
        claims: Sequence[float] | None = None,
        riding: float = 0.0,
    ) -> None:
        self.costs, self.drafting, self.right, self.claims = costs, drafting, right, claims
        self.riding = riding
        self.priced = PricedDrafter(self, costs, drafting, riding)
        self.spent = 0.0
        self.rounds = self.drafted = 0

    def begin(self, request: Request) -> None:
        self.spent += self.drafting.begin

    def opening(self, rows: int) -> list[int]:
        self.spent += self.drafting.of(rows + 1)
        good = max(0, min(self.right(self.rounds), rows))
        return [5] * good + [9] * (rows - good)

    def propose(self, context: Sequence[int], rows: int) -> DraftTree:
        self.spent += self.drafting.of(rows)
        good = max(0, min(self.right(self.rounds), rows - 1))
        scores = list(accumulate((self.claims or [1.0] * 16)[: rows - 1], min))
        return DraftTree.chain(context[-1], [5] * good + [9] * (rows - 1 - good), scores)

    def end(self, answer: Sequence[int]) -> None:
        pass

    def run(self, lengths: Sequence[int], ride: bool = False) -> None:
        """Answers of so many tokens; raises where a promise is broken."""
        total = tokens = 0.0
        for length in lengths:
            before, self.spent = self.spent, 0.0
            self.priced.begin(Request())
            known = 1
            if ride:
                rows = self.priced.opening(min(6, length))
                self.spent += self.riding * len(rows)
                known += next((i for i, t in enumerate(rows) if t != 5), len(rows))
            context, lowest = [5] * min(known, length), 0.0
            while len(context) < length:
                tree = self.priced.propose(context, 16)
                self.spent += self.costs[len(tree) - 1]
                self.drafted += len(tree) > 1
                good = next((i for i, t in enumerate(tree.tokens[1:]) if t != 5), len(tree) - 1)
                context += [5] * min(good + 1, length - len(context))
                self.rounds += 1
                lost = self.spent - (len(context) - 1)
                assert lost <= self.priced.surplus + SLACK
                lowest = min(lowest, lost)
                assert lost - lowest <= self.priced.surplus + CREDIT + SLACK
                everything = total + self.spent - (1 + RETRY) * (tokens + len(context) - 1)
                assert everything <= self.priced.surplus + SLACK
            self.priced.end(context)
            total, tokens = total + self.spent, tokens + len(context) - 1
            self.spent += before


ADVERSARIES: dict[str, Callable[[int], int]] = {
    "wrong": lambda n: 0,
    "right, then wrong": lambda n: 15 if n < 12 else 0,
    "alternating": lambda n: 15 * (n % 2),
    "one right": lambda n: 1,
    "right every tenth round": lambda n: 15 * (n % 10 == 9),
    "right": lambda n: 15,
}


def surplus_of(costs: Sequence[float], drafting: DraftingCosts) -> float:
    """What the law allows: one verify's surplus, with the drafting before it."""
    taller = range(2, len(costs) + 1)
    most = max((costs[m - 1] / costs[0] + drafting.of(m) - 1 for m in taller), default=0.0)
    return drafting.begin + max(most, 0.0)


@pytest.mark.parametrize("drafting", DRAFTING)
@pytest.mark.parametrize("kind", COSTS)
def test_regret_is_bounded_on_adversarial_traces(kind: str, drafting: str) -> None:
    costs = COSTS[kind]
    for name, right in ADVERSARIES.items():
        for ride in (False, True):
            ledger = Ledger(costs, DRAFTING[drafting], right, riding=0.05)
            assert ledger.priced.surplus == pytest.approx(surplus_of(costs, DRAFTING[drafting]))
            ledger.run([50] * 12, ride)
            assert ledger.rounds > 0, name


def test_the_bound_is_not_kept_by_never_drafting() -> None:
    for kind in ("flat", "CPU", "cheap heights", "free"):
        ledger = Ledger(COSTS[kind], DraftingCosts(), ADVERSARIES["right"])
        ledger.run([50] * 12)
        assert ledger.drafted > 0.8 * ledger.rounds and ledger.spent < 0.5 * 12 * 49


class Blind(PricedDrafter):
    """A policy that forgets what it lost."""

    @property
    def _left(self) -> float:
        return self.surplus


def test_the_check_rejects_a_policy_that_forgets() -> None:
    ledger = Ledger(COSTS["CPU"], DraftingCosts(), ADVERSARIES["alternating"])
    ledger.priced = Blind(ledger, ledger.costs)
    ledger.right = lambda n: 0
    with pytest.raises(AssertionError):
        ledger.run([50] * 12)


@settings(max_examples=120)
@given(
    seed=st.integers(0, 2**31),
    costs=st.lists(st.floats(0.5, 6.0), min_size=1, max_size=15),
    begin=st.floats(0.0, 8.0),
    step=st.floats(0.0, 0.8),
    rate=st.floats(0.0, 1.0),
    riding=st.floats(0.0, 0.5),
)
def test_regret_is_bounded_on_random_traces(
    seed: int, costs: list[float], begin: float, step: float, rate: float, riding: float
) -> None:
    print(f"seed {seed}")
    rng = random.Random(seed)
    drafting = DraftingCosts(begin, tuple(step * m for m in range(16)))
    claims = [rng.random() for _ in range(16)] if rng.random() < 0.5 else None

    def right(number: int) -> int:
        return rng.randrange(16) if rng.random() < rate else 0

    ledger = Ledger([1.0, *costs], drafting, right, claims, riding)
    ledger.run([rng.randint(1, 80) for _ in range(6)], ride=rng.random() < 0.5)


def test_what_failed_is_tried_again_in_later_requests() -> None:
    ledger = Ledger(COSTS["step"], DraftingCosts(), ADVERSARIES["wrong"])
    ledger.run([50])
    assert ledger.drafted == 1
    ledger.right = ADVERSARIES["right"]
    ledger.run([50] * 40)
    assert ledger.drafted > 20


def some_pairs(rng: random.Random, count: int) -> list[Pair]:
    phrases = [[rng.randrange(9, 40) for _ in range(8)] for _ in range(6)]
    pairs = []
    for i in range(count):
        target = (7, *(token for part in rng.choices(phrases, k=5) for token in part))
        draft = tuple(t if rng.random() < 0.4 else 5 for t in target)
        pairs.append(Pair(i, i, "", draft, target))
    return pairs


def check_counted(found: Sequence[Counted], folds: int, tokens: int) -> dict:
    """The law; returns the costs by drafter, table and policy."""
    for entry in found:
        if entry.policy == "priced":
            assert entry.worst <= entry.surplus + SLACK
            assert entry.cost <= 1.0 + RETRY + folds * entry.surplus / tokens + SLACK
    return {(c.drafter, c.table, c.policy): c.cost for c in found}


def test_counted_costs_of_made_pairs(rng: random.Random) -> None:
    found = list(count_costs(some_pairs(rng, 12), folds=2, rows=8))
    assert len(found) == 5 * len(TABLES) * 3
    costs = check_counted(found, 2, 12 * 40)
    assert costs["raw draft", "step", "priced"] < costs["raw draft", "step", "claims"]
    assert costs["memory tree, static", "flat", "priced"] < 0.6
    assert (
        costs["memory tree, cold", "flat", "priced"]
        > costs["memory tree, online", "flat", "priced"]
    )


def test_regret_on_recorded_traces(shared_dir) -> None:
    pairs = read_pairs(shared_dir / "data" / "dsec_1s_token_pairs.jsonl")[:24]
    found = list(count_costs(pairs, folds=2))
    costs = check_counted(found, 2, 24 * 49)
    # What the correction is for: drafters without chances claim that everything is right.
    for drafter in ("raw draft", "constant string"):
        for kind in ("CPU", "step"):
            assert costs[drafter, kind, "priced"] < costs[drafter, kind, "claims"]
    assert costs["memory tree, online", "flat", "priced"] < 0.4


def test_losses_and_tables() -> None:
    memory = NgramMemory()
    memory.add([1, 2, 3, 4, 5])
    drafter = ByClaims(NgramDrafter(memory, False), [1.0, 1.5, 2.0, 2.5])
    rounds = replay(drafter, [1, 2, 3, 4, 5], 4)
    lost = losses(rounds, [2.0, 3.0, 4.0, 5.0])
    spent = sum({1: 1.0, 2: 1.5, 3: 2.0, 4: 2.5}[len(r.tree)] for r in rounds)
    assert len(lost) == len(rounds) and lost[-1] == pytest.approx(spent - 4)
    assert TABLES["CPU"][:4] == pytest.approx([1.0, 1 + 0.47 / 3, 1 + 0.94 / 3, 1.47])
    assert [len(costs) for costs in TABLES.values()] == [64] * 3
