"""The soak itself: it finds what is wrong, repeats itself, and stops when told."""

from __future__ import annotations

import json
import random
import runpy
from collections import Counter
from pathlib import Path

import pytest
import torch

from running import invoke
from xspec_runtime.drafters.ngram import NgramDrafter
from xspec_runtime.engine import Generation
from xspec_runtime.soak import run as module
from xspec_runtime.soak.bench import ENGINES, SoakBench
from xspec_runtime.soak.faults import DrafterFault
from xspec_runtime.soak.memory import MemorySample, MemoryWatch, growth
from xspec_runtime.soak.plan import PROCESSED, SHARED, SINGLE, Plan, plan_call, prompts
from xspec_runtime.soak.report import summary
from xspec_runtime.soak.run import Soak, SoakOptions, judge, run_soak
from xspec_runtime.targets.transformers import TransformersTarget

SCRIPT = Path(__file__).parent.parent / "bench" / "soak.py"


def test_a_few_hundred_requests(tmp_path, seed: int) -> None:
    """Every engine is in the long run; these two share no code between token and logits."""
    path = tmp_path / "soak.json"
    options = SoakOptions("test", 5, 200, seed % 10_000, "transformers,graphs", path)
    results = run_soak(options)
    assert results["wrong"] == 0, results["problems"]
    counts = results["counts"]
    assert results["complete"] and results["requests"] >= 200
    assert counts["complete"] > 120 and counts["cancelled"] > 3 and counts["failed"] > 3
    assert results["verifies"] > 250
    grown = results["memory"]["growth"]
    assert {"heap", "blocks", "rss"} == set(grown) and results["memory"]["flat"], grown
    written = json.loads(path.read_text())
    assert written == json.loads(json.dumps(results)) and written["schema"] == "xspec.soak/1"
    assert f"{results['requests']} requests in" in summary(results)[0]


def make_bench() -> SoakBench:
    return SoakBench(5, ["transformers"], prompts(5, PROCESSED + 1))


@pytest.fixture(scope="module")
def small() -> SoakBench:
    return make_bench()


def soak_of(bench: SoakBench, calls: int) -> Soak:
    soak = Soak(bench, 5)
    for number in range(calls):
        soak.run(plan_call(5, number, ["transformers"], len(bench.prompts)))
    return soak


def test_a_seed_repeats_the_run() -> None:
    first, second = soak_of(make_bench(), 6), soak_of(make_bench(), 6)
    assert not first.wrong and not second.wrong
    assert first.counts == second.counts and first.verifies == second.verifies
    other = [plan_call(6, n, ENGINES, 9) for n in range(12)]
    assert other == [plan_call(6, n, ENGINES, 9) for n in range(12)]
    assert other != [plan_call(7, n, ENGINES, 9) for n in range(12)]


def test_plans_reach_everything() -> None:
    calls = [plan_call(1, n, ENGINES, 17) for n in range(2000)]
    plans = [plan for call in calls for plan in call.plans]
    assert {call.engine for call in calls} == set(ENGINES)
    assert {call.fault for call in calls} == {"", *SHARED}
    faults = Counter(plan.fault for plan in plans)
    assert set(faults) == {"", *SINGLE} and min(faults.values()) > 20
    assert {plan.cancel for plan in plans} >= {None, 0, 1, 8}
    assert {len(call.plans) for call in calls} == set(range(1, 12))
    assert all((plan.prompt == 16) == (plan.fault == "full") for plan in plans)


def test_a_wrong_token_is_found(small: SoakBench, monkeypatch) -> None:
    commit = TransformersTarget.commit

    def careless(self, verdict) -> None:
        """The rows of an accepted path stay where they were."""
        verdict.accepted, kept = 0, verdict.accepted
        commit(self, verdict)
        self.cache.advance(kept)

    monkeypatch.setattr(TransformersTarget, "commit", careless)
    soak = soak_of(small, 30)
    assert soak.wrong > 0 and "is not plain decoding's" in soak.problems[0]
    assert "--seed 5, call" in soak.problems[0]


def test_what_a_request_may_come_back_with() -> None:
    sound, told = Plan(0, "guess", 0), Plan(0, "guess", 0, cancel=2)
    call = plan_call(0, 0, ENGINES, 9)
    call.fault = ""
    answer = [4, 5, 6]

    def verdict(plan: Plan, tokens: list[int], fired: bool = False, **fields) -> str:
        return judge(call, plan, Generation(tokens, **fields), answer, fired)

    assert not verdict(sound, answer) and not verdict(told, answer)
    assert "only" in verdict(sound, [4, 5])
    assert "is not plain" in verdict(sound, [4, 6, 6])
    assert not verdict(told, [4], cancelled=True)
    assert "nobody asked" in verdict(sound, [4], cancelled=True)
    assert "is not plain" in verdict(told, [5], cancelled=True)
    broken = Plan(0, "guess", 0, fault="propose")
    assert not verdict(broken, [4], error=DrafterFault())
    assert "KeyError" in verdict(broken, [4], error=KeyError())
    assert "fault: none" in verdict(sound, [4], error=DrafterFault())
    assert "no error" in verdict(Plan(0, "guess", 0, fault="full"), answer)
    call.fault = "nan"
    damaged = RuntimeError("the target's logits are NaN")
    assert not verdict(sound, [4], True, error=damaged)
    assert verdict(sound, [4], False, error=damaged)
    call.fault = "memory"
    with pytest.raises(RuntimeError) as full:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert not verdict(sound, [], True, error=full.value)


