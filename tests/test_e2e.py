"""The end-to-end benchmark: its arms, its arithmetic, its files, and what it says to bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from running import invoke
from xspec_runtime import cli, doctor
from xspec_runtime.arms import Outcome, Task
from xspec_runtime.data.scenes import event_stream, make_sample, render
from xspec_runtime.drafters.base import Request
from xspec_runtime.e2e import Options, run_e2e
from xspec_runtime.engine import Round
from xspec_runtime.measure import run_interleaved, summarize
from xspec_runtime.models import mini
from xspec_runtime.report import validate_results
from xspec_runtime.workloads import MiniPair, Workload

ROOT = Path(__file__).resolve().parent.parent
ARMS = ["target", "hf_generate", "hf_prompt_lookup", "hf_assisted"]
ARMS += ["draft", "adapter", "adapter_hidden", "adapter_prefix", "adapter_prefix_hidden"]
ARMS += ["ngram", "ngram_tree", "ngram_cold", "tree"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[dict, Path]:
    folder = tmp_path_factory.mktemp("e2e")
    options = Options(
        "python bench/e2e.py",
        samples=3,
        warmup=1,
        output_dir=folder / "out",
        json_file=folder / "copy.json",
        trace=folder / "trace.jsonl",
    )
    return run_e2e(options), folder


def test_all_arms_agree_with_the_target(finished) -> None:
    results, _ = finished
    validate_results(results)
    assert [a["name"] for a in results["arms"]] == ARMS
    assert all(a["identical"] == a["samples"] == 3 for a in results["arms"])
    by_name = {a["name"]: a for a in results["arms"]}
    assert by_name["target"]["speedup_total"] == 1.0
    assert (
        by_name["target"]["tokens_per_verify"] == by_name["hf_generate"]["tokens_per_verify"] == 1
    )
    assert by_name["tree"]["tokens_per_verify"] > by_name["ngram_cold"]["tokens_per_verify"] > 1


def test_an_assistant_without_eyes_takes_no_frames() -> None:
    """transformers 5.17 hands it the target's; later versions do not."""
    workload = MiniPair(Options("").settings()).workload([])
    assistant = workload.arms["hf_assisted"]().options["assistant_model"]
    ids, frames = torch.tensor([[5, 6, 7]]), torch.zeros(1, 8, 3, 64, 64)
    asked = {"min_new_tokens": 2, "max_new_tokens": 2, "do_sample": False}
    blind, seeing = (
        assistant.generate(ids, **asked),
        assistant.generate(ids, pixel_values_videos=frames, **asked),
    )
    assert blind.tolist() == seeing.tolist() and blind.shape == (1, 5)


def test_our_own_engine_with_drafts_in_the_prefill(tmp_path) -> None:
    options = {"arms": "target,hf_generate,draft,tree", "samples": 2, "warmup": 0}
    options |= {"engine": "llama", "prefill_fused": "fast", "output_dir": tmp_path}
    results = run_e2e(Options("python bench/e2e.py", **options))
    assert all(a["identical"] == a["samples"] == 2 for a in results["arms"])
    fused = results["prefill_fused"]
    assert 0 < fused["accepted"] <= fused["drafted"]
    assert (fused["answers"], fused["different_answers"], fused["different_tokens"]) == (4, 0, 0)


def test_files_are_written(finished) -> None:
    results, folder = finished
    assert json.loads((folder / "copy.json").read_text()) == json.loads(json.dumps(results))
    names = {f.name for f in (folder / "out").iterdir()}
    assert {"results.json", "RESULTS.md", "speedups.png", "histogram.png", "timeline.png"} <= names


def test_trace_agrees_with_an_independent_walk(finished) -> None:
    results, folder = finished
    lines = [json.loads(line) for line in (folder / "trace.jsonl").read_text().splitlines()]
    tree = [line for line in lines if line["drafter"] == "tree"]
    accepted = {}
    for line in tree:
        assert len(line["tokens"]) == len(line["parent_idx"]) < line["rows"]
        assert all(p < i for i, p in enumerate(line["parent_idx"]))
        accepted[line["sample"]] = accepted.get(line["sample"], 0) + line["accepted"]
    rows = [s for s in results["samples"] if s["arm"] == "tree"]
    assert [accepted[i] for i in range(3)] == [r["accepted"] for r in rows]


class FakeArm:
    """Answers as told, in a given time."""

    def __init__(self, name: str, step_ms: float, per_round: int) -> None:
        self.name, self.step_ms, self.per_round = name, step_ms, per_round

    def run(self, task: Task, on_round=None) -> Outcome:
        left, rounds = 12, []
        while left:
            emitted = min(self.per_round, left)
            rounds.append(Round(self.per_round, emitted - 1, emitted, 0.5, self.step_ms, 0, 0))
            left -= emitted
        decode = sum(r.propose_ms + r.verify_ms for r in rounds)
        return Outcome(list(range(13)), 10 + decode, 10.0, 10.0, 0.0, 0, 1 + len(rounds), rounds)


def fake_workload() -> Workload:
    tasks = [Task(str(i), {"input_ids": torch.ones(1, 1)}, Request()) for i in range(4)]
    arms = {"target": lambda: FakeArm("target", 1.5, 1), "fast": lambda: FakeArm("fast", 2.5, 4)}
    return Workload(tasks, arms, lambda ids: "")


