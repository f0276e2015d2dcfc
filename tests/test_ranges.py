"""NVTX ranges: what a tool sees of a real decode, and that nothing is felt where there is none.

The tool is tests/nvtx_tool/recorder.c, loaded the way Nsight Systems loads itself.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from xspec_kernels import _native, ranges

HERE = Path(__file__).resolve().parent
BLOCK_PACKAGE = "import sys; sys.modules['nvtx'] = None\n"
EMPTY_PACKAGE = "import sys, types; sys.modules['nvtx'] = types.ModuleType('nvtx')\n"
# One decode with a draft that is the target itself, one with no draft; prints what it should show.
DECODE = """
import json
from tiny import prompt, tiny_llama
from xspec_kernels import ranges
from xspec_runtime.config import SpecConfig
from xspec_runtime.drafters.base import Request
from xspec_runtime.drafters.draft_model import ModelDrafter
from xspec_runtime.engine import SpeculativeDecoder
from xspec_runtime.targets.transformers import TransformersTarget

assert ranges.attached()
ids = prompt(7)
target = TransformersTarget(tiny_llama(7), 256)
draft = ModelDrafter(tiny_llama(7), gamma=3, siblings=1)
request = Request(draft_inputs={"input_ids": ids})
shown = []
for drafter, rows in ((draft, 6), (None, 1)):
    decoder = SpeculativeDecoder(target, drafter, SpecConfig(rows, max_new_tokens=14))
    out = decoder.generate({"input_ids": ids}, request)
    shown.append([[r.rows, r.accepted] for r in out.rounds])
print(json.dumps(shown))
"""
PROMPT = 20


class Range(NamedTuple):
    """One recorded range; `inside` are the ranges within it."""

    name: str
    payload: int | None
    inside: list[Range]


def nvtx_headers() -> Path | None:
    """The folder that holds nvtx3/nvToolsExt.h."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda", "/usr"]
    homes += [Path(nvcc).resolve().parent.parent] if nvcc else []
    homes += sorted(Path("/usr/local").glob("cuda-*"), reverse=True)
    folders = [Path(home) / "include" for home in homes if home]
    return next((f for f in folders if (f / "nvtx3" / "nvToolsExt.h").is_file()), None)


@pytest.fixture(scope="module")
def recorder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled recorder; the test skips where it cannot be built."""
    headers, compiler = nvtx_headers(), shutil.which("gcc")
    if compiler is None or headers is None:
        pytest.skip(f"needs gcc (found {compiler}) and nvtx3/nvToolsExt.h (found in {headers})")
    library = tmp_path_factory.mktemp("nvtx") / "recorder.so"
    options = ["-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", f"-isystem{headers}"]
    command = [compiler, *options, "-o", library, HERE / "nvtx_tool" / "recorder.c"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return library


def run(code: str, **environment: object) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(HERE.parent), str(HERE.parent / "python"), str(HERE)])
    variables = {key: str(value) for key, value in environment.items()}
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **variables},
        capture_output=True,
        text=True,
    )


def record(recorder: Path, tmp_path: Path, code: str) -> tuple[list[Range], str]:
    """The ranges `code` opened in the domain, as trees, and what it printed."""
    log = tmp_path / "ranges.jsonl"
    result = run(code, NVTX_INJECTION64_PATH=recorder, NVTX_RECORD=log)
    assert result.returncode == 0, result.stderr
    root = Range("", None, [])
    stack, last = [root], 0
    for line in log.read_text().splitlines():
        event = json.loads(line)
        if event["domain"] != ranges.DOMAIN:
            continue
        assert event["ns"] >= last
        last = event["ns"]
        if event["event"] == "push":
            stack[-1].inside.append(opened := Range(event["name"], event["payload"], []))
            stack.append(opened)
        else:
            stack.pop()
            assert stack, "a pop without a push"
    assert stack == [root], "a push without a pop"
    return root.inside, result.stdout


@pytest.fixture(params=["package", "native"])
def prelude(request: pytest.FixtureRequest) -> str:
    """Code that leaves one way to NVTX; the test skips where that way is not installed."""
    if request.param == "native":
        if not hasattr(_native.module, "nvtx_push"):
            pytest.skip("the native module is absent or older than its NVTX functions")
        return BLOCK_PACKAGE
    pytest.importorskip("nvtx", reason="the nvtx package is not installed")
    return ""


def expected_round(rows: int, accepted: int) -> Range:
    """A round's range: every part with its payload, in order."""
    values = 2 if rows == 1 else 1 + 3 * rows
    parts = [
        Range("verify.forward", rows, []),
        Range("verify.accept", rows, [Range("readback", values, [])]),
        Range("verify.commit", accepted, []),
    ]
    return Range("verify" if rows > 1 else "target.decode", rows, parts)


