"""bench/verify.py: engines that agree, rows that add up, and what a user can get wrong."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

from xspec_runtime.gpu.cases import relative_error
from xspec_runtime.plots import draw_verify
from xspec_runtime.verify_cost import engines, measure, stage
from xspec_runtime.verify_cost.measure import run_verify
from xspec_runtime.verify_cost.options import VerifyOptions
from xspec_runtime.verify_cost.report import groups, validate_verify, verify_table, write_verify
from xspec_runtime.verify_cost.stage import Subject, find_config, random_model

SCRIPT = Path(__file__).resolve().parent.parent / "bench" / "verify.py"


def options(tmp_path: Path, **changes) -> VerifyOptions:
    given = {"config": "tiny", "rows": "4,2", "prompt_tokens": "24,9", "repeats": 1, "threads": 1}
    return VerifyOptions("python x", **given | {"output_dir": tmp_path} | changes)


def subject(config: str = "tiny", seed: int = 0) -> Subject:
    with torch.inference_mode():
        return Subject.of(random_model(find_config(config), "cpu", torch.float32, seed), seed)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict:
    backends = "auto,torch,transformers,packed,linear"
    return run_verify(options(tmp_path_factory.mktemp("verify"), backends=backends))


def test_every_combination_is_measured(results):
    validate_verify(results)
    assert results["complete"] and results["config"]["config"] == "tiny"
    found = [(row["prompt_tokens"], row["backend"], row["shape"], row["rows"])
             for row in results["verify"]]  # fmt: skip
    names = ["xspec-torch", "transformers", "transformers-packed", "torch-linear"]
    shapes = [("chain", 1), ("chain", 2), ("chain", 4), ("tree", 4)]
    assert sorted(found) == sorted((n, b, *s) for n in (24, 9) for b in names for s in shapes)
    gbps = results["copy"]["gbps"]
    one = {(row["prompt_tokens"], row["backend"]): row["ms"]
           for row in results["verify"] if row["rows"] == 1}  # fmt: skip
    for row in results["verify"]:
        assert (row["weights"], row["mode"], row["calls"]) == ("fp32", "eager", 3)
        ratio = row["ms"] / one[row["prompt_tokens"], row["backend"]]
        assert row["ratio"] == pytest.approx(ratio)
        assert row["floor_ratio"] == pytest.approx(row["ms"] / (row["bytes"] / gbps / 1e6))


def test_bytes_are_weights_head_keys_and_values():
    layer = 128 * (4 + 2 + 2) * 32 + 128 * 128 + 3 * 128 * 256 + 2 * 128
    held = 2 * layer + 512 * 128 + 128
    assert subject().stage(24).nbytes(4) == 4 * (held + 2 * 2 * 2 * 32 * (24 + 4))


@pytest.mark.parametrize("config", ["tiny", "mini"])
@pytest.mark.parametrize(("shape", "rows"), [("chain", 1), ("chain", 40), ("tree", 30)])
@torch.inference_mode()
def test_engines_agree(config, shape, rows, seed):
    held = subject(config, seed % 1000).stage(33)
    tree = held.tree(shape, rows, seed)
    assert len(tree) == rows and (shape == "tree") == (tree.parent_idx != list(range(-1, rows - 1)))
    made = engines.build_engines(held, ("torch", "transformers", "linear"))
    ours, theirs, plain = (engine.logits(tree) for engine in made)
    assert relative_error(ours, theirs) < 1e-5 and relative_error(plain, theirs) < 1e-5
    assert all(torch.equal(engine.pass_of(tree)()[0].flatten(), theirs.argmax(-1))
               for engine in made)  # fmt: skip


def test_disagreement_is_named_and_nothing_is_timed(tmp_path, monkeypatch):
    sound = engines.LinearEngine.logits
    monkeypatch.setattr(engines.LinearEngine, "logits", lambda self, tree: 1.1 * sound(self, tree))
    monkeypatch.setattr(measure, "visit", lambda *_: pytest.fail("timed"))
    with pytest.raises(RuntimeError, match=r"torch-linear and xspec-torch differ by 0\.1"):
        run_verify(options(tmp_path, backends="auto,linear"))


def test_ctrl_c_keeps_what_was_measured(tmp_path, monkeypatch):
    calls = []

    def visit(work, device):
        calls.append(work)
        if len(calls) > 6:
            raise KeyboardInterrupt
        return [1.0, 2.0, 3.0]

    monkeypatch.setattr(measure, "visit", visit)
    found = run_verify(options(tmp_path, backends="linear"))
    validate_verify(found)
    kept = [(row["prompt_tokens"], row["rows"]) for row in found["verify"]]
    assert not found["complete"] and kept == [(24, 1), (24, 2), (24, 4), (24, 4), (9, 1), (9, 2)]
    assert "Interrupted" in verify_table(found).caption
    calls[:] = [None] * 6
    with pytest.raises(KeyboardInterrupt):
        run_verify(options(tmp_path, backends="linear"))


def test_graph_is_timed_where_it_repeats_the_pass(tmp_path, monkeypatch):
    """On a CPU `captured` hands back the pass itself; a wrong one is refused."""
    held = subject()
    plan = options(tmp_path, backends="auto,transformers").plan()
    fields = {name: getattr(plan, name) for name in plan.__slots__}
    fields |= {"modes": ("graph",), "backends": ("auto", "tight", "transformers")}
    plan = type(plan)(**fields)
    with torch.inference_mode():
        found = measure.measure(plan, held, None)
        assert {row["backend"] for row in found.rows} == {"xspec-torch", "xspec-torch-tight"}
        assert found.rows[0]["mode"] == "graph" and found.rows[0]["floor_ratio"] is None
        assert found.notes == ["transformers has no graph: it prepares on the host"]
        broken = lambda run, device: lambda: (run()[0], 2 * run()[1])  # noqa: E731
        monkeypatch.setattr(measure, "captured", broken)
        with pytest.raises(RuntimeError, match="xspec-torch: the graph of 1 rows is off by 1"):
            measure.measure(plan, held, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modes": "graph"}, "--modes graph needs --device cuda: a CPU has no CUDA graphs"),
        ({"modes": "lazy"}, "--modes takes eager, graph, got 'lazy'"),
        ({"rows": "1,65"}, "--rows must be different numbers in 1..64, got '1,65'"),
        ({"rows": "two"}, "--rows must be different numbers"),
        ({"prompt_tokens": ""}, "--prompt-tokens must be different numbers"),
        ({"prompt_tokens": "5,5"}, "--prompt-tokens must be different numbers"),
        ({"shapes": "bush"}, "--shapes takes chain, tree, got 'bush'"),
        ({"backends": "auto,vllm"}, "--backends takes auto, torch, triton, .*got 'vllm'"),
        ({"backends": "tight"}, "--backends tight is about graphs: add --modes graph"),
        ({"backends": "triton"}, "'triton' cannot run"),
        ({"backends": "packed", "dtype": "bfloat16"}, "--backends packed needs float32"),
        ({"dtype": "int8"}, "--dtype must be one of"),
        ({"repeats": 0}, "--repeats must be in 1"),
        ({"config": "gpt-5"}, "--config must be llama-7b, .* or a model's folder, got 'gpt-5'"),
        ({"device": "tpu"}, "--device must be cpu"),
    ],
)
def test_bad_options(changes, message, tmp_path):
    if changes.get("backends") == "triton" and torch.cuda.is_available():
        pytest.skip("Triton runs here")
    with pytest.raises((ValueError, RuntimeError), match=message) as error:
        run_verify(options(tmp_path, **changes))
    assert "\n" not in str(error.value)


def test_folder_of_a_model(tmp_path):
    with pytest.raises(FileNotFoundError, match="model configuration not found"):
        find_config(str(tmp_path))
    values = {
        "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 128,
        "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 64,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert find_config(str(tmp_path)).num_key_value_heads == 1
    (tmp_path / "config.json").write_text(json.dumps(values | {"hidden_act": "gelu"}))
    with pytest.raises(ValueError, match="hidden_act 'gelu'"):
        find_config(str(tmp_path))


def test_weights_that_do_not_fit(monkeypatch):
    monkeypatch.setattr(stage, "free_bytes", lambda device: 1 << 30)
    with pytest.raises(RuntimeError, match=r"take 12\.6 GiB in bfloat16, cpu has 1\.0 GiB free"):
        random_model(find_config("llama-7b"), "cpu", torch.bfloat16, 0)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda r: r.update(schema="xspec.verify/0"), "schema"),
        (lambda r: r.pop("environment"), "environment"),
        (lambda r: r["copy"].update(gbps=0.0), "copy.gbps"),
        (lambda r: r["verify"][1].update(ms=0.0), r"verify\[1\].ms"),
        (lambda r: r["verify"][0].pop("floor_ratio"), r"verify\[0\].floor_ratio"),
        (lambda r: r["verify"][2].update(shape="bush"), r"verify\[2\].shape"),
    ],
)
def test_damaged_results_are_refused(damage, message, results):
    found = json.loads(json.dumps(results))
    damage(found)
    with pytest.raises(ValueError, match=message):
        validate_verify(found)


def test_files_and_plot(results, tmp_path):
    copy = tmp_path / "copy.json"
    written = write_verify(results, tmp_path / "out", copy)
    assert {path.name for path in written} == {"results.json", "copy.json", "verify.png"}
    assert json.loads(copy.read_text()) == json.loads(written[0].read_text()) == results
    assert written[-1].stat().st_size > 10_000
    lines = groups(results)
    assert sorted(lines[24, "torch-linear", "eager", "tree"]) == [1, 4]
    short = results | {"verify": [row for row in results["verify"] if row["rows"] == 1]}
    assert not draw_verify(short, tmp_path / "none.png")


def command_line(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    return end.value.code


def test_command_line(tmp_path, monkeypatch, capsys):
    status = command_line(
        monkeypatch, "--config", "tiny", "--rows", "3", "--prompt-tokens", "16", "--repeats", "1",
        "--output-dir", str(tmp_path / "out"),
    )  # fmt: skip
    shown = capsys.readouterr().out
    assert status == 0 and "transformers" in shown and "written:" in shown
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    validate_verify(found)
    assert "verify.py --config tiny" in found["command"]


def test_command_line_says_what_is_wrong_in_one_line(tmp_path, monkeypatch, capsys):
    status = command_line(monkeypatch, "--modes", "graph", "--output-dir", str(tmp_path / "out"))
    assert status == 2 and not (tmp_path / "out").exists()
    assert capsys.readouterr().err.splitlines() == [
        "error: --modes graph needs --device cuda: a CPU has no CUDA graphs"
    ]


def test_ctrl_c_writes_what_was_measured(tmp_path, monkeypatch, capsys):
    calls = []

    def visit(work, device):
        calls.append(work)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return [1.0, 2.0, 3.0]

    monkeypatch.setattr(measure, "visit", visit)
    arguments = ("--config", "tiny", "--prompt-tokens", "16", "--output-dir", str(tmp_path / "out"))
    assert command_line(monkeypatch, *arguments) == 130
    assert "interrupted: 2 rows are measured and written" in capsys.readouterr().err
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert not found["complete"] and len(found["verify"]) == 2