def test_summary_arithmetic() -> None:
    workload = fake_workload()
    samples = run_interleaved(workload, ["target", "fast"], warmup=0)
    results = summarize(samples, ["target", "fast"], workload, {}, "")
    fast = results["arms"][1]
    # Plain: 12 rounds of 0.5 + 1.5 ms; fast: 3 rounds of 0.5 + 2.5 ms, 4 tokens each.
    assert fast["tokens_per_verify"] == 4
    assert fast["speedup_total"] == pytest.approx((10 + 24) / (10 + 9))
    assert fast["speedup_decode"] == pytest.approx(24 / 9)
    assert fast["gain"] == pytest.approx(4 / (2.5 / 2.0))
    assert fast["acceptance_rate"] == 1.0
    assert fast["accept_histogram"] == {"0": 0, "1": 0, "2": 0, "3": 12}
    ledger = fast["ledger"]
    assert ledger["tokens_saved"] == 9
    # What the ledger says was gained is what the clock says.
    assert ledger["net_ms"] == pytest.approx(24 - 9)


def test_interrupt_keeps_finished_samples() -> None:
    workload = fake_workload()
    calls = []

    def stop() -> None:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt

    samples = run_interleaved(workload, ["target", "fast"], 0, stop)
    assert len(samples) == 6
    results = summarize(samples, ["target", "fast"], workload, {}, "")
    assert results["arms"][0]["samples"] == 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"gamma": 0}, r"--gamma must be in 1\.\.63, got 0"),
        ({"gamma": 64}, "--gamma must be in"),
        ({"rows": 65}, "--rows must be in"),
        ({"samples": 0}, "--samples must be in"),
        ({"dtype": "int8"}, "--dtype must be one of"),
        ({"arms": "target,quick"}, "unknown arms"),
        ({"arms": "tree"}, "is what everything is compared with"),
        ({"backend": "cuda", "arms": "target,ngram", "samples": 1}, "cuda"),
        ({"draft": "other"}, "--draft of the pair"),
        ({"prompts": Path("p.txt")}, "--prompts goes with --target"),
        ({"target": "/nowhere"}, "needs --prompts"),
        ({"video": Path("v.mp4")}, "--video goes with --events"),
        ({"questions": Path("/nowhere/q.txt")}, "file not found"),
        ({"events": Path("/nowhere/e.npy")}, "e.npy"),
    ],
)
def test_bad_options(values: dict, message: str, tmp_path: Path) -> None:
    options = Options("", **{"output_dir": tmp_path / "out", "warmup": 0, **values})
    with pytest.raises((ValueError, RuntimeError, OSError), match=message):
        run_e2e(options)
    assert not list((tmp_path / "out").glob("*")) if (tmp_path / "out").exists() else True


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_absent_gpu_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no CUDA device"):
        run_e2e(Options("", device="cuda", output_dir=tmp_path))


def test_output_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises((ValueError, OSError), match="file"):
        run_e2e(Options("", output_dir=tmp_path / "file" / "out"))


def test_error_is_one_line_without_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "bench/e2e.py", "--gamma", "0", "--output-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip() == "error: --gamma must be in 1..63, got 0"


def test_text_model_in_a_folder(tmp_path: Path) -> None:
    mini.load("assistant").save_pretrained(tmp_path / "lm")
    mini.load_tokenizer().save_pretrained(tmp_path / "lm")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("The key elements in this scene\nThe driver can\n")
    options = Options(
        "",
        target=str(tmp_path / "lm"),
        draft=str(tmp_path / "lm"),
        prompts=prompts,
        warmup=0,
        max_new_tokens=24,
        output_dir=tmp_path / "out",
    )
    results = run_e2e(options)
    assert all(a["identical"] == 2 for a in results["arms"])
    draft = next(a for a in results["arms"] if a["name"] == "draft")
    assert draft["tokens_per_verify"] > 3  # the draft is the target


def test_ask_answers_from_a_recording(tmp_path: Path) -> None:
    sample = make_sample(mini.TEST_SEED + 7)
    frames = render(sample.scene, np.random.default_rng(7))
    np.save(tmp_path / "e.npy", event_stream(frames, np.random.default_rng(8)), allow_pickle=True)
    np.save(tmp_path / "v.npy", sample.video)
    arguments = ["ask", "--events", str(tmp_path / "e.npy"), "--video", str(tmp_path / "v.npy")]
    result = invoke(cli.app, *arguments, "What is happening in this scene?")
    assert result.exit_code == 0, result.output
    assert "vehicle" in result.stdout
    assert "tokens per verify" in result.output


def test_ask_names_a_missing_file(tmp_path: Path) -> None:
    result = invoke(cli.app, "ask", "--events", tmp_path / "no.npy", "What?")
    assert result.exit_code == 2
    assert "no.npy" in result.output


def test_doctor_names_every_op_and_package() -> None:
    result = invoke(cli.app, "doctor")
    assert result.exit_code == 0, result.output
    for word in ("tree_mask", "verify_greedy", "kv_commit", "transformers", "compiled kernels"):
        assert word in result.output


def test_doctor_cuts_no_word_short(monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    lines = invoke(cli.app, "doctor").output.splitlines()
    assert any("transformers" in line and "targets and drafts" in line for line in lines)
    assert not any("…" in line for line in lines)


def test_doctor_finds_an_unsupported_version(monkeypatch) -> None:
    monkeypatch.setattr(doctor, "SUPPORTED", (("torch", "99", None, "everything"),))
    result = invoke(cli.app, "doctor")
    assert result.exit_code == 1
    assert "not supported" in result.output
