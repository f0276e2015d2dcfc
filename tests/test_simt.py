"""The CUDA C++ kernels on the host: the same source under a SIMT shim, with sanitizers.

No GPU is needed, only g++. Every planted fault must be reported, or the check itself is broken.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from simt.variants import CSRC, MUTANTS, SOUND, Mutant, generate, mutant, planted, source_of

HERE = Path(__file__).resolve().parent / "simt"
SANITIZED = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
FLAGS = ["-std=c++17", "-O1", "-g1", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
ORDERS = ("", "1", "2", "3")
CASES = 150
# The names of faults in the shim's own kernels, and what it must say of each.
SHIM_FAULTS = {
    "reversed_without_barrier": "wrong answer",
    "reversed_past_the_end": "runtime error: index 128 out of bounds",
    "stale_shared_memory": "wrong answer",
    "barrier_in_a_branch": "waits for ever in __syncthreads",
    "mask_of_absent_lanes": "waits for ever in __shfl_xor_sync",
    "lane_outside_its_mask": "the calling lane is not in its own mask",
    "source_outside_the_mask": "reads a lane outside its mask",
    "two_collectives_of_one_mask": "lanes of one mask meet in",
    "past_the_end": "heap-buffer-overflow",
}


def build(folder: Path, name: str) -> Path:
    """Compile tests/simt/<name>.cpp with sanitizers; skips where that cannot be done."""
    if not shutil.which("g++"):
        pytest.skip("g++ is not installed")
    command = ["g++", *FLAGS, *SANITIZED, f"-I{HERE}", f"-I{CSRC}", f"-I{folder}", "-o"]
    (folder / "empty.cpp").write_text("int main() {}")
    probe = subprocess.run(
        [*command, folder / "empty", folder / "empty.cpp"], capture_output=True, text=True
    )
    if probe.returncode:
        pytest.skip(f"g++ cannot build with sanitizers: {probe.stderr.strip()[-200:]}")
    sources = [HERE / f"{name}.cpp"]
    if name in MUTANTS:
        (folder / "variants.inc").write_text(generate(name))
        sources.append(CSRC / "cpu" / f"{name}.cpp")
    done = subprocess.run([*command, folder / name, *sources], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:4000]
    return folder / name


@pytest.fixture(scope="module")
def drivers(tmp_path_factory):
    """Driver by name, each compiled once."""
    built: dict[str, Path] = {}

    def driver(name: str) -> Path:
        if name not in built:
            built[name] = build(tmp_path_factory.mktemp(name), name)
        return built[name]

    return driver


def execute(program: Path, *arguments: object, order: str = "") -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=0",
    }
    environment.pop("SIMT_SEED", None)
    if order:
        environment["SIMT_SEED"] = order
    command = [program, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ["reversed", "reversed_by_shuffles", "reversed_by_votes"])
def test_shim_runs_sound_kernels(drivers, name, order):
    result = execute(drivers("shim"), name, order=order)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("order", ["", "1"])
@pytest.mark.parametrize("name", SHIM_FAULTS)
def test_shim_reports_faults(drivers, name, order):
    result = execute(drivers("shim"), name, order=order)
    assert result.returncode != 0
    assert SHIM_FAULTS[name] in result.stderr


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("op", "name"), [(op, name) for op in MUTANTS for name in ("original", *SOUND[op])]
)
def test_kernel_equals_cpu_version_and_oracle(drivers, op, name, order, seed):
    result = execute(drivers(op), name, seed % 2**31, CASES, order=order)
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout)
    # Cases in which nothing is accepted or moved would prove nothing.
    assert summary["cases"] == CASES and summary["weight"] > CASES


@pytest.mark.parametrize(
    ("op", "name"), [(op, name) for op, mutants in MUTANTS.items() for name in mutants]
)
def test_planted_fault_is_caught(drivers, op, name):
    reports = []
    for order in ORDERS:
        # The seed is fixed: whether a fault shows must not depend on the day.
        result = execute(drivers(op), name, 1, CASES, order=order)
        if result.returncode:
            assert re.search(MUTANTS[op][name].report, result.stderr), result.stderr[-2000:]
            reports.append(order)
    assert reports, f"{op}: {name} passed in every thread order"


@pytest.mark.parametrize("texts", [("no such text", "x"), ("rows", "nodes")])
def test_fault_that_no_longer_fits_the_source_is_an_error(texts):
    with pytest.raises(ValueError, match="times in the source, expected 1"):
        planted(source_of("verify_greedy"), mutant(*texts))
    assert isinstance(mutant(*texts), Mutant)