def test_decode_is_recorded(recorder, tmp_path, prelude):
    seen, printed = record(recorder, tmp_path, prelude + DECODE)
    drafted, plain = json.loads(printed)
    assert any(accepted == 3 for _, accepted in drafted) and len(plain) == 13

    prefill = Range("target.prefill", PROMPT, [Range("readback", 2, [])])
    with_draft, without = seen[: -len(plain) - 1], seen[-len(plain) - 1 :]
    assert without == [prefill, *(expected_round(1, 0) for _ in plain)]
    assert with_draft[:2] == [prefill, Range("draft.prefill", PROMPT, [])]
    rounds = with_draft[2:]
    proposals = [r for r in rounds if r.name == "draft.propose"]
    assert [r for r in rounds if r.name != "draft.propose"] == [
        expected_round(*rows_and_accepted) for rows_and_accepted in drafted
    ]
    # A last round of one row asks no drafter.
    assert len(proposals) == sum(rows > 1 for rows, _ in drafted)
    for proposal in proposals:
        assert proposal.payload == 6
        assert [r.name for r in proposal.inside] == ["draft.decode"] * 3
        # The first step feeds what the target committed since, the others one token each.
        assert [r.payload for r in proposal.inside][1:] == [1, 1]


def test_ranges_close_when_a_block_raises(recorder, tmp_path, prelude):
    code = """
from xspec_kernels import ranges
try:
    with ranges.range_("verify", -2**40):
        ranges.push("draft.adapter")
        ranges.pop()
        raise KeyError
except KeyError:
    with ranges.range_("readback", 0):
        pass
"""
    seen, _ = record(recorder, tmp_path, prelude + code)
    adapter = Range("draft.adapter", None, [])
    assert seen == [Range("verify", -(2**40), [adapter]), Range("readback", 0, [])]


@pytest.mark.parametrize("name", ["verify.acept", "", "xspec", None])
@pytest.mark.parametrize("enter", [ranges.range_, ranges.push])
def test_unknown_name_is_an_error(name, enter):
    with pytest.raises(ValueError, match="no range is named") as raised:
        enter(name)
    assert "verify.accept" in str(raised.value)


@pytest.mark.parametrize("blocked", [[], ["nvtx"], ["nvtx", "xspec_kernels._C"], None])
def test_nothing_happens_without_a_tool(blocked, monkeypatch):
    """None: some folder called nvtx is taken for the package."""
    monkeypatch.delenv("NVTX_INJECTION64_PATH", raising=False)
    block = f"import sys; sys.modules.update(dict.fromkeys({blocked}))\n"
    block = EMPTY_PACKAGE if blocked is None else block
    code = """
from xspec_kernels import ranges
assert not ranges.attached()
for name in ranges.NAMES:
    with ranges.range_(name, 3), ranges.range_(name):
        ranges.push(name, 2)
        ranges.pop()
ranges.pop()
print(len(ranges.NAMES))
"""
    result = run(block + code)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) == len(ranges.NAMES) == 18
