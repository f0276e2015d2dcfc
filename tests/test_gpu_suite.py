from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch

from xspec_runtime.gpu import PHASES, suite
from xspec_runtime.gpu.check import OPS
from xspec_runtime.gpu.parts import Context, Options, Part, Skip, execute
from xspec_runtime.gpu.record import validate_gpu_results
from xspec_runtime.overlap import MODES

SCRIPT = Path(__file__).resolve().parent.parent / "bench" / "gpu_suite.py"


def command_line(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, capture_output=True, text=True, env=env)


# What the suite does without; a machine with a GPU need not have them.
NEEDLESS = ("accelerate", "av", "bitsandbytes", "matplotlib", "nvtx", "peft", "rich", "typer")


def hiding(names: tuple[str, ...]) -> str:
    """A statement after which none of the modules is there, for `find_spec` either."""
    return f"import sys; sys.modules.update(dict.fromkeys({names!r}))\n"


@pytest.fixture(scope="module")
def dry(tmp_path_factory) -> Path:
    """The folder of a dry run of everything, nothing carried, without `NEEDLESS`."""
    out = tmp_path_factory.mktemp("gpu") / "out"
    # Python runs a file of this name that it finds on the module path, in every process.
    start = tmp_path_factory.mktemp("start") / "sitecustomize.py"
    start.write_text(hiding(NEEDLESS))
    path = os.pathsep.join([str(start.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = command_line(
        "--dry-run", "--out", str(out), "--bundle", str(out / "none"), PYTHONPATH=path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def results(out: Path) -> dict:
    found = json.loads((out / "results.json").read_text())
    validate_gpu_results(found)
    return found


def test_dry_run(dry):
    found = results(dry)
    assert found["dry_run"] and found["complete"] and found["environment"]["gpu"] is None
    assert list(found["phases"]) == list(PHASES)
    assert {phase["status"] for phase in found["phases"].values()} == {"passed"}
    parts = found["phases"]["check"]["parts"]
    ops = [op for name in OPS for op in parts[name]["data"]["ops"]]
    ran = [op for op in ops if op["unavailable"] is None]
    assert {(op["op"], op["backend"]) for op in ran} == {(n, b) for n in OPS
                                                        for b in ("torch", "auto")}  # fmt: skip
    assert all(op["cases"] >= 3 and op["mismatches"] == 0 for op in ran)
    missing = [op for op in ops if op["unavailable"]]
    assert all("cannot run" in op["unavailable"] for op in missing)
    law = parts["law"]["data"]["law"]
    assert len(law) == 2 and all(one["first"] is None and one["rows"] >= 14 for one in law)


def test_dry_run_measures_every_kind(dry):
    found = results(dry)
    machine = found["phases"]["baseline"]["parts"]["machine"]["data"]
    for key in ("copy_gbps", "eager_launch_us", "graph_kernel_us", "one_kernel_graph_us"):
        assert machine[key] > 0
    plain = [row for row in found["verify"] if row["weights"] == "bf16"]
    assert {row["weights"] for row in found["verify"]} == {"bf16", "nf4"}
    kinds = {(row["backend"], row["mode"], row["shape"]) for row in plain}
    names = [(name, "chain") for name in ("cublas", "cublas-mask", "cublas-split")]
    names += [(name, shape) for name in ("xspec-torch", "torch-linear")
              for shape in ("chain", "tree")]  # fmt: skip
    tight = {("xspec-torch-tight", "graph", shape) for shape in ("chain", "tree")}
    assert kinds - tight == {(n, mode, s) for n, s in names for mode in ("eager", "graph")}
    assert tight <= kinds
    measured = found["phases"]["verify"]["parts"]["bf16"]["data"]
    for row in found["verify"]:
        assert row["prompt_tokens"] == 40
        assert row["floor_ratio"] == pytest.approx(row["ms"] / row["floor_ms"])
        gbps = {row["bytes"] / one["copy_gbps"] / 1e6 for one in (machine, measured)}
        assert any(row["floor_ms"] == pytest.approx(floor) for floor in gbps)
        assert row["rows"] > 1 or row["ratio"] == 1.0
    goals = {(goal["rows"], goal["of"], goal["goal"]) for goal in measured["goals"]}
    assert goals == {(1, "floor_ratio", 1.35)}
    kernels = [row for part in found["phases"]["kernels"]["parts"].values()
               for row in part["data"]["kernels"]]  # fmt: skip
    products = {f"skinny_linear {name}{norm}" for name in ("qkv", "o", "gate_up", "down")
                for norm in ("", " with norm")}  # fmt: skip
    others = {"lm_head_argmax", "norm_act", "rope_append", "tree_attention 40"}
    adapters = {f"adapter_forward {name}" for name in ("TokenAdapter", "L1", "L2", "L3", "L4")}
    assert {row["op"] for row in kernels} == products | others | adapters
    for row in kernels:
        assert row["gbps"] == pytest.approx(row["bytes"] / row["us"] / 1e3)
        assert (row["torch_us"] is None) == (row["op"] == "rope_append")
    prefill = found["phases"]["prefill"]["parts"]
    rows = [row for name in ("bf16", "nf4") for row in prefill[name]["data"]["prefill"]]
    ours = {("bf16", "xspec eager"), ("bf16", "xspec graph"), ("nf4", "xspec eager"),
            ("nf4", "xspec graph")}  # fmt: skip
    assert {(row["weights"], row["backend"]) for row in rows} == ours | {("bf16", "transformers")}
    for row in (*rows, *prefill["vision"]["data"]["vision"]):
        assert row["ratio"] == pytest.approx(row["ms"] / row["bound_ms"])
    overlap = found["phases"]["overlap"]["parts"]
    modes = overlap["requests"]["data"]["overlap"]
    assert [row["mode"] for row in modes] == ["none", *MODES]
    assert all(row["ttft_ms"] >= 4.0 for row in modes)
    assert {"target", "draft", "apart", "branches"} == set(
        overlap["prefills"]["data"]["prefills_ms"]
    )
    full = found["phases"]["full_size"]["parts"]["bf16"]["data"]["arms"]
    assert full["plain"]["round"]["readbacks_per_round"] == 1.0
    nf4 = found["phases"]["baseline"]["parts"]["nf4_bitsandbytes"]
    if nf4["status"] == "skipped":
        assert "make gpu-bundle" in nf4["message"]


def test_log_says_what_happened(dry):
    log = (dry / "log.txt").read_text()
    assert "check.kv_commit passed" in log and "a CPU has no streams" in log
    assert "v(M)/v(1)" in log.splitlines()[-1]


def test_unknown_phase_is_one_clear_line(tmp_path):
    done = command_line("--dry-run", "--phases", "check,speed", "--out", str(tmp_path / "out"))
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"error: unknown phase 'speed'; there are {', '.join(PHASES)}"
    ]
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_one_clear_line(tmp_path):
    done = command_line("--out", str(tmp_path / "out"))
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and "--dry-run" in done.stderr


def test_bare_tree_with_nothing_but_torch_and_triton(tmp_path):
    packages = Path(torch.__file__).parents[1]
    skipping = [name for name in PHASES if name not in ("check", "kernels", "baseline", "nf4")]
    phases, bundle = ",".join(["check", *skipping]), tmp_path / "none"
    arguments = ["--dry-run", "--phases", phases, "--out", str(tmp_path), "--bundle", str(bundle)]
    code = (
        "import sys, runpy; sys.path[:] = [p for p in sys.path if 'site-packages' not in p]\n"
        f"sys.path.append({str(packages)!r})\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
        f"{hiding((*NEEDLESS, 'transformers', 'tokenizers', 'safetensors', 'PIL'))}"
        f"sys.argv = ['x', *{arguments!r}]\n"
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = results(tmp_path)["phases"]
    assert found["check"]["status"] == "passed"
    for name in skipping:
        messages = [part["message"] for part in found[name]["parts"].values()]
        assert messages and all(text.startswith("transformers is not") for text in messages)


def fake_phase(monkeypatch, name: str, *parts: Part) -> None:
    module = ModuleType(name)
    module.parts = lambda options: list(parts)
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(PHASES, name, name)


def fine(context):
    yield {"facts": [1], "sizes": {"a": 1}}
    yield {"facts": [2], "sizes": {"b": float("nan")}}


def raises(context):
    yield {"facts": [1]}
    raise RuntimeError("the kernel said no")


def absent(context):
    raise Skip("not here")


def run(tmp_path: Path, *phases: str) -> tuple[int, dict]:
    status = suite.run_suite(
        Options(phases, dry_run=True, out=tmp_path), "python x", lambda line: None
    )
    return status, results(tmp_path)


def test_phase_that_raises_is_recorded_and_the_others_go_on(tmp_path, monkeypatch):
    fake_phase(monkeypatch, "first", Part("first", "a", raises, 1), Part("first", "b", fine, 1))
    fake_phase(monkeypatch, "second", Part("second", "c", fine, 1), Part("second", "d", absent, 1))
    status, found = run(tmp_path, "first", "second")
    first, second = found["phases"]["first"], found["phases"]["second"]
    assert status == 1
    assert (first["status"], second["status"]) == ("failed", "passed")
    assert first["parts"]["a"]["message"] == "RuntimeError: the kernel said no"
    assert first["parts"]["a"]["data"] == {"facts": [1]}
    assert first["parts"]["b"]["data"] == {"facts": [1, 2], "sizes": {"a": 1, "b": None}}
    assert second["parts"]["d"]["status"] == "skipped"
    assert second["parts"]["d"]["message"] == "not here"
    assert "Traceback" in (tmp_path / "log.txt").read_text()


def test_phase_that_does_not_load_is_recorded(tmp_path, monkeypatch):
    monkeypatch.setitem(PHASES, "gone", "xspec_runtime.gpu.gone")
    fake_phase(monkeypatch, "second", Part("second", "c", fine, 1))
    status, found = run(tmp_path, "gone", "second")
    assert status == 1
    assert "ModuleNotFoundError" in found["phases"]["gone"]["parts"]["load"]["message"]
    assert found["phases"]["second"]["status"] == "passed"


APART = """
import os, signal, sys, time
from xspec_runtime.gpu.parts import Part

def raises(context):
    yield {"pid": os.getpid()}
    raise RuntimeError("no")

def dies(context):
    yield {"pid": os.getpid()}
    os.kill(os.getpid(), signal.SIGKILL)

def hangs(context):
    yield {"pid": os.getpid(), "known": context.known.get("apart.raises")}
    time.sleep(600)

def fine(context):
    print("a library talks", end="")
    yield {"pid": os.getpid()}

def parts(options):
    made = [Part("apart", f.__name__, f, 0, (PATH,)) for f in (raises, fine, dies, hangs)]
    return [*made, Part("apart", "late", fine, 0, (PATH,))]
"""


def test_faults_and_hangs_cost_their_own_part(tmp_path, monkeypatch):
    (tmp_path / "apart_phase.py").write_text(APART.replace("PATH", repr(str(tmp_path))))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(PHASES, "apart", "apart_phase")
    monkeypatch.setattr(suite, "GRACE", 0.0)
    options = Options(("apart",), dry_run=True, out=tmp_path / "out", budget=8.0)
    assert suite.run_suite(options, "python x", lambda line: None) == 1
    parts = results(tmp_path / "out")["phases"]["apart"]["parts"]
    said = {name: (part["status"], part["message"]) for name, part in parts.items()}
    assert said["raises"] == ("failed", "RuntimeError: no")
    assert said["fine"] == ("passed", None)
    assert said["dies"] == ("failed", "its process died of SIGKILL")
    assert said["hangs"] == ("failed", "stopped: the budget was spent")
    assert parts["dies"]["data"]["pid"] == parts["fine"]["data"]["pid"]
    assert parts["raises"]["data"]["pid"] != parts["fine"]["data"]["pid"]
    assert parts["hangs"]["data"]["known"] == parts["raises"]["data"]
    assert "a library talks" in (tmp_path / "out" / "log.txt").read_text()


def test_part_that_hangs_costs_itself_and_no_other(tmp_path, monkeypatch):
    source = APART.replace("f, 0,", "f, 2,").replace("PATH", repr(str(tmp_path)))
    (tmp_path / "slow_phase.py").write_text(
        source.replace("(raises, fine, dies, hangs)", "(hangs,)")
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(PHASES, "apart", "slow_phase")
    monkeypatch.setattr(suite, "PATIENCE", 0.2)
    options = Options(("apart",), dry_run=True, out=tmp_path / "out", budget=200.0)
    assert suite.run_suite(options, "python x", lambda line: None) == 1
    parts = results(tmp_path / "out")["phases"]["apart"]["parts"]
    assert parts["hangs"]["message"] == "stopped: it hangs"
    assert parts["late"]["status"] == "passed"


def test_part_over_budget_is_skipped_and_a_shorter_one_runs():
    events = []
    context = Context(Options(), time.monotonic() + 50)
    execute([Part("p", "long", fine, 60), Part("p", "short", fine, 40)], context, events.append)
    assert events[0]["event"] == "skipped"
    assert events[0]["message"].startswith("the budget: about 60 s needed")
    assert events[-1]["part"] == "p.short" and events[-1]["event"] == "passed"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda r: r.update(schema="xspec.gpu/0"), "schema"),
        (lambda r: r.pop("command"), "command"),
        (lambda r: r["environment"].pop("driver"), "environment.driver"),
        (lambda r: r["verify"][1].update(ms=0.0), r"verify\[1\].ms"),
        (lambda r: r["verify"][0].pop("floor_ratio"), r"verify\[0\].floor_ratio"),
        (lambda r: r["phases"]["check"]["parts"]["streams"].update(message=None), "a reason"),
        (lambda r: r["phases"]["check"]["parts"]["kv_commit"].update(status="ok"), "kv_commit"),
        (
            lambda r: r["phases"]["check"]["parts"]["kv_commit"].update(
                status="failed", message="x"
            ),
            "phases.check.status",
        ),
    ],
)
def test_damaged_results_are_refused(damage, message, dry):
    found = results(dry)
    damage(found)
    with pytest.raises(ValueError, match=message):
        validate_gpu_results(found)
