from __future__ import annotations

import json
import random
from collections import Counter, defaultdict

import numpy as np
import pytest

from xspec_runtime.data.pairs import read_pairs
from xspec_runtime.drafters.base import Drafter, DraftTree, Request
from xspec_runtime.drafters.ngram import NgramDrafter, NgramMemory
from xspec_runtime.drafters.trie import OFFSET_BITS, Node

START = -1


def random_answers(rng: random.Random, count: int, vocab: int = 6, longest: int = 30):
    return [[rng.randrange(vocab) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def naive_counts(memory: NgramMemory) -> dict[tuple[int, ...], Counter[int]]:
    """Context -> weighted next tokens, counted the plain way from the stored answers."""
    counts: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
    answers = memory.answers
    for i, answer in enumerate(answers):
        weight = memory.settings.weight(len(answers) - 1 - i)
        text = [START, *answer]
        for end in range(1, len(text)):
            for n in range(min(memory.settings.order, end) + 1):
                counts[tuple(text[end - n : end])][text[end]] += weight
    return counts


def counted(memory: NgramMemory, context: list[int]) -> list[Counter[int]]:
    """The memory's next-token weights of every order that matches, order 0 first."""
    trie = memory._trie
    matches = memory.match(context)
    found = []
    for node in reversed(matches.nodes):
        weight = {
            t: child.count if isinstance(child, Node) else trie.weights[child >> OFFSET_BITS]
            for t, child in node.next.items()
        }
        found.append(Counter(weight))
        assert node.total == found[-1].total()
    single = matches.position
    for _ in range(matches.singles):
        found.append(Counter({trie.after(single): trie.weights[single >> OFFSET_BITS]}))
    return found


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


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("order", [1, 2, 5, 14])
def test_counts_equal_plain_counting(rng, order, batched):
    for vocab, bound, recency in [(1, 500, 0), (2, 60, 1), (4, 200, 3), (40, 90, 2)]:
        memory = NgramMemory(order=order, max_tokens=bound, recency=recency)
        answers = random_answers(rng, 60, vocab)
        if batched:
            memory.extend(answers[:50])
            memory.extend(answers[50:])
        else:
            for answer in answers:
                memory.add(answer)
        kept = memory.answers
        assert kept == answers[-len(kept) :]
        expected = naive_counts(memory)
        for _ in range(40):
            answer = rng.choice(answers)
            context = answer[: rng.randint(0, len(answer))]
            text = [START, *context]
            found = counted(memory, context)
            for n, counter in enumerate(found):
                assert counter == expected[tuple(text[len(text) - n :])]
            longer = tuple(text[len(text) - len(found) :])
            assert len(found) > min(order, len(text)) or longer not in expected


def test_forgetting_leaves_no_trace(rng):
    answers = random_answers(rng, 80)
    bounded = NgramMemory(max_tokens=200)
    for answer in answers:
        bounded.add(answer)
    fresh = NgramMemory(max_tokens=200)
    fresh.extend(bounded.answers)
    stats = bounded.statistics()
    assert stats.tokens == sum(map(len, bounded.answers)) <= 200
    assert stats.answers + stats.forgotten == 80 and stats.forgotten > 0
    for context in random_answers(rng, 50):
        assert bounded.predict(context) == fresh.predict(context)


def test_matches_grow_token_by_token(rng):
    memory = NgramMemory(order=4)
    memory.extend(random_answers(rng, 30))
    for answer in random_answers(rng, 20):
        matches = memory.match([])
        for i, token in enumerate(answer, 1):
            matches = memory.advance(matches, token)
            assert matches == memory.match(answer[:i])


def test_predict_is_a_distribution_that_follows_the_counts(rng):
    memory = NgramMemory(recency=0)
    memory.extend([[1, 2, 3]] * 8 + [[1, 2, 4]] * 2)
    found = memory.predict([1, 2])
    assert [token for token, _ in found[:2]] == [3, 4]
    assert found[0][1] > 0.5 > found[1][1] > 0
    memory = NgramMemory(share=1.0, discount=0.0, low_share=1.0)
    memory.extend(random_answers(rng, 40))
    for context in random_answers(rng, 30):
        assert sum(p for _, p in memory.predict(context)) == pytest.approx(1.0)
    memory = NgramMemory()
    memory.extend(random_answers(rng, 40))
    assert all(0 < sum(p for _, p in memory.predict(a)) < 1 for a in random_answers(rng, 30))


def test_recent_answers_weigh_more():
    alike, recent = NgramMemory(recency=0), NgramMemory(recency=3)
    for memory in (alike, recent):
        memory.extend([[1, 2]] * 40 + [[1, 3]] * 8)
    assert alike.predict([1])[0][0] == 2
    assert recent.predict([1])[0][0] == 3
    recent.extend([[1, 2]] * 40)
    assert recent.predict([1])[0][0] == 2


def test_the_heaviest_continuations_are_ranked(rng):
    """More of them than are kept: the heaviest, ties by token."""
    memory = NgramMemory(recency=0)
    seen = Counter(rng.choice([rng.randrange(40), rng.randrange(8)]) for _ in range(300))
    memory.extend([[token] for token in seen.elements()])
    expected = sorted(seen, key=lambda token: (-seen[token], token))[:12]
    assert [token for token, _ in memory.predict([])] == expected


@pytest.mark.parametrize("tokens", [[-1], [3, -2], [2**31]])
def test_bad_tokens_are_refused_before_anything_is_learned(tokens):
    memory = NgramMemory()
    with pytest.raises(ValueError, match="token ids must be from 0"):
        memory.extend([[1], tokens])
    with pytest.raises(TypeError):
        memory.add([1.5])
    assert len(memory) == 0 and memory.predict([]) == []


@pytest.mark.parametrize(
    "setting", [{"order": 0}, {"max_tokens": 0}, {"recency": -1}, {"share": 1.5}, {"order": 2.0}]
)
def test_bad_settings_are_named(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        NgramMemory(**setting)


def test_long_and_empty_answers():
    memory = NgramMemory(max_tokens=5)
    memory.add([])
    assert len(memory) == 0 and memory.version == 0
    memory.add(range(9))
    assert memory.answers == [[0, 1, 2, 3, 4]]


def test_save_and_load(tmp_path, rng):
    memory = NgramMemory(order=5, max_tokens=300, recency=2)
    for answer in random_answers(rng, 60):
        memory.add(answer)
    path = tmp_path / "deep" / "memory.safetensors"
    memory.save(path)
    again = NgramMemory.load(path)
    assert again.settings == memory.settings and again.answers == memory.answers
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    for context in random_answers(rng, 30):
        assert again.predict(context) == memory.predict(context)
    empty = NgramMemory()
    empty.save(path)
    assert len(NgramMemory.load(path)) == 0


def damaged(kind: str) -> bytes:
    from safetensors.numpy import save

    meta = {"format": "xspec.ngram_memory", "version": "1", "settings": "{}"}
    tensors = {"tokens": np.arange(4, dtype=np.int64), "lengths": np.array([1, 3], np.int64)}
    if kind == "version":
        meta["version"] = "2"
    elif kind == "settings":
        meta["settings"] = json.dumps({"order": 0})
    elif kind == "unknown setting":
        meta["settings"] = json.dumps({"colour": 1})
    elif kind == "lengths":
        tensors["lengths"] = np.array([1, 4], np.int64)
    elif kind == "negative":
        tensors["tokens"] -= 2
    elif kind == "dtype":
        tensors["tokens"] = tensors["tokens"].astype(np.float32)
    elif kind == "missing":
        del tensors["lengths"]
    whole = save(tensors, meta)
    return whole[:-5] if kind == "cut" else b"\x80\x04]." if kind == "pickle" else whole


def test_a_well_formed_file_loads(tmp_path):
    path = tmp_path / "m"
    path.write_bytes(damaged("none"))
    assert NgramMemory.load(path).answers == [[0], [1, 2, 3]]


@pytest.mark.parametrize(
    "kind",
    [
        *("version", "settings", "unknown setting", "lengths", "negative", "dtype", "missing"),
        *("cut", "pickle"),
    ],
)
def test_damaged_files_give_one_clear_error(tmp_path, kind):
    path = tmp_path / "m"
    path.write_bytes(damaged(kind))
    with pytest.raises(ValueError, match=r"m is not an n-gram memory: ."):
        NgramMemory.load(path)
    with pytest.raises(FileNotFoundError, match="absent"):
        NgramMemory.load(tmp_path / "absent")


@pytest.mark.parametrize("chain", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 6, 16, 64])
def test_proposals_are_valid_trees(rng, rows, chain):
    memory = NgramMemory()
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


def test_trees_hold_siblings_best_first():
    memory = NgramMemory(recency=0)
    memory.extend([[9, 1, 5]] * 5 + [[9, 2, 6]] * 4 + [[7] * 9])
    tree = NgramDrafter(memory, online=False).propose([9], 16)
    assert tree.scores == sorted(tree.scores, reverse=True)
    first = [tree.tokens[i] for i in range(len(tree)) if tree.parent_idx[i] == 0]
    assert first[:2] == [1, 2]
    chain = NgramDrafter(memory, online=False, chain=True).propose([9], 3)
    assert chain.tokens == [9, 1, 5]


def test_incremental_context_equals_a_fresh_start(rng):
    memory = NgramMemory()
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


def test_a_memory_that_changes_within_a_request_is_followed(rng):
    memory = NgramMemory(max_tokens=120)
    memory.extend(random_answers(rng, 20))
    drafter = NgramDrafter(memory, online=False)
    for answer in random_answers(rng, 10):
        drafter.begin(Request())
        for i in range(1, len(answer) + 1):
            fresh = NgramDrafter(memory, online=False)
            assert drafter.propose(answer[:i], 16) == fresh.propose(answer[:i], 16)
            memory.add(rng.choice(random_answers(rng, 3)))


def test_only_an_online_drafter_learns_and_only_at_the_end():
    for online in (False, True):
        memory = NgramMemory()
        drafter = NgramDrafter(memory, online=online)
        drafter.begin(Request(prompt_ids=[5, 6, 7, 8]))
        drafter.propose([1, 2, 3], 8)
        assert len(memory) == 0 and memory.version == 0
        drafter.end([1, 2, 3, 4])
        assert memory.answers == ([[1, 2, 3, 4]] if online else [])


def test_prompt_and_own_answer_are_copied_and_then_forgotten():
    drafter = NgramDrafter(NgramMemory(), online=False)
    drafter.begin(Request(prompt_ids=[5, 6, 7, 8, 9]))
    assert drafter.propose([5, 6, 7], 8).tokens == [7, 8, 9, 5, 6, 7]
    drafter.begin(Request())
    assert drafter.propose([5, 6, 7], 8).tokens == [7]
    drafter.begin(Request())
    assert drafter.propose([5, 6, 7, 8, 5, 6, 7], 3).tokens == [7, 8, 5]
    plain = NgramDrafter(NgramMemory(), online=False, copy=False)
    plain.begin(Request(prompt_ids=[5, 6, 7, 8, 9]))
    assert plain.propose([5, 6, 7], 8).tokens == [7]


def test_nothing_is_drafted_beyond_the_usual_end():
    memory = NgramMemory()
    memory.extend([list(range(10))] * 5)
    drafter = NgramDrafter(memory, online=False, copy=False)
    assert max(depths(drafter.propose(list(range(4)), 64))) == 5
    assert len(drafter.propose(list(range(9)), 64)) == 1
    drafter.begin(Request())
    assert len(drafter.propose([*range(10), *range(3)], 64)) > 1
    memory = NgramMemory()
    memory.extend([list(range(10))] * 5 + [list(range(12))])
    assert memory.usual_end() is None


def test_bad_calls_are_refused():
    drafter = NgramDrafter(NgramMemory(), online=False)
    with pytest.raises(ValueError, match="at least one token"):
        drafter.propose([], 4)
    for rows in (0, 65):
        with pytest.raises(ValueError, match="rows must be from 1 to 64"):
            drafter.propose([1], rows)
    drafter.propose([1, 2], 4)
    with pytest.raises(ValueError, match="call begin first"):
        drafter.propose([1], 4)


def proposals(train, answers, cut: int, online: bool, chain: bool) -> list[DraftTree]:
    """All proposals with at most `cut` tokens of the last answer known, the others whole."""
    memory = NgramMemory()
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
def test_no_future(rng, request, recorded, chain, online):
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
        whole = proposals(train, test, len(test[-1]), online, chain)
        seen = proposals(train, other, len(other[-1]), online, chain)
        upto = sum(map(len, test[:-1])) + cut
        assert whole[:upto] == seen[:upto]
        # The memory must not have been reached through the caller's list either.
        assert proposals(train, other, cut, online, chain) == whole[:upto]


def test_a_drafter_that_peeks_is_caught(rng):
    """The check above can fail: a memory that holds the tested answer changes proposals."""
    answers = random_answers(rng, 20)
    other = answers[-1][:1] + [t + 1 for t in answers[-1][1:]] + [7]
    peeked = [
        proposals([*answers[:-1], last], [last], 1, False, False) for last in (answers[-1], other)
    ]
    assert peeked[0] != peeked[1]


def test_nodes_stay_few_when_text_is_random(rng):
    memory = NgramMemory()
    memory.extend([[rng.randrange(32_000) for _ in range(50)] for _ in range(100)])
    assert memory.statistics().nodes < 1_000
    assert not any(
        isinstance(child, Node) and not child.count for child in memory._trie._root.next.values()
    )
