"""The CUDA C++ kernels on the host: the same source under a SIMT shim, with sanitizers.

No GPU is needed, only g++. Every planted fault must be reported, or the check itself is broken.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from simt.variants import CSRC, MUTANTS, RACES, SOUND, Mutant, generate, mutant, planted, source_of

HERE = Path(__file__).resolve().parent / "simt"
ADDRESS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
# How the kernels and how the shim's scheduler are compiled.
SANITIZERS = {"asan": (ADDRESS, ADDRESS), "tsan": (["-fsanitize=thread"], ["-DSIMT_TSAN"])}
TSAN_STATUS = 66
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


@pytest.fixture(
    params=[(op, name) for op in MUTANTS for name in ("original", *SOUND[op])], ids="-".join
)
def op_variant(request: pytest.FixtureRequest) -> tuple[str, str]:
    """An op and a variant of its source that is right."""
    return request.param


def compile_cpp(sources: list[Path], output: Path, *options: str) -> None:
    command = ["g++", *FLAGS, *options, f"-I{HERE}", f"-I{CSRC}", f"-I{output.parent}"]
    done = subprocess.run([*command, "-o", output, *sources], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:4000]


@pytest.fixture(scope="session")
def shims(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The compiled scheduler for each sanitizer that works here; skips where g++ is absent."""
    if not shutil.which("g++"):
        pytest.skip("g++ is not installed")
    folder = tmp_path_factory.mktemp("shims")
    probe = folder / "probe.cpp"
    probe.write_text("int main() {}")
    found = {}
    for name, (instrument, shim_options) in SANITIZERS.items():
        command = ["g++", *instrument, "-o", folder / name, probe]
        built = subprocess.run(command, capture_output=True).returncode == 0
        if built and subprocess.run([folder / name], capture_output=True).returncode == 0:
            found[name] = folder / f"{name}.o"
            compile_cpp([HERE / "simt.cpp"], found[name], "-c", *shim_options)
    return found


@pytest.fixture(scope="session")
def drivers(shims, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Driver by name and sanitizer, each compiled once; skips where that sanitizer is missing."""
    built: dict[tuple[str, str], Path] = {}

    def driver(name: str, sanitizer: str = "asan") -> Path:
        instrument = SANITIZERS[sanitizer][0]
        if sanitizer not in shims:
            pytest.skip(f"programs built with g++ {' '.join(instrument)} do not run here")
        key = name, sanitizer
        if key not in built:
            folder = tmp_path_factory.mktemp(f"{name}_{sanitizer}")
            sources = [HERE / f"{name}.cpp", shims[sanitizer]]
            if name in MUTANTS:
                faults = MUTANTS if sanitizer == "asan" else RACES
                (folder / "variants.inc").write_text(generate(name, faults[name]))
                sources.append(CSRC / "cpu" / f"{name}.cpp")
            compile_cpp(sources, folder / name, *instrument)
            built[key] = folder / name
        return built[key]

    return driver


def execute(program: Path, *arguments: object, order: str = "") -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "TSAN_OPTIONS": "halt_on_error=1",
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
def test_kernel_equals_cpu_version_and_oracle(drivers, op_variant, order, seed):
    op, name = op_variant
    result = execute(drivers(op), name, seed % 2**31, CASES, order=order)
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout)
    # Cases in which nothing is accepted or moved would prove nothing.
    assert summary["cases"] == CASES and summary["weight"] > CASES


@pytest.mark.parametrize(
    ("op", "name"), [(op, name) for op, mutants in MUTANTS.items() for name in mutants]
)
def test_planted_fault_is_caught(drivers, op, name):
    for order in ORDERS:
        # The seed is fixed: whether a fault shows must not depend on the day.
        result = execute(drivers(op), name, 1, CASES, order=order)
        if result.returncode:
            assert re.search(MUTANTS[op][name].report, result.stderr), result.stderr[-2000:]
            return
    pytest.fail(f"{op}: {name} passed in every thread order")


@pytest.mark.parametrize("name", ["reversed", "reversed_by_shuffles", "reversed_by_votes"])
def test_sound_shim_kernels_have_no_race(drivers, name):
    result = execute(drivers("shim", "tsan"), name)
    assert result.returncode == 0, result.stderr


def test_kernels_have_no_race(drivers, op_variant, seed):
    op, name = op_variant
    result = execute(drivers(op, "tsan"), name, seed % 2**31, CASES // 3, order="1")
    assert result.returncode == 0, result.stderr[:4000]


@pytest.mark.parametrize(("op", "name"), [(op, name) for op in RACES for name in RACES[op]])
def test_planted_race_is_seen_in_any_order(drivers, op, name):
    for order in ORDERS[:2]:
        result = execute(drivers(op, "tsan"), name, 1, CASES // 3, order=order)
        assert result.returncode == TSAN_STATUS and "data race" in result.stderr, result.stderr


@pytest.mark.parametrize("texts", [("no such text", "x"), ("rows", "nodes")])
def test_fault_that_no_longer_fits_the_source_is_an_error(texts):
    with pytest.raises(ValueError, match="times in the source, expected 1"):
        planted(source_of("verify_greedy"), mutant(*texts))
    assert isinstance(mutant(*texts), Mutant)
