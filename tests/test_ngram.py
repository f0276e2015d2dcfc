from __future__ import annotations

import random

import pytest

from ngram_backends import BACKENDS, memory_maker
from xspec_runtime.data.pairs import read_pairs
from xspec_runtime.drafters.base import Drafter, DraftTree, Request
from xspec_runtime.drafters.ngram import NgramDrafter


@pytest.fixture(params=BACKENDS)
def make(request):
    """NgramMemory of one backend."""
    return memory_maker(request.param)


def random_answers(rng: random.Random, count: int, vocab: int = 6, longest: int = 30):
    return [[rng.randrange(vocab) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def depths(tree: DraftTree) -> list[int]:
    depth = [0]
    for parent in tree.parent_idx[1:]:
        depth.append(depth[parent] + 1)
    return depth


def assert_valid(tree: DraftTree, root: int, rows: int) -> None:
    assert len(tree) <= rows
    assert (tree.tokens[0], tree.parent_idx[0], tree.scores[0]) == (root, -1, 1.0)
    edges = set()
    for i in range(1, len(tree)):
        parent = tree.parent_idx[i]
        assert 0 <= parent < i
        assert 0 < tree.scores[i] <= tree.scores[parent]
        edges.add((parent, tree.tokens[i]))
    assert len(edges) == len(tree) - 1, "siblings with the same token"


@pytest.mark.parametrize("chain", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 6, 16, 64])
def test_proposals_are_valid_trees(make, rng, rows, chain):
    memory = make()
    memory.extend(random_answers(rng, 40, vocab=4))
    drafter = NgramDrafter(memory, online=False, chain=chain)
    assert isinstance(drafter, Drafter)
    for answer in random_answers(rng, 10, vocab=4):
        drafter.begin(Request(prompt_ids=[1, 2, 3]))
        for i in range(1, len(answer) + 1):
            tree = drafter.propose(answer[:i], rows)
            assert_valid(tree, answer[i - 1], rows)
            if chain:
                assert tree.parent_idx == list(range(-1, len(tree) - 1))


def test_trees_hold_siblings_best_first(make):
    memory = make(recency=0)
    memory.extend([[9, 1, 5]] * 5 + [[9, 2, 6]] * 4 + [[7] * 9])
    tree = NgramDrafter(memory, online=False).propose([9], 16)
    assert tree.scores == sorted(tree.scores, reverse=True)
    first = [tree.tokens[i] for i in range(len(tree)) if tree.parent_idx[i] == 0]
    assert first[:2] == [1, 2]
    chain = NgramDrafter(memory, online=False, chain=True).propose([9], 3)
    assert chain.tokens == [9, 1, 5]


def test_incremental_context_equals_a_fresh_start(make, rng):
    memory = make()
    memory.extend(random_answers(rng, 40))
    steady = NgramDrafter(memory, online=False)
    for answer in random_answers(rng, 10):
        steady.begin(Request([3, 1, 2]))
        known = 0
        while known < len(answer):
            known = min(len(answer), known + rng.randint(1, 4))
            fresh = NgramDrafter(memory, online=False)
            fresh.begin(Request([3, 1, 2]))
            assert steady.propose(answer[:known], 16) == fresh.propose(answer[:known], 16)


def test_a_memory_that_changes_within_a_request_is_followed(make, rng):
    memory = make(max_tokens=120)
    memory.extend(random_answers(rng, 20))
    drafter = NgramDrafter(memory, online=False)
    for answer in random_answers(rng, 10):
        drafter.begin(Request())
        for i in range(1, len(answer) + 1):
            fresh = NgramDrafter(memory, online=False)
            assert drafter.propose(answer[:i], 16) == fresh.propose(answer[:i], 16)
            memory.add(rng.choice(random_answers(rng, 3)))


def test_only_an_online_drafter_learns_and_only_at_the_end(make):
    for online in (False, True):
        memory = make()
        drafter = NgramDrafter(memory, online=online)
        drafter.begin(Request(prompt_ids=[5, 6, 7, 8]))
        drafter.propose([1, 2, 3], 8)
        assert len(memory) == 0 and memory.version == 0
        drafter.end([1, 2, 3, 4])
        assert memory.answers == ([[1, 2, 3, 4]] if online else [])


def test_prompt_and_own_answer_are_copied_and_then_forgotten(make):
    drafter = NgramDrafter(make(), online=False)
    drafter.begin(Request(prompt_ids=[5, 6, 7, 8, 9]))
    assert drafter.propose([5, 6, 7], 8).tokens == [7, 8, 9, 5, 6, 7, 8, 9]
    drafter.begin(Request())
    assert drafter.propose([5, 6, 7], 8).tokens == [7]
    drafter.begin(Request())
    assert drafter.propose([5, 6, 7, 8, 5, 6, 7], 3).tokens == [7, 8, 5]
    # Two places: the one with the longer agreement comes first, the other beside it.
    drafter.begin(Request(prompt_ids=[1, 2, 3, 4, 9, 2, 3, 6]))
    tree = drafter.propose([1, 2, 3], 16)
    assert (tree.tokens[1], tree.parent_idx[1]) == (4, 0)
    assert tree.scores[tree.child(0, 6)] < tree.scores[1]
    plain = NgramDrafter(make(), online=False, copy=False)
    plain.begin(Request(prompt_ids=[5, 6, 7, 8, 9]))
    assert plain.propose([5, 6, 7], 8).tokens == [7]


def test_nothing_is_drafted_beyond_the_usual_end(make):
    memory = make()
    memory.extend([list(range(10))] * 5)
    drafter = NgramDrafter(memory, online=False, copy=False)
    assert max(depths(drafter.propose(list(range(4)), 64))) == 5
    assert len(drafter.propose(list(range(9)), 64)) == 1
    drafter.begin(Request())
    assert len(drafter.propose([*range(10), *range(3)], 64)) > 1
    memory = make()
    memory.extend([list(range(10))] * 5 + [list(range(12))])
    assert memory.usual_end() is None


def test_bad_calls_are_refused(make):
    drafter = NgramDrafter(make(), online=False)
    with pytest.raises(ValueError, match="at least one token"):
        drafter.propose([], 4)
    for rows in (0, 65):
        with pytest.raises(ValueError, match="rows must be from 1 to 64"):
            drafter.propose([1], rows)
    drafter.propose([1, 2], 4)
    with pytest.raises(ValueError, match="call begin first"):
        drafter.propose([1], 4)


def proposals(make, train, answers, cut: int, online: bool, chain: bool) -> list[DraftTree]:
    """All proposals with at most `cut` tokens of the last answer known, the others whole."""
    memory = make()
    memory.extend(train)
    drafter = NgramDrafter(memory, online, chain=chain)
    trees = []
    for number, answer in enumerate(answers):
        drafter.begin(Request(prompt_ids=[1, 2, 3]))
        last = number == len(answers) - 1
        trees += [
            drafter.propose(answer[:i], 16) for i in range(1, (cut if last else len(answer)) + 1)
        ]
        if not last:
            drafter.end(answer)
    return trees


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("chain", [False, True])
@pytest.mark.parametrize("online", [False, True])
def test_no_future(make, rng, request, recorded, chain, online):
    """Replacing the tokens after position i changes no proposal at or before i."""
    if recorded:
        shared = request.getfixturevalue("shared_dir")
        pairs = read_pairs(shared / "data" / "dsec_1s_token_pairs.jsonl", limit=60)
        answers = [list(pair.target) for pair in pairs]
        vocab = 32_000
    else:
        answers, vocab = random_answers(rng, 60), 6
    train, test = answers[:50], answers[50:55]
    for _ in range(6):
        cut = rng.randint(1, len(test[-1]))
        changed = [rng.randrange(vocab) for _ in test[-1][cut:]]
        other = [*test[:-1], test[-1][:cut] + changed]
        whole = proposals(make, train, test, len(test[-1]), online, chain)
        seen = proposals(make, train, other, len(other[-1]), online, chain)
        upto = sum(map(len, test[:-1])) + cut
        assert whole[:upto] == seen[:upto]
        # The memory must not have been reached through the caller's list either.
        assert proposals(make, train, other, cut, online, chain) == whole[:upto]


def test_a_drafter_that_peeks_is_caught(make, rng):
    """The check above can fail: a memory that holds the tested answer changes proposals."""
    answers = random_answers(rng, 20)
    other = answers[-1][:1] + [t + 1 for t in answers[-1][1:]] + [7]
    peeked = [
        proposals(make, [*answers[:-1], last], [last], 1, False, False)
        for last in (answers[-1], other)
    ]
    assert peeked[0] != peeked[1]
