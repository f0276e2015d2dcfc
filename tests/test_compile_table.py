"""The committed table of machine code is that of the present sources, and keeps within budget."""

from __future__ import annotations

import copy
import os
import random
import time
from pathlib import Path

import pytest

import xspec_kernels
from xspec_kernels.kernels import norm_act as norm_module
from xspec_runtime.files import read_text
from xspec_runtime.gpu import compile_table as tables
from xspec_runtime.gpu.compile_cases import ARCHS, IN_NF4, MODELS, Case, cases
from xspec_runtime.gpu.machine_code import Launch, code_of, disassembler_missing, source_of

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "bench" / "results" / "compile_table.json"
# Compiling all of it takes minutes; past this many entries the answer is the same.
MOST_STALE = 12


@pytest.fixture(scope="module")
def committed() -> dict:
    return tables.read_table(TABLE)


@pytest.fixture(scope="module")
def present() -> list[Case]:
    return cases()


def key(case: Case) -> tuple[str, str, int]:
    return case.kernel, case.model, case.arch


def test_every_kernel_of_every_model_and_card(committed, present):
    assert set(ARCHS) == set(tables.SHARED_KIB)
    assert list(tables.by_name(committed)) == [key(case) for case in present]
    # TokenAdapter, L1, L2, L3, L4: launches that are kernels of their own.
    adapters = 13 + 4 + 1 + 4 + 6
    assert len(present) == (16 * len(MODELS) + 4 * len(IN_NF4) + adapters) * len(ARCHS)


def test_no_entry_breaks_a_limit(committed):
    found = {key: tables.faults(entry) for key, entry in tables.by_name(committed).items()}
    assert {key: faults for key, faults in found.items() if faults} == {}


def test_table_is_that_of_the_sources(committed, present):
    """Stale entries are compiled again, and one other, chosen anew in every run."""
    if missing := disassembler_missing():
        pytest.skip(missing)
    entries = tables.by_name(committed)
    compiler = tables.compiler_version()
    others = {entry["triton"] for entry in entries.values()} - {compiler}
    stale = [case for case in present if entries[key(case)]["source"] != case.source.digest]
    seed = int(os.environ.get("XSPEC_SEED", time.time_ns()))
    print(f"seed {seed} (XSPEC_SEED={seed} repeats it)")
    checked = {case.source.digest: case for case in stale[:MOST_STALE]}
    drawn = random.Random(seed).choice(present)
    for case in (*checked.values(), drawn):
        print(f"compiling {case.name}")
        made = tables.entry_of(case)
        assert tables.faults(made) == [], case.name
        if not others:
            old = {name: entries[key(case)][name] for name in made if name != "source"}
            assert {name: made[name] for name in old} == old, (
                f"run bench/compile_table.py: {case.name}"
            )
    if others:
        pytest.skip(f"the table was made by Triton {', '.join(others)}, this is {compiler}")
    assert len(stale) <= MOST_STALE, "run bench/compile_table.py: too many sources have changed"


def test_page_shows_the_table(committed):
    page = read_text(ROOT / "docs" / "compile_table.md")
    assert page == tables.document(committed), "run bench/compile_table.py"


def spoiled(committed: dict, kernel: str, **changes: object) -> list[str]:
    return tables.faults(tables.by_name(committed)[kernel, "SmolLM2-135M", 86] | changes)


@pytest.mark.parametrize(
    ("kernel", "changes", "words"),
    [
        ("qkv", {"spills": 8}, "spills 8"),
        ("down", {"shared": 99 * 1024 + 1}, "has 101376"),
        ("lm_head", {"matrix": {}}, "matrix instructions"),
        ("o", {"matrix": {"HMMA.16816.F32.BF16": 64, "HMMA.1688.F32.TF32": 1}}, "mixes"),
        ("norm_act", {"matrix": {"HMMA.16816.F32.BF16": 1}}, "matrix instructions"),
        ("rope_append", {"wide_loads": 0}, "16 bytes"),
    ],
)
def test_broken_entry_is_noticed(kernel, changes, words, committed):
    assert spoiled(committed, kernel) == []
    (fault,) = spoiled(committed, kernel, **changes)
    assert words in fault


def test_digest_follows_code_called_types_and_constants(monkeypatch):
    """Not the comments, and not where in the file a kernel stands."""
    from triton.runtime import JITFunction

    kernel = norm_module._norm_act_kernel
    case = next(case for case in cases(["SmolLM2-135M"], [80]) if case.kernel == "norm_act")

    def planted(old: str, new: str) -> JITFunction:
        changed = copy.copy(kernel)
        assert old in kernel.src
        changed._unsafe_update_src(kernel.src.replace(old, new))
        return changed

    assert case.source.digest == cases(["SmolLM2-135M"], [80])[1].source.digest
    assert any("rms_scale" in text.split("\n")[0] for text in code_of(kernel))
    assert code_of(planted("row = tl.load", "# a remark\n    row = tl.load")) == code_of(kernel)
    assert code_of(planted("row * row", "row * row + 0")) != code_of(kernel)
    helper = copy.copy(norm_module.rms_scale)
    helper._unsafe_update_src(helper.src.replace("tl.rsqrt", "1 / tl.sqrt"))
    before = code_of(kernel)
    monkeypatch.setattr(norm_module, "rms_scale", helper)
    assert code_of(kernel) != before

    import torch

    given = dict(x=0, weight=0, residual=None, y=0, total=None)

    def digest(dtype: torch.dtype = torch.float16, cc: int = 80, **options: int) -> str:
        tensors = {name: torch.zeros(8, dtype=dtype) for name in ("x", "weight", "y")}
        meta = {**given, **tensors, "eps": 1e-6, "D": 64, "BLOCK": 64, "num_warps": 1, **options}
        return source_of(Launch(kernel, (), meta), cc).digest

    other = [digest(torch.float32), digest(cc=90), digest(BLOCK=128), digest(num_warps=2)]
    assert digest() == digest() and len({digest(), *other}) == 5


def test_recording_leaves_the_ops_as_they_were():
    import torch

    with pytest.raises(RuntimeError, match="needs CUDA tensors"):
        cases(["SmolLM2-135M"], [80])
        xspec_kernels.embed(torch.zeros(1).long(), torch.zeros(2, 4), backend="triton")


def test_other_files_are_refused(tmp_path):
    file = tmp_path / "table.json"
    with pytest.raises(FileNotFoundError, match="compile table not found"):
        tables.read_table(file)
    file.write_text('{"schema": "xspec.e2e/1"}')
    with pytest.raises(ValueError, match=r"its schema is not xspec.compile/1"):
        tables.read_table(file)


def test_only_stale_entries_are_compiled(committed, monkeypatch):
    if missing := disassembler_missing():
        pytest.skip(missing)
    few = [case for case in cases(["SmolLM2-135M"], [80]) if case.kernel in ("embed", "norm_act")]
    old = copy.deepcopy(committed)
    entries = tables.by_name(old)
    wrong, right = entries[key(few[0])], entries[key(few[1])]
    wrong |= {"source": "of another day", "registers": -1}
    right["triton"] = tables.compiler_version()
    compiled = []
    monkeypatch.setattr(tables, "cases", lambda: few)
    real = tables.entry_of
    monkeypatch.setattr(tables, "entry_of", lambda case: compiled.append(case) or real(case))
    made = tables.build_table("a command", old, lambda *_: None)
    assert compiled == few[:1] and made["entries"][1] == right
    assert made["entries"][0]["registers"] > 0
    assert made["entries"][0]["source"] == few[0].source.digest
