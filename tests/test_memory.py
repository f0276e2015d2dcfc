from __future__ import annotations

import json
import random
from collections import Counter, defaultdict

import numpy as np
import pytest

from ngram_backends import BACKENDS, memory_maker
from xspec_runtime.drafters.memory import NgramMemory
from xspec_runtime.drafters.trie import Node

START = -1


@pytest.fixture(params=BACKENDS)
def make(request):
    """NgramMemory of one backend."""
    return memory_maker(request.param)


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
    found = [Counter(order) for order in memory.counts(context)]
    if memory.backend == "python":
        nodes = memory._counts.match(context).nodes
        assert [node.total for node in reversed(nodes)] == [c.total() for c in found[: len(nodes)]]
    return found


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("order", [1, 2, 5, 14])
def test_counts_equal_plain_counting(make, rng, order, batched):
    for vocab, bound, recency in [(1, 500, 0), (2, 60, 1), (4, 200, 3), (40, 90, 2)]:
        memory = make(order=order, max_tokens=bound, recency=recency)
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


def test_forgetting_leaves_no_trace(make, rng):
    answers = random_answers(rng, 80)
    bounded = make(max_tokens=200)
    for answer in answers:
        bounded.add(answer)
    fresh = make(max_tokens=200)
    fresh.extend(bounded.answers)
    stats = bounded.statistics()
    assert stats.tokens == sum(map(len, bounded.answers)) <= 200
    assert stats.answers + stats.forgotten == 80 and stats.forgotten > 0
    for context in random_answers(rng, 50):
        assert bounded.predict(context) == fresh.predict(context)


def test_matches_grow_token_by_token(rng):
    memory = NgramMemory(order=4, backend="python")._counts
    memory.extend(random_answers(rng, 30))
    for answer in random_answers(rng, 20):
        matches = memory.match([])
        for i, token in enumerate(answer, 1):
            matches = memory.advance(matches, token)
            assert matches == memory.match(answer[:i])


def test_predict_is_a_distribution_that_follows_the_counts(make, rng):
    memory = make(recency=0)
    memory.extend([[1, 2, 3]] * 8 + [[1, 2, 4]] * 2)
    found = memory.predict([1, 2])
    assert [token for token, _ in found[:2]] == [3, 4]
    assert found[0][1] > 0.5 > found[1][1] > 0
    memory = make(share=1.0, discount=0.0, low_share=1.0)
    memory.extend(random_answers(rng, 40))
    for context in random_answers(rng, 30):
        assert sum(p for _, p in memory.predict(context)) == pytest.approx(1.0)
    memory = make()
    memory.extend(random_answers(rng, 40))
    assert all(0 < sum(p for _, p in memory.predict(a)) < 1 for a in random_answers(rng, 30))


def test_recent_answers_weigh_more(make):
    alike, recent = make(recency=0), make(recency=3)
    for memory in (alike, recent):
        memory.extend([[1, 2]] * 40 + [[1, 3]] * 8)
    assert alike.predict([1])[0][0] == 2
    assert recent.predict([1])[0][0] == 3
    recent.extend([[1, 2]] * 40)
    assert recent.predict([1])[0][0] == 2


def test_the_heaviest_continuations_are_ranked(make, rng):
    """More of them than are kept: the heaviest, ties by token."""
    memory = make(recency=0)
    seen = Counter(rng.choice([rng.randrange(40), rng.randrange(8)]) for _ in range(300))
    memory.extend([[token] for token in seen.elements()])
    expected = sorted(seen, key=lambda token: (-seen[token], token))[:12]
    assert [token for token, _ in memory.predict([])] == expected


@pytest.mark.parametrize("tokens", [[-1], [3, -2], [2**31]])
def test_bad_tokens_are_refused_before_anything_is_learned(make, tokens):
    memory = make()
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


def test_long_and_empty_answers(make):
    memory = make(max_tokens=5)
    memory.add([])
    assert len(memory) == 0 and memory.version == 0
    memory.add(range(9))
    assert memory.answers == [[0, 1, 2, 3, 4]]


def test_save_and_load(make, tmp_path, rng):
    memory = make(order=5, max_tokens=300, recency=2)
    for answer in random_answers(rng, 60):
        memory.add(answer)
    path = tmp_path / "deep" / "memory.safetensors"
    memory.save(path)
    again = NgramMemory.load(path, memory.backend)
    other = NgramMemory.load(path)
    assert again.backend == memory.backend
    assert again.settings == memory.settings and again.answers == memory.answers
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    for context in random_answers(rng, 30):
        assert again.predict(context) == memory.predict(context) == other.predict(context)
    empty = make()
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


def test_nodes_stay_few_when_text_is_random(make, rng):
    memory = make()
    memory.extend([[rng.randrange(32_000) for _ in range(50)] for _ in range(100)])
    assert memory.statistics().nodes < 1_000
    if memory.backend == "python":
        below = memory._counts._trie._root.next.values()
        assert not any(isinstance(child, Node) and not child.count for child in below)
