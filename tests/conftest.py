"""Fixtures and the split between the two test processes.

Triton chooses between interpreter and compiler when it is imported. Tests marked `interpreter` run
only under TRITON_INTERPRET=1, all others only without it; `make test` runs both processes.
XSPEC_SEED=n gives the random tests another seed, XSPEC_SHARED names a folder of recorded data.
"""

from __future__ import annotations

import os
import random
import zlib
from pathlib import Path
from typing import NamedTuple

import hypothesis
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

os.environ.pop("XSPEC_BACKEND", None)
# Tests neither find nor leave calibrations in the user's cache folder.
os.environ["XSPEC_CACHE"] = "off"
# The models here are tiny: threads would wait for each other longer than they compute.
torch.set_num_threads(1)
hypothesis.settings.register_profile(
    "xspec",
    deadline=None,
    max_examples=25 if INTERPRETED else 150,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile("xspec")


class OpBackend(NamedTuple):
    """One way to run an op: the `backend` argument and the device of its tensors."""

    name: str
    device: str


def op_backends() -> dict[str, OpBackend]:
    """The ways that exist in this process; `native` is what `auto` takes on the CPU."""
    if INTERPRETED:
        return {"triton-interpreted": OpBackend("triton", "cpu")}
    found = {"torch": OpBackend("torch", "cpu"), "native": OpBackend("auto", "cpu")}
    if torch.cuda.is_available():
        found["triton-gpu"] = OpBackend("triton", "cuda")
        found["cuda-gpu"] = OpBackend("cuda", "cuda")
    return found


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "interpreter: runs only under TRITON_INTERPRET=1")
    config.addinivalue_line("markers", "slow: takes more than about ten seconds")


def pytest_report_header() -> str:
    return f"xspec op backends under test: {', '.join(op_backends())}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "op_backend" in metafunc.fixturenames:
        marks = [pytest.mark.interpreter] if INTERPRETED else []
        cases = [pytest.param(case, id=name, marks=marks) for name, case in op_backends().items()]
        metafunc.parametrize("op_backend", cases)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    here = [item for item in items if ("interpreter" in item.keywords) == INTERPRETED]
    elsewhere = [item for item in items if ("interpreter" in item.keywords) != INTERPRETED]
    if elsewhere:
        config.hook.pytest_deselected(items=elsewhere)
        items[:] = here


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A seed fixed by the test's name, printed where the test fails; torch and random use it."""
    default = zlib.crc32(request.node.nodeid.encode())
    value = int(os.environ.get("XSPEC_SEED", default))
    print(f"seed {value} (XSPEC_SEED={value} repeats it)")
    torch.manual_seed(value)
    random.seed(value)
    return value


@pytest.fixture
def rng(seed: int) -> random.Random:
    """A generator with that seed."""
    return random.Random(seed)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what torch.empty and its relatives return, so that an unwritten output shows."""

    def poison(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype.is_floating_point:
            return tensor.fill_(float("nan"))
        return tensor.fill_(torch.iinfo(tensor.dtype).min) if tensor.dtype != torch.bool else tensor

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        original = getattr(owner, name)

        def replacement(*args, _original=original, **kwargs):
            return poison(_original(*args, **kwargs))

        monkeypatch.setattr(owner, name, replacement)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of recorded data; the test skips where there is none."""
    path = Path(os.environ.get("XSPEC_SHARED", ROOT.parent / "shared"))
    if not path.is_dir():
        pytest.skip(f"no recorded data: {path} is absent (XSPEC_SHARED names another folder)")
    return path
