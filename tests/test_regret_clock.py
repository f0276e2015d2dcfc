"""Slower than plain decoding beyond its own spread: the comparison, and a small run of it."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest

from running import bench_script, invoke
from xspec_runtime.regret.run import AGAIN, RegretOptions, compare, spread
from xspec_runtime.workloads import PLAIN

BENCH = Path(__file__).resolve().parent.parent / "bench" / "regret.py"


def test_the_spread_is_that_of_equal_things() -> None:
    low, high = spread([1.0] * 50, [1.0] * 50)
    assert low == high == 1.0
    # 2 of 100 ratios, and 2 the other way round, are far out: beyond 95 %.
    first = [1.0 + i % 11 / 100 for i in range(98)] + [2.0, 2.0]
    low, high = spread(first, [1.0] * 100)
    assert high == pytest.approx(1.1, abs=0.01) and low == pytest.approx(1 / high)
    assert spread([2.0], [1.0]) == pytest.approx((0.5, 2.0), abs=0.1)


def test_arms_are_compared_sample_by_sample() -> None:
    plain = {f"scene {i}": [10.0, 10.0, 10.0] for i in range(10)}
    again = {name: [10.1, 9.9, 10.0] for name in plain}
    half = {name: [5.0, 5.0, 30.0] for name in plain}
    slow = {name: [12.0 if name < "scene 3" else 8.0] * 3 for name in plain}
    within, arms = compare({PLAIN: plain, AGAIN: again, "half": half, "slow": slow})
    by = {arm["name"]: arm for arm in arms}
    assert list(by) == [AGAIN, "half", "slow"]
    assert 1.0 <= within["samples"][1] <= within["runs"][1] <= 1.02
    assert by["half"]["slower_samples"] == 0.0
    assert by["half"]["slower_runs"] == pytest.approx(1 / 3)
    assert by["slow"]["slower_samples"] == pytest.approx(0.3)
    assert by["slow"]["worst_sample"] == pytest.approx(1.2)
    assert by["slow"]["speedup"] == pytest.approx(10 / 9.2)
    assert by["half"]["median_ratio"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, r"samples must be in 1\.\.1000, got 0"),
        ({"repeats": 1}, "repeats must be in 2"),
        ({"arms": "draft,frob"}, r"unknown arms \['frob'\]"),
        ({"arms": ""}, "one or more different names"),
        ({"arms": "tree,tree"}, "one or more different names"),
        ({"limit": 3}, "limit goes with pairs"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RegretOptions(**options).names()


@pytest.fixture
def bench() -> ModuleType:
    return bench_script("regret")


def test_command_writes_what_it_measured(bench, tmp_path) -> None:
    pairs, file = tmp_path / "pairs.jsonl", tmp_path / "regret.json"
    row = {"egpt_tokens": [1, 2, 3], "vl_tokens": [1, 2, 3, 4, 5, 6]}
    pairs.write_text(f"{json.dumps(row)}\n" * 6)
    arguments = ["--samples", 1, "--repeats", 2, "--arms", "ngram_cold,adapter", "--pairs", pairs]
    done = invoke(bench.app, *arguments, "--json", file, "--debug")
    assert done.exit_code == 0, done.output
    assert "adapter priced" in done.stdout and "memory tree, cold" in done.stdout
    found = json.loads(file.read_text())
    assert found["schema"] == "xspec.regret/1" and len(found["counted"]) == 45
    names = [PLAIN, AGAIN, "ngram_cold", "ngram_cold priced", "adapter", "adapter priced"]
    assert list(found["times_ms"]) == names
    assert all(len(times) == 2 for arm in found["times_ms"].values() for times in arm.values())
    assert len(found["calibration"]["row_costs"]) == 16
    drafting = found["calibration"]["drafting"]
    # The adapter's draft answers the whole question before the first round.
    assert drafting["adapter"]["begin"] > drafting["ngram_cold"]["begin"]


def test_command_refuses_before_it_runs(bench, tmp_path) -> None:
    done = invoke(bench.app, "--arms", "frob")
    assert done.exit_code == 2 and "unknown arms ['frob']" in done.output
    assert "Traceback" not in done.output
    (tmp_path / "folder").mkdir()
    done = invoke(bench.app, "--json", tmp_path / "folder")
    assert done.exit_code == 2 and "it is a folder" in " ".join(done.output.split())
