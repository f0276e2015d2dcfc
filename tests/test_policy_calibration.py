"""v(M) measured once: what is timed, what it is kept under, and what a bad file does."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

import pytest
import torch

from tiny import prompt, tiny_llama
from xspec_runtime import calibration
from xspec_runtime.calibration import (
    Calibration,
    cache_folder,
    calibrate,
    drafting_costs,
    riding_cost,
)
from xspec_runtime.drafters.base import DraftTree, Request
from xspec_runtime.models import mini
from xspec_runtime.targets import heights
from xspec_runtime.targets.llama import LlamaTarget
from xspec_runtime.targets.transformers import TransformersTarget


class Cache:
    def check_room(self, rows: int) -> None:
        pass


class Timed:
    """A target whose verify of n rows takes ``1 + n / 10``; every other one is disturbed."""

    device = torch.device("cpu")
    backend, dtype = "auto", torch.float32
    cache = Cache()

    def __init__(self, model=None, slower: float = 1.0) -> None:
        self.model = model or tiny_llama(1)
        self.clock, self.calls, self.slower = 0.0, 0, slower

    def prefill(self, inputs, logits_processor=None, drafted=()) -> None:
        self.clock += 100.0 + 0.5 * len(drafted)

    def forward(self, tree: DraftTree) -> int:
        self.calls += 1
        disturbance = 5.0 if self.calls % 2 else 0.0
        self.clock += self.slower * (1 + len(tree) / 10) + disturbance
        return len(tree)

    def accept(self, tree: DraftTree, logits: int, context) -> None:
        assert logits == len(tree)


@pytest.fixture
def target(monkeypatch) -> Timed:
    timed = Timed()
    monkeypatch.setattr(heights, "perf_counter", lambda: timed.clock)
    return timed


@pytest.fixture
def folder(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("XSPEC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


COSTS = [(1 + m / 10) / 1.1 for m in range(1, 21)]


def test_costs_are_relative_to_one_row(target: Timed) -> None:
    found = calibrate(target, 20)
    assert found.costs() == pytest.approx(COSTS)
    assert found.step == pytest.approx(1.1) and not found.cached
    assert calibrate(target, 1).costs() == [1.0]
    with pytest.raises(ValueError, match=r"rows must be in 1\.\.64, got 65"):
        calibrate(target, 65)


def test_it_is_measured_once(target: Timed, folder: Path) -> None:
    first = calibrate(target, 20)
    calls = target.calls
    again = calibrate(target, 20)
    assert again.cached and target.calls == calls and again.seconds == first.seconds
    (file,) = folder.iterdir()
    kept = json.loads(file.read_text())
    assert kept["schema"] == calibration.SCHEMA and kept["key"]["engine"] == "Timed"
    # Another height, thread count, type, model or version is another measurement.
    assert not calibrate(target, 8).cached


@pytest.mark.parametrize("change", ["threads", "dtype", "model", "layers", "torch", "backend"])
def test_what_may_change_the_times_is_in_the_key(
    target: Timed, folder: Path, monkeypatch, change: str
) -> None:
    calibrate(target, 4)
    found = dict(calibration.environment())
    if change == "dtype":
        target.dtype = torch.bfloat16
    elif change == "backend":
        target.backend = "torch"
    elif change == "model":
        target.model.config.hidden_size += 1
    elif change == "layers":
        target.model.lm_head = torch.nn.Identity()
    else:
        monkeypatch.setattr(calibration, "environment", lambda: {**found, change: "other"})
    assert not calibrate(target, 4).cached
    assert len(list(folder.iterdir())) == 2
    target.model.config._name_or_path = "elsewhere"
    assert calibrate(target, 4).cached


def damage(kept: dict, how: str) -> str:
    if how == "no JSON":
        return "{"
    if how == "empty":
        return ""
    if how == "list":
        return "[]"
    if how == "schema":
        kept["schema"] = "xspec.calibration/0"
    if how == "foreign":
        kept["key"]["machine"] = "another"
    if how == "missing":
        del kept["seconds"]["4"]
    if how in ("negative", "text", "bool"):
        kept["seconds"]["4"] = {"negative": -1.0, "text": "1", "bool": True}[how]
    if how == "infinite":
        return json.dumps(kept).replace(f'"4": {kept["seconds"]["4"]}', '"4": Infinity')
    return json.dumps(kept)


HOW = ("no JSON", "empty", "list", "schema", "foreign", "missing", "negative", "text", "bool",
       "infinite")  # fmt: skip


@pytest.mark.parametrize("how", HOW)
def test_a_bad_file_is_measured_anew_and_replaced(target: Timed, folder: Path, how: str) -> None:
    first = calibrate(target, 4)
    (file,) = folder.iterdir()
    good = file.read_text()
    bad = damage(json.loads(good), how)
    assert bad != good
    file.write_text(bad)
    with pytest.warns(RuntimeWarning, match="is measured anew") as said:
        found = calibrate(target, 4)
    assert len(said) == 1 and str(file) in str(said[0].message)
    assert not found.cached and found.costs() == pytest.approx(first.costs())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert calibrate(target, 4).cached
    assert [path.name for path in folder.iterdir()] == [file.name]


def test_a_folder_that_cannot_be_written_is_only_a_warning(
    target: Timed, monkeypatch, tmp_path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XSPEC_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(RuntimeWarning, match=r"v\(M\) is not kept"):
        assert calibrate(target, 20).costs() == pytest.approx(COSTS)


def test_one_switch_names_the_folder_or_turns_it_off(monkeypatch, tmp_path) -> None:
    assert os.environ["XSPEC_CACHE"] == "off" and cache_folder() is None
    monkeypatch.setenv("XSPEC_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("XSPEC_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "xspec"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "xspec"


def test_times_between_measured_heights_lie_on_a_line() -> None:
    assert Calibration({1: 2.0, 2: 2.0, 4: 6.0}).costs() == [1.0, 1.0, 2.0, 3.0]


def test_real_targets_are_calibrated(folder: Path) -> None:
    model = mini.load("assistant")
    for target in (TransformersTarget(model, 192), LlamaTarget(model, 192)):
        for cached in (False, True):
            found = calibrate(target, 48)
            costs = found.costs()
            assert found.cached == cached
            assert len(costs) == 48 and costs[0] == 1.0 and min(costs) > 0
    assert len(list(folder.iterdir())) == 2
    with pytest.raises(RuntimeError, match="capacity 64"):
        calibrate(TransformersTarget(model, 64), 16)


class Slow:
    """A drafter whose clock runs: 3 to begin, 0.5 and 0.25 a row to propose."""

    name = "slow"

    def __init__(self) -> None:
        self.clock, self.ended = 0.0, []

    def begin(self, request: Request) -> None:
        self.clock += 3.0
        self.known = 0

    def propose(self, context, rows: int) -> DraftTree:
        assert len(context) > self.known
        self.known = len(context)
        self.clock += 0.5 + 0.25 * rows
        return DraftTree.root(context[-1])

    def end(self, answer) -> None:
        self.ended.append(list(answer))


def test_what_drafting_costs_is_measured_too(target: Timed) -> None:
    drafter = Slow()
    costs = drafting_costs(drafter, Request(), 8, 2.0, clock=lambda: drafter.clock)
    assert costs.begin == pytest.approx(1.5)
    expected = [0.0, *((0.5 + 0.25 * m) / 2.0 for m in range(2, 9))]
    assert list(costs.rows) == pytest.approx(expected)
    assert [costs.of(m) for m in (1, 8, 20)] == pytest.approx([0.0, 1.25, 1.25])
    assert drafter.ended == [[]]
    with pytest.raises(ValueError, match="step positive, got 8 and 0"):
        drafting_costs(drafter, Request(), 8, 0.0)
    cost = riding_cost(target, {}, 6, 2.0, clock=lambda: target.clock)
    assert cost == pytest.approx(0.25)


def test_rows_ride_in_a_real_prefill() -> None:
    target = TransformersTarget(tiny_llama(2), 96)
    assert riding_cost(target, {"input_ids": prompt(2)}, 6, 1.0, repeats=1) >= 0.0
