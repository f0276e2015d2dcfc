from __future__ import annotations

import random

import pytest

from xspec_runtime.drafters.base import Drafter, DraftTree, Request
from xspec_runtime.drafters.merge import MergedDrafter, merge


def random_tree(rng: random.Random, root: int, nodes: int, vocab: int = 3) -> DraftTree:
    tree, edges = DraftTree.root(root), set()
    while len(tree) < nodes:
        parent, token = rng.randrange(len(tree)), rng.randrange(vocab)
        if (parent, token) in edges and rng.random() < 0.9:
            continue
        edges.add((parent, token))
        tree.add(parent, token, tree.scores[parent] * rng.choice([1.0, 0.5, 0.25]))
    return tree


def path(tree: DraftTree, node: int) -> tuple[int, ...]:
    tokens = []
    while node > 0:
        tokens.append(tree.tokens[node])
        node = tree.parent_idx[node]
    return tuple(reversed(tokens))


def test_against_paths_in_a_dictionary(rng):
    for _ in range(100):
        trees = [random_tree(rng, 7, rng.randint(1, 20)) for _ in range(rng.randint(1, 4))]
        rows = rng.randint(1, 40)
        best: dict[tuple[int, ...], float] = {}
        for tree in trees:
            for i in range(1, len(tree)):
                key = path(tree, i)
                best[key] = max(best.get(key, 0.0), tree.scores[i])
        merged = merge(trees, rows)
        found = {path(merged, i): merged.scores[i] for i in range(1, len(merged))}
        assert len(found) == len(merged) - 1 == min(rows - 1, len(best))
        assert all(found[key] == best[key] for key in found)
        assert all(merged.parent_idx[i] < i for i in range(len(merged)))
        assert all(
            merged.scores[i] <= merged.scores[merged.parent_idx[i]] for i in range(1, len(merged))
        )
        left_out = [score for key, score in best.items() if key not in found]
        assert not left_out or max(left_out) <= min(found.values(), default=1.0)


def test_shared_paths_and_ties():
    one = DraftTree.chain(1, [2, 3], [0.6, 0.3])
    two = DraftTree.chain(1, [2, 4], [0.9, 0.3])
    merged = merge([one, two], 8)
    assert merged.tokens == [1, 2, 3, 4]
    assert merged.parent_idx == [-1, 0, 1, 1]
    assert merged.scores == [1.0, 0.9, 0.3, 0.3]
    assert merge([one, two], 3).tokens == [1, 2, 3]
    assert merge([two, one], 3).tokens == [1, 2, 4]
    assert merge([one, two], 1) == DraftTree.root(1)


def test_equal_scores_put_parents_first():
    chain = DraftTree.chain(1, [2, 3, 4])
    assert merge([chain, DraftTree.chain(1, [5, 6, 7])], 5).tokens == [1, 2, 5, 3, 6]


def test_a_score_above_its_parents_is_lowered():
    assert merge([DraftTree([1, 2, 3], [-1, 0, 1], [1.0, 0.2, 0.9])], 3).scores == [1.0, 0.2, 0.2]


def test_bad_input():
    with pytest.raises(ValueError, match="at least one tree"):
        merge([], 4)
    with pytest.raises(ValueError, match=r"same root, got tokens \[1, 2\]"):
        merge([DraftTree.root(1), DraftTree.root(2)], 4)
    with pytest.raises(ValueError, match="rows must be from 1 to 64, got 0"):
        merge([DraftTree.root(1)], 0)
    with pytest.raises(ValueError, match="at least one drafter"):
        MergedDrafter([])


class Recorder:
    def __init__(self, name: str, tokens: list[int]) -> None:
        self.name, self.tokens, self.calls = name, tokens, []

    def begin(self, request):
        self.calls.append(("begin", request.prompt_ids))

    def propose(self, context, rows):
        self.calls.append(("propose", list(context), rows))
        return DraftTree.chain(context[-1], self.tokens[: rows - 1])

    def end(self, answer):
        self.calls.append(("end", list(answer)))


def test_all_drafters_take_part():
    parts = [Recorder("a", [1, 2]), Recorder("b", [3])]
    drafter = MergedDrafter(parts)
    assert isinstance(drafter, Drafter) and drafter.name == "tree"
    drafter.begin(Request([4]))
    assert drafter.propose([5], 6).tokens == [5, 1, 3, 2]
    drafter.end([5, 1])
    for part in parts:
        assert part.calls == [("begin", [4]), ("propose", [5], 6), ("end", [5, 1])]


