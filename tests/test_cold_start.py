"""Stages of a process from its start; a whole cold start takes seconds and is not run here."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from xspec_runtime import cold_start


def test_age_counts_from_the_start_of_the_process() -> None:
    code = "from xspec_runtime.cold_start import process_age as a; print(a())"
    before = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0 < float(done.stdout) <= time.monotonic() - before + 0.02


def test_stages_add_up(monkeypatch) -> None:
    clock = iter([1.0, 1.5, 4.0])
    monkeypatch.setattr(cold_start, "process_age", lambda: next(clock))
    stages = cold_start.Stages()
    for name in ("a", "b", "c"):
        stages.reached(name)
    assert stages.wall == {"a": 1.0, "b": 0.5, "c": 2.5}
    assert list(stages.cpu) == ["a", "b", "c"] and min(stages.cpu.values()) >= 0


def test_medians_over_processes(monkeypatch) -> None:
    names = (*cold_start.STAGES, *cold_start.REQUEST)
    rows = iter([1, 2, 9])

    def run(command, **_):
        line = dict.fromkeys(names, next(rows))
        text = f'noise\n{{"wall": {line}, "cpu": {line}}}\n'.replace("'", '"')
        return subprocess.CompletedProcess(command, 0, text, "")

    monkeypatch.setattr(subprocess, "run", run)
    found = cold_start.measure(Path("e"), Path("v"), 3)
    assert found["wall"]["torch"] == 2 and found["cpu"]["to first token"] == 2 * 7


def test_a_process_that_fails_is_named(monkeypatch) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "Traceback\nKeyError: 'x'\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(RuntimeError, match="the process failed: KeyError: 'x'"):
        cold_start.measure(Path("e"), Path("v"), 1)


@pytest.mark.parametrize("arguments", [["x"], ["0"], ["1", "f.json", "more"]])
def test_bad_arguments(arguments: list[str], monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["cold_start", *arguments])
    with pytest.raises(SystemExit) as stop:
        cold_start.main()
    assert stop.value.code == 2
    assert "expected [REPEATS [FILE.json]]" in capsys.readouterr().err