def test_growth_compares_windows() -> None:
    samples = [MemorySample(n, 0, 1000 + n // 10, 500, 0) for n in range(10, 1001, 10)]
    found = growth(samples)
    assert set(found) == {"heap", "blocks"}
    assert found["blocks"]["growth"] == 0.0
    assert found["heap"]["early"] == 1025 and found["heap"]["late"] == 1095
    assert found["heap"]["per_request"] == pytest.approx(0.1)
    assert growth([]) == {} and growth(samples[:1]) == {}


def test_a_leak_is_seen() -> None:
    watch, kept = MemoryWatch(), []
    try:
        for number in range(1, 101):
            kept.append(torch.zeros(4000))
            kept += [object() for _ in range(200)]
            watch.sample(number)
    finally:
        watch.close()
    first, last = watch.samples[0], watch.samples[-1]
    assert last.tensors - first.tensors == 99 * 16_000
    assert last.heap - first.heap >= 99 * 16_000
    assert last.blocks - first.blocks >= 99 * 200
    found = growth(watch.samples)
    assert found["heap"]["per_request"] >= 16_000 and found["blocks"]["per_request"] >= 200


def test_a_leaking_drafter_is_not_flat(small: SoakBench, monkeypatch) -> None:
    kept: list[torch.Tensor] = []
    end = NgramDrafter.end
    monkeypatch.setattr(
        NgramDrafter, "end", lambda self, a: kept.append(torch.zeros(1 << 18)) or end(self, a)
    )
    monkeypatch.setattr(module, "SoakBench", lambda *_: small)
    monkeypatch.setattr(module, "PROMPTS", len(small.prompts))
    results = run_soak(SoakOptions("test", 5, 110, 5, "transformers"))
    assert results["memory"]["flat"] is False and not results["wrong"]
    assert summary(results)[-1] == "memory: NOT flat"


def command(small: SoakBench, monkeypatch, *arguments: object):
    monkeypatch.setattr(module, "SoakBench", lambda *_: small)
    monkeypatch.setattr(module, "PROMPTS", len(small.prompts))
    app = runpy.run_path(str(SCRIPT))["app"]
    return invoke(app, "--seed", 5, "--engines", "transformers", *arguments)


def test_ctrl_c_writes_what_was_done(small: SoakBench, monkeypatch, tmp_path) -> None:
    run, path = Soak.run, tmp_path / "soak.json"

    def interrupted(self, call) -> None:
        if call.number == 6:
            raise KeyboardInterrupt
        run(self, call)

    with monkeypatch.context() as patch:
        patch.setattr(Soak, "run", interrupted)
        out = command(small, patch, "--json", path)
    assert out.exit_code == 130
    written = json.loads(path.read_text())
    assert not written["complete"] and written["calls"] == 6 and not written["wrong"]
    assert f"after {written['requests']} requests, which are written" in out.stderr
    assert "seed 5" in out.stdout
    # Nothing is left of it.
    again = command(small, monkeypatch, "--requests", 20)
    assert again.exit_code == 0, again.output
    assert "wrong: 0" in again.stdout


def test_a_real_interrupt_in_the_middle(small: SoakBench, monkeypatch, rng: random.Random) -> None:
    """Wherever it strikes, the decoders go on to be right."""
    forward = TransformersTarget.forward
    left = rng.randrange(40)

    def struck(self, *arguments):
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
        return forward(self, *arguments)

    soak = Soak(small, 5)
    monkeypatch.setattr(TransformersTarget, "forward", struck)
    numbers = iter(range(1000))
    with pytest.raises(KeyboardInterrupt):
        for number in numbers:
            soak.run(plan_call(5, number, ["transformers"], len(small.prompts)))
    for number in range(8):
        soak.run(plan_call(8, number, ["transformers"], len(small.prompts)))
    assert not soak.wrong, soak.problems


def test_failures_and_bad_options(small: SoakBench, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(module, "judge", lambda *_: "bad")
        out = command(small, patch, "--requests", 3)
    assert out.exit_code == 2 and "the soak of seed 5 failed" in out.stderr
    for arguments, message in (
        (("--minutes", 0), "--minutes must be above 0"),
        (("--requests", 0), "--requests must be in 1.."),
        (("--engines", "vllm"), "--engines must be of transformers, llama, graphs"),
    ):
        out = command(small, monkeypatch, *arguments)
        assert out.exit_code == 2 and message in out.stderr