class Counting:
    name = "counting"

    def __init__(self, score: float) -> None:
        self.score, self.asked = score, 0

    def begin(self, request: Request) -> None:
        self.asked = 0

    def propose(self, context, rows: int) -> DraftTree:
        self.asked += 1
        return DraftTree.chain(context[-1], [2, 3], [self.score, self.score])

    def end(self, answer) -> None:
        pass


@pytest.mark.parametrize(("score", "asked"), [(0.9, 0), (0.75, 0), (0.5, 1)])
def test_later_drafters_are_asked_only_while_more_is_to_be_gained(score: float, asked: int):
    first, second = Counting(score), Counting(0.1)
    MergedDrafter([first, second], enough=1.5).propose([1], 8)
    assert (first.asked, second.asked) == (1, asked)
    MergedDrafter([first, second]).propose([1], 8)
    assert second.asked == asked + 1


def test_weighed_scores_are_sums(rng):
    for _ in range(60):
        trees = [random_tree(rng, 7, rng.randint(1, 20)) for _ in range(rng.randint(1, 4))]
        weights = [rng.random() for _ in trees]
        weights = [weight / sum(weights) for weight in weights]
        expected: dict[tuple[int, ...], float] = {}
        for tree, weight in zip(trees, weights, strict=True):
            best: dict[tuple[int, ...], float] = {}
            for i in range(1, len(tree)):
                best[path(tree, i)] = max(best.get(path(tree, i), 0.0), tree.scores[i])
            for key, score in best.items():
                expected[key] = expected.get(key, 0.0) + weight * score
        merged = merge(trees, 64, weights)
        found = {path(merged, i): merged.scores[i] for i in range(1, len(merged))}
        assert len(found) == min(63, len(expected))
        assert found == pytest.approx({key: expected[key] for key in found})
        for i in range(1, len(merged)):
            assert merged.scores[i] <= merged.scores[merged.parent_idx[i]]


def test_bad_weights():
    tree = DraftTree.chain(1, [2])
    for weights in ([], [0.5, 0.5], [-0.1], [1.1]):
        with pytest.raises(ValueError, match="weights must be at least 0, one for each of 1 trees"):
            merge([tree], 4, weights)


class Chain:
    """Proposes one token, at a chance it names itself."""

    def __init__(self, token: int, chance: float) -> None:
        self.name, self.token, self.chance = "chain", token, chance

    def begin(self, request: Request) -> None:
        pass

    def propose(self, context, rows: int) -> DraftTree:
        return DraftTree.chain(context[-1], [self.token], [self.chance])

    def end(self, answer) -> None:
        pass


def test_a_source_that_boasts_loses_its_weight():
    """Both claim to be sure; the target says 2 and only now and then 3."""
    merged = MergedDrafter([Chain(3, 0.9), Chain(2, 0.5)], weigh=True)
    scores = {}
    for i in range(300):
        merged.begin(Request())
        tree = merged.propose([1], 3)
        scores = dict(zip(tree.tokens[1:], tree.scores[1:], strict=True))
        merged.end([1, 3 if i % 10 == 0 else 2])
    assert scores[2] > 0.7 and scores[3] < 0.05
    assert merged.propose([1], 2).tokens == [1, 2]


def test_weights_learn_from_the_context_as_from_the_end():
    ended, extended = (MergedDrafter([Chain(2, 0.5), Chain(3, 0.5)], weigh=True) for _ in range(2))
    ended.begin(Request())
    ended.propose([1], 4)
    ended.end([1, 3])
    extended.begin(Request())
    extended.propose([1], 4)
    extended.propose([1, 3], 4)
    ended.begin(Request())
    extended.begin(Request())
    assert ended.propose([1], 4) == extended.propose([1], 4)
    fresh = MergedDrafter([Chain(2, 0.5), Chain(3, 0.5)], weigh=True)
    assert ended.propose([1], 4) != fresh.propose([1], 4)


def test_a_root_alone_is_no_opinion():
    class Silent(Chain):
        def propose(self, context, rows):
            return DraftTree.root(context[-1])

    merged = MergedDrafter([Silent(9, 1.0), Chain(2, 0.5)], weigh=True)
    assert merged.propose([1], 4).scores == [1.0, 0.5]
    silent = MergedDrafter([Silent(9, 1.0)], weigh=True)
    assert silent.propose([1], 4) == DraftTree.root(1)


def test_no_future_in_weights(rng):
    for _ in range(10):
        answer = [rng.randrange(2, 4) for _ in range(20)]
        cut = rng.randint(1, 19)
        other = answer[:cut] + [5] * (20 - cut)
        one, two = (MergedDrafter([Chain(2, 0.6), Chain(3, 0.3)], weigh=True) for _ in range(2))
        for known in range(1, cut + 1):
            assert one.propose(answer[:known], 4) == two.propose(other[:known], 4)
