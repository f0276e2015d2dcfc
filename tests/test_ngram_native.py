"""The native memory: equal to the one in Python, usable from threads, clean under sanitizers."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from ngram_backends import BACKENDS, memory_maker
from xspec_kernels import ngram
from xspec_runtime.data.pairs import read_pairs
from xspec_runtime.drafters.base import DraftTree, Request
from xspec_runtime.drafters.ngram import NgramDrafter, NgramMemory

ROOT = Path(__file__).resolve().parent.parent
DRIVER = Path(__file__).resolve().parent / "ngram" / "driver.cpp"
SANITIZERS = ("address,undefined", "thread")
ROWS = (1, 2, 6, 16, 64)


def both(**settings) -> list[NgramMemory]:
    return [memory_maker(backend)(**settings) for backend in BACKENDS]


def random_settings(rng: random.Random) -> dict:
    return {
        "order": rng.choice([1, 2, 5, 14, 30]),
        "max_tokens": rng.choice([5, 60, 400, 3000]),
        "recency": rng.choice([0, 1, 3, 8]),
        "share": rng.choice([0.25, 0.6, 1.0]),
        "low_share": rng.choice([0.65, 1.0]),
        "discount": rng.choice([0.0, 0.5, 1.0]),
    }


def assert_equal_knowledge(memories: list[NgramMemory], context: list[int]) -> None:
    python, native = memories
    assert python.counts(context) == native.counts(context)
    assert python.predict(context) == native.predict(context)
    assert python.statistics() == native.statistics()
    assert python.opening(20, 0.3) == native.opening(20, 0.3)
    assert (python.version, python.usual_end()) == (native.version, native.usual_end())


def assert_equal_trees(found: list[DraftTree]) -> None:
    """Scores too, to the last bit."""
    assert found[0] == found[1]


@pytest.mark.parametrize("vocab", [1, 2, 4, 30, 300])
def test_random_streams_give_equal_trees(rng, vocab):
    def answer(longest: int) -> list[int]:
        skewed = rng.random() < 0.7
        draw = lambda: int(rng.expovariate(3 / vocab)) if skewed else rng.randrange(vocab)  # noqa: E731
        return [min(draw(), vocab - 1) for _ in range(rng.randint(1, longest))]

    for _ in range(4):
        settings = random_settings(rng)
        print(settings)
        memories = both(**settings)
        chain, copy = rng.random() < 0.3, rng.random() < 0.7
        drafters = [NgramDrafter(m, online=True, chain=chain, copy=copy) for m in memories]
        learned = [answer(40) for _ in range(rng.randint(0, 40))]
        for memory in memories:
            memory.extend(learned)
        for _ in range(12):
            text, prompt, known = answer(40), answer(40), 0
            for drafter in drafters:
                drafter.begin(Request(prompt_ids=prompt))
            while known < len(text):
                known = min(len(text), known + rng.randint(1, 5))
                rows = rng.choice(ROWS)
                assert_equal_trees([d.propose(text[:known], rows) for d in drafters])
                if rng.random() < 0.1:
                    other = answer(40)
                    for memory in memories:
                        memory.add(other)
            for drafter in drafters:
                drafter.end(text)
            assert_equal_knowledge(memories, answer(20))
        assert memories[0].answers == memories[1].answers


@pytest.mark.parametrize("bound", [500_000, 3_000])
def test_recorded_answers_give_equal_trees(rng, shared_dir, bound):
    pairs = read_pairs(shared_dir / "data" / "dsec_1s_token_pairs.jsonl", limit=160)
    memories = both(max_tokens=bound)
    drafters = [NgramDrafter(memory, online=True) for memory in memories]
    for memory in memories:
        memory.extend(pair.target for pair in pairs[:100])
    for pair in pairs[100:]:
        known = 1
        for drafter in drafters:
            drafter.begin(Request(prompt_ids=list(pair.draft)))
        while known < len(pair.target):
            context = list(pair.target[:known])
            assert_equal_trees([d.propose(context, 16) for d in drafters])
            known += rng.randint(1, 6)
        for drafter in drafters:
            drafter.end(pair.target)
    assert_equal_knowledge(memories, list(pairs[-1].target[:20]))


def test_an_unequal_tree_is_noticed(rng):
    """The comparison above can fail."""
    first, second = both(order=5)
    first.extend([[1, 2, 3]] * 4)
    second.extend([[1, 2, 3]] * 3)
    with pytest.raises(AssertionError):
        assert_equal_trees([NgramDrafter(m, False).propose([1], 8) for m in (first, second)])


@pytest.mark.parametrize("backend", BACKENDS)
def test_threads_read_while_one_learns(seed, backend):
    """Every proposal equals that of a memory which knows a whole number of the answers."""
    rng = random.Random(seed)
    answers = [[rng.randrange(5) for _ in range(25)] for _ in range(40)]
    context = answers[0][:6]
    make = memory_maker(backend)
    expected, stepwise = [], make()
    for answer in answers:
        stepwise.add(answer)
        expected.append(NgramDrafter(stepwise, online=False).propose(context, 16))

    memory = make()
    memory.add(answers[0])
    done, wrong, seen = threading.Event(), [], []

    def read() -> None:
        latest = 0
        while not done.is_set() or latest < len(answers) - 1:
            drafter = NgramDrafter(memory, online=False)
            tree = drafter.propose(context, 16)
            later = [i for i in range(latest, len(answers)) if expected[i] == tree]
            if not later:
                wrong.append(tree)
                return
            latest = later[0]
            seen.append(latest)
            if done.is_set() and tree == expected[-1]:
                return

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    for answer in answers[1:]:
        memory.add(answer)
    done.set()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == [] and len(seen) >= 3
    assert NgramDrafter(memory, online=False).propose(context, 16) == expected[-1]


def test_a_proposal_waits_without_the_gil(rng):
    """One that waits for a writer must let the other threads of Python run."""
    memory = memory_maker("native")(max_tokens=10**6)
    writer = threading.Thread(
        target=memory.extend, args=([[rng.randrange(50) for _ in range(100)] for _ in range(300)],)
    )
    writer.start()
    drafter = NgramDrafter(memory, online=False)
    for i in range(1, 200):
        drafter.propose([1] * i, 16)
    writer.join(timeout=60)
    assert not writer.is_alive() and len(memory) == 300


def test_backends_are_named_and_refused():
    with pytest.raises(ValueError, match="expected one of auto, python, native"):
        NgramMemory(backend="cpp")
    assert NgramMemory(backend="python").backend == "python"
    wanted = "python" if ngram.unusable() else "native"
    assert NgramMemory().backend == wanted


def test_without_the_native_module_auto_takes_python_and_a_name_raises():
    code = (
        "import sys; sys.modules['xspec_kernels._C'] = None\n"
        "from xspec_runtime import NgramMemory\n"
        "print(NgramMemory().backend)\n"
        "NgramMemory(backend='native')\n"
    )
    paths = os.pathsep.join([str(ROOT), str(ROOT / "python")])
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert result.stdout.split() == ["python"]
    assert "RuntimeError: NgramMemory: the native module xspec_kernels._C" in result.stderr


def test_raw_calls_cannot_break_the_native_memory():
    memory_maker("native")
    counts = ngram.counts(14, 10, 0, 0.25, 0.65, 1.0)
    for bad in ([[]], [[-1]], [[2**31]], [[1] * 11]):
        with pytest.raises(ValueError):
            counts.extend(bad)
    for order, bound, recency in ((0, 10, 0), (65, 10, 0), (14, 0, 0), (14, 10, 9)):
        with pytest.raises(ValueError, match="out of range"):
            ngram.counts(order, bound, recency, 0.25, 0.65, 1.0)
    request = NgramMemory(backend="native").request(chain=False, copy=True)
    for fresh, rows in (([], 4), ([1], 0), ([1], 65)):
        with pytest.raises(ValueError, match="propose needs"):
            request.propose(fresh, rows)
    assert request.propose([-5], 4) == ([-5], [-1], [1.0])


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_clean_under_sanitizers(seed, tmp_path, sanitizer):
    if not shutil.which("g++"):
        pytest.skip("g++ is not installed")
    flags = ["-std=c++17", "-O1", "-g1", "-ffp-contract=off", "-pthread"]
    flags += [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", f"-I{ROOT / 'csrc'}"]
    probe = tmp_path / "probe.cpp"
    probe.write_text("int main() {}")
    program = tmp_path / "driver"
    compiled = subprocess.run(["g++", *flags, "-o", program, probe], capture_output=True)
    if compiled.returncode or subprocess.run([program], capture_output=True).returncode:
        pytest.skip(f"programs built with -fsanitize={sanitizer} do not run here")
    sources = [DRIVER, *sorted((ROOT / "csrc" / "cpu").glob("ngram*.cpp"))]
    subprocess.run(["g++", *flags, "-o", program, *sources], check=True)
    result = subprocess.run([program, str(seed % 1000)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr[:4000]
    assert float(result.stdout) > 0
