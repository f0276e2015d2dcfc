"""How many rows are worth it, what running acceptance corrects, and when a drafter is asked."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from tiny import prompt, reference, tiny_llama
from xspec_runtime.acceptance import HOPE, Acceptance
from xspec_runtime.budget import DraftingCosts, worthwhile
from xspec_runtime.config import SpecConfig
from xspec_runtime.drafters.base import DraftTree, Request
from xspec_runtime.engine import SpeculativeDecoder
from xspec_runtime.policy import PricedDrafter
from xspec_runtime.replay.run import replay
from xspec_runtime.targets.transformers import TransformersTarget


def random_tree(rng: random.Random, rows: int) -> DraftTree:
    tree = DraftTree.root(0)
    for token in range(1, rows):
        parent = rng.randrange(len(tree))
        tree.add(parent, token, tree.scores[parent] * rng.uniform(0.05, 1.0))
    return tree


def test_the_rows_kept_are_the_best_by_brute_force(rng: random.Random) -> None:
    for _ in range(200):
        rows = rng.randint(1, 20)
        tree = random_tree(rng, rows)
        costs = [1.0, *(rng.uniform(0.8, 3.0) for _ in range(rng.randint(0, 24)))]
        kept = worthwhile(tree, costs)
        # The same tokens stand for the same nodes here.
        assert all(
            tree.tokens[tree.parent_idx[token]] == kept.tokens[kept.parent_idx[i]]
            for i, token in enumerate(kept.tokens[1:], 1)
        )
        rates = [
            sum(tree.best(m).scores) / costs[m - 1] for m in range(1, min(rows, len(costs)) + 1)
        ]
        assert sum(kept.scores) / costs[len(kept) - 1] == pytest.approx(max(rates))


def test_nothing_is_drafted_where_it_cannot_pay() -> None:
    tree = DraftTree.chain(7, [1, 2, 3], [0.3, 0.2, 0.1])
    assert worthwhile(tree, [1.0, 1.4, 1.7, 2.0]).tokens == [7]
    assert worthwhile(tree, [1.0, 1.2, 1.6, 2.0]).tokens == [7, 1]
    assert worthwhile(tree, [1.0, 1.5, 1.5, 1.0]).tokens == [7, 1, 2, 3]


class Text:
    """Proposes one text, sure of every token; counts what it was asked."""

    name = "text"

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens = list(tokens)
        self.asked: list[int] = []
        self.begun = self.opened = 0

    def begin(self, request: Request) -> None:
        self.begun += 1

    def opening(self, rows: int) -> list[int]:
        self.opened += 1
        return self.tokens[:rows]

    def propose(self, context, rows: int) -> DraftTree:
        self.asked.append(rows)
        known = len(context)
        return DraftTree.chain(context[-1], self.tokens[known : known + rows - 1])

    def end(self, answer) -> None:
        pass


ANSWER = list(range(100, 160))
WRONG = [7] * 60
STEEP = [1.0, *[2.0] * 7]


@pytest.mark.parametrize("costs", [[], [1.0, 0.0], [-1.0]])
def test_costs_must_be_positive(costs: list[float]) -> None:
    with pytest.raises(ValueError, match="costs must be positive"):
        PricedDrafter(Text(ANSWER), costs)
    with pytest.raises(ValueError, match="must not be negative"):
        PricedDrafter(Text(ANSWER), [1.0], DraftingCosts(-1.0))


def test_scores_that_came_true_are_left_alone_and_never_raised() -> None:
    acceptance = Acceptance()
    tree = DraftTree.chain(1, [2, 3], [0.5, 0.25])
    for _ in range(50):
        acceptance.learn(tree, [2, 3])
    assert acceptance.correct(tree).scores == tree.scores


def test_claims_are_lowered_to_what_came_true(rng: random.Random) -> None:
    """At depth 1 half of the drafts are right, at depth 2 a quarter of those below them."""
    acceptance = Acceptance()
    tree = DraftTree([1, 2, 3, 9], [-1, 0, 1, 0], [1.0, 1.0, 1.0, 0.1])
    for _ in range(2000):
        first, second = rng.random() < 0.5, rng.random() < 0.25
        acceptance.learn(tree, [2 if first else 4, 3 if second else 5])
    scores = acceptance.correct(tree).scores
    assert scores[1] == pytest.approx(0.5, abs=0.1)
    assert scores[2] == pytest.approx(0.125, abs=0.06)
    assert scores[2] <= scores[1] <= scores[0] == 1.0
    assert acceptance.by_depth(2) == pytest.approx([0.5, 0.125], abs=0.1)


def test_nothing_is_learned_of_what_lies_off_the_targets_path() -> None:
    acceptance = Acceptance()
    acceptance.learn(DraftTree.chain(1, [2, 3, 4]), [9, 3, 4])
    deep = DraftTree([1, 2, 3], [-1, 0, 1], [1.0, 0.2, 0.2])
    # The draft below a wrong one was not judged: its claim of 1 stands.
    assert acceptance.correct(deep).scores[2] == pytest.approx(0.2)
    assert acceptance.by_depth(2)[0] < HOPE
    assert acceptance.by_depth(2)[1] == pytest.approx(acceptance.by_depth(2)[0] * HOPE)
    before = acceptance.by_depth(1)[0]
    for _ in range(500):
        acceptance.age()
    assert before < acceptance.by_depth(1)[0] == pytest.approx(HOPE, abs=1e-3)


def test_an_estimate_recovers_without_a_trial() -> None:
    """Drafts that are not verified are judged too: they may ride again once they are right."""
    drafter = PricedDrafter(Text(WRONG), STEEP)
    for _ in range(4):
        replay(drafter, ANSWER, 8)
    drafter.drafter.tokens = ANSWER
    rounds = [len(replay(drafter, ANSWER, 8)) for _ in range(4)]
    assert rounds[0] > rounds[-1] and rounds[-1] < 12


def test_the_drafter_is_asked_for_as_much_as_pays() -> None:
    """Every draft costs 0.3 of a step; where drafts are right two times in three, few pay."""
    costs = [1.0 + 0.05 * m for m in range(8)]
    drafting = DraftingCosts(0.0, tuple(0.3 * m for m in range(8)))
    right, half = Text(ANSWER), Text(ANSWER)
    drafter = PricedDrafter(right, costs, drafting)
    for _ in range(12):
        replay(drafter, ANSWER, 8)
    assert min(right.asked[-2:]) >= 7
    half.tokens = [token if i % 3 else 7 for i, token in enumerate(ANSWER)]
    drafter = PricedDrafter(half, costs, drafting)
    for _ in range(12):
        replay(drafter, ANSWER, 8)
    assert 2 <= max(half.asked[-5:]) <= 5
    wrong = Text(WRONG)
    drafter = PricedDrafter(wrong, costs, drafting)
    for _ in range(12):
        replay(drafter, ANSWER, 8)
    assert len(wrong.asked) < 0.1 * 12 * len(ANSWER)


def test_a_drafter_whose_begin_never_pays_is_left_alone_and_tried_again() -> None:
    wrong, right = Text(WRONG), Text(ANSWER)
    for text in (wrong, right):
        drafter = PricedDrafter(text, [1.0] + [1.1] * 7, DraftingCosts(5.0, (0.0, *[0.1] * 7)))
        for _ in range(40):
            replay(drafter, ANSWER, 8)
    assert right.begun == 40
    assert 2 <= wrong.begun <= 12
    # More than a whole answer could save.
    dear = Text(ANSWER)
    drafter = PricedDrafter(dear, [1.0] + [1.1] * 7, DraftingCosts(60.0, (0.0, *[0.1] * 7)))
    for _ in range(5):
        replay(drafter, ANSWER, 8)
    assert dear.begun == 1


def test_rows_of_the_prefill_follow_their_price_and_their_acceptance() -> None:
    costs = [1.0, *[1.1] * 15]
    free, dear = PricedDrafter(Text(ANSWER), costs), PricedDrafter(Text(ANSWER), costs, None, 0.4)
    for drafter in (free, dear):
        drafter.begin(Request())
    assert free.opening(12) == ANSWER[:12] == free.admit(ANSWER[:12])
    # A token is worth a fifth of a step where a verify gives five.
    assert dear.opening(12) == [] == dear.admit(ANSWER[:12])
    # What was always wrong stops riding; what nobody looked at is tried again later.
    drafter, sent = PricedDrafter(Text(WRONG), costs, None, 0.1), []
    for _ in range(200):
        drafter.begin(Request())
        sent.append(len(drafter.opening(12)))
        drafter.propose([100], 8)
        drafter.end(ANSWER)
    late = sent[100:]
    assert min(sent[:20]) > 0 and late.count(0) > 40 and max(late) > 0


@pytest.mark.parametrize("fused", ["off", "exact", "fast"])
def test_answers_do_not_depend_on_the_policy(fused: str) -> None:
    """Nor do existing drafts pass it by: they compete for rows, and ride if they are worth it."""
    model, ids = tiny_llama(5), prompt(5)
    truth = reference(model, ids, 24)
    text = Text(truth)
    drafter = PricedDrafter(text, [1.0, *[1.05] * 15], DraftingCosts(0.1, (0.0, 0.1)), 0.01)
    decoder = SpeculativeDecoder(
        TransformersTarget(model, 96), drafter, SpecConfig(16, 24, prefill_fused=fused)
    )
    for drafted in ([], truth[:9], [1, 2, 3]):
        answer = decoder.generate({"input_ids": ids}, drafted=drafted)
        assert answer.tokens == truth
        rode = answer.prefill_drafted > 0
        assert rode == (fused == "fast")
    none = PricedDrafter(Text([]), [1.0, *[9.0] * 15])
    decoder = SpeculativeDecoder(
        TransformersTarget(model, 96), none, SpecConfig(16, 24, prefill_fused=fused)
    )
    decoder.drafter.riding = 3.0
    answer = decoder.generate({"input_ids": ids}, drafted=truth[:3])
    # Three drafts are not worth a verify of nine steps, nor three steps each in the prefill.
    assert answer.tokens == truth and answer.prefill_drafted == 0
    assert {r.rows for r in answer.rounds} == {1}


def test_a_request_that_was_given_up_leaves_the_drafter_usable() -> None:
    drafter = PricedDrafter(Text(ANSWER), STEEP, DraftingCosts(0.5, (0.0, 0.1)), 0.1)
    drafter.end([])
    drafter.begin(Request())
    drafter.opening(4)
    drafter.propose(ANSWER[:2], 8)
    drafter.end([])
    rounds = replay(drafter, ANSWER, 8)
    assert sum(r.emitted for r in rounds) == len(ANSWER) - 1 and len(rounds) < 30
