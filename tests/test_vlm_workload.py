"""Pairs in folders end to end on recorded clips, and datasets that are damaged or too large."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
)

from running import bench_script, invoke
from test_stages import llama, saved, tower
from xspec_runtime import commands
from xspec_runtime.data.dsec import SAMPLES, open_dataset
from xspec_runtime.data.dsec_miniature import write_miniature
from xspec_runtime.e2e import Options, run_e2e
from xspec_runtime.models import mini
from xspec_runtime.models.eventgpt import EventGPTConfig, EventGPTForConditionalGeneration
from xspec_runtime.models.vlm_pair import FolderPair
from xspec_runtime.stages.clock import StageModel
from xspec_runtime.targets.transformers import TransformersTarget

ALL = "target,hf_generate,hf_prompt_lookup,draft,ngram_tree,tree"
MODES = "draft_alone,parallel_prefill,self_nf4,cascade"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("dsec")
    write_miniature(root, ("500ms",), drives=1, clips=2)
    return root


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """A draft and targets of both kinds, with random weights that keep top-2 gaps wide."""
    home = tmp_path_factory.mktemp("pair")
    torch.manual_seed(0)
    text = llama()
    text.initializer_range = 0.25
    ids = {"image_token_index": mini.IMAGE, "vision_feature_layer": -2}
    video = VideoLlavaConfig(
        vision_config=tower(), text_config=text, video_token_index=mini.VIDEO, **ids
    )
    saved(VideoLlavaForConditionalGeneration(video), home / "video_llava")
    llava = LlavaConfig(vision_config=tower(), text_config=text, **ids)
    saved(LlavaForConditionalGeneration(llava), home / "llava")
    events = EventGPTConfig(tower(), text, event_token_id=0)
    saved(EventGPTForConditionalGeneration(events), home / "draft")
    return home


def options(data: Path, out: Path, folders: Path, target: str = "video_llava", **values) -> Options:
    return Options("", **{
        "dataset_dir": data, "duration": "500ms", "target": str(folders / target),
        "draft": str(folders / "draft"), "warmup": 0, "max_new_tokens": 8, "rows": 6, "gamma": 3,
        "samples": 1, "output_dir": out, "threads": 1, **values,
    })  # fmt: skip


@pytest.mark.parametrize("target", ["video_llava", "llava"])
def test_arms_agree_from_file_to_last_token(target, data, folders, tmp_path, monkeypatch):
    monkeypatch.setattr("xspec_runtime.plots.draw_all", lambda *_: [])
    arms = f"{ALL},tree_window,{MODES}" if target == "video_llava" else "target,hf_generate,tree"
    results = run_e2e(options(data, tmp_path, folders, target, arms=arms))
    found = {arm["name"]: arm for arm in results["arms"]}
    assert list(found) == arms.split(",")
    assert all(a["identical"] == 1 for name, a in found.items() if name != "draft_alone")
    assert found["target"]["prepare_ms"] > 0
    assert results["config"]["pair"] == str(folders / target)
    if target == "video_llava":
        assert found["draft_alone"]["agreement"]["answers"] == 1
        assert "prepare_ms" not in found["draft_alone"]
        assert found["tree_window"]["stages"]["mode"] == "window"


def test_questions_in_turn_and_text_that_the_memory_knows(data, folders, tmp_path, monkeypatch):
    monkeypatch.setattr("xspec_runtime.plots.draw_all", lambda *_: [])
    asked = tmp_path / "q.txt"
    asked.write_text("What moves?\n")
    wanted = options(data, tmp_path, folders, samples=2, questions=asked, arms="target,ngram_tree")
    results = run_e2e(wanted)
    assert [arm["identical"] for arm in results["arms"]] == [2, 2]
    assert results["samples"][0]["task"] == "procedural_00 000000"


def test_clips_that_cannot_be_read_are_left_out(data, folders, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("xspec_runtime.plots.draw_all", lambda *_: [])
    broken = shutil.copytree(data, tmp_path / "data")
    first, second = open_dataset(broken, "500ms").clips
    first.events.write_bytes(first.events.read_bytes()[:200])
    for values in ({}, {"target": "mini", "draft": ""}):
        wanted = options(broken, tmp_path / "out", folders, arms="target", samples=2)
        wanted = Options(**{**vars(wanted), **values})
        results = run_e2e(wanted)
        assert [s["task"] for s in results["samples"]] == ["procedural_00 000001"]
        assert results["config"]["clips_left_out"] == 1
        said = " ".join(capsys.readouterr().out.split())
        assert f"left out: procedural_00 000000: {first.events}" in said
    second.video.write_bytes(second.video.read_bytes()[:300])
    shutil.rmtree(second.frames)
    with pytest.raises(ValueError, match=r"none of 2 clips could be read: procedural_00 000000"):
        run_e2e(wanted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"draft": ""}, "or with --target DIR and --draft DIR"),
        ({"events": Path("e.npy")}, "leave out --events"),
        ({"prompts": Path("p.txt")}, "--prompts and --middle go with a text model"),
        ({"draft": "/nowhere"}, "tokenizer folder not found: /nowhere"),
        ({"max_new_tokens": 512}, "leaves fewer than 518 of the target's 512 positions"),
        ({"target": "lm"}, "is of model type 'llama', expected video_llava or llava"),
        ({"target": "truncated"}, "truncated cannot be used: "),
        ({"target": "lacking"}, "lacks 1 weights, "),
    ],
)
def test_what_is_refused(change, message, data, folders, tmp_path):
    if change.get("target") == "lm":
        saved(mini.load("assistant"), tmp_path / "lm")
    elif change.get("target"):
        place = shutil.copytree(folders / "llava", tmp_path / change["target"])
        weights = place / "model.safetensors"
        if change["target"] == "truncated":
            weights.write_bytes(weights.read_bytes()[:5000])
        else:
            model = LlavaForConditionalGeneration.from_pretrained(place)
            state = model.state_dict()
            del state["model.language_model.norm.weight"]
            model.save_pretrained(place, state_dict=state)
    if "target" in change:
        change = {**change, "target": str(tmp_path / change["target"])}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run_e2e(options(data, tmp_path / "out", folders, **change))
    assert not (tmp_path / "out").exists()


# One clear line, whichever command reads the dataset.


def line_of(command: str, data: Path, out: Path, *more: str) -> str:
    """What `command` says on standard error, where it must fail with status 2."""
    base = ["--dataset-dir", str(data), "--duration", "500ms"]
    if command == "e2e":
        more = ("--arms", "target", *more)
        app, arguments = bench_script("e2e").app, [*base, "--warmup", "0", "--output-dir", str(out)]
    else:
        app = commands.app
        place = ["--output-dir", str(out)] if command == "stages" else ["--output", str(out / "p")]
        arguments = [command, *base, *place]
    result = invoke(app, *arguments, "--max-new-tokens", 3, *more)
    assert result.exit_code == 2, result.output
    lines = [text for text in result.stderr.splitlines() if text.startswith("error:")]
    assert len(lines) == 1 and "Traceback" not in result.output
    return lines[0]


COMMANDS = ("e2e", "stages", "extract")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_damaged_list_of_samples_or_questions(command, data, tmp_path):
    broken = shutil.copytree(data, tmp_path / "data")
    questions = tmp_path / "questions.json"
    questions.write_text('["What moves?", "Wh')
    option = "--questions-file" if command == "extract" else "--questions"
    line = line_of(command, broken, tmp_path / "out", option, str(questions))
    assert line.startswith(f"error: {questions} is not JSON")
    samples = open_dataset(broken, "500ms").folder / SAMPLES
    samples.write_text(samples.read_text()[:100])
    line = line_of(command, broken, tmp_path / "out")
    assert line.startswith(f"error: {samples} is not JSON")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind", ["events", "video"])
def test_truncated_clips(command, kind, data, tmp_path):
    broken = shutil.copytree(data, tmp_path / "data")
    for clip in open_dataset(broken, "500ms").clips:
        file = clip.events if kind == "events" else clip.video
        file.write_bytes(file.read_bytes()[:300])
        if kind == "video":
            shutil.rmtree(clip.frames, ignore_errors=True)
    line = line_of(command, broken, tmp_path / "out")
    first = open_dataset(broken, "500ms").clips[0]
    assert ("could be run" in line) or ("could be answered" in line) or ("could be read" in line)
    assert str(first.events if kind == "events" else first.video) in line


@pytest.mark.parametrize("command", COMMANDS)
def test_memory_that_runs_out(command, data, tmp_path, monkeypatch):
    def exhausted(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has")

    if command == "e2e":
        monkeypatch.setattr(TransformersTarget, "forward", exhausted)
    else:
        monkeypatch.setattr(StageModel, "run", exhausted)
    line = line_of(command, data, tmp_path / "out")
    assert line.startswith("error: out of memory (2.50 GiB more were asked for); lower ")
    assert "--max-new-tokens" in line and "--dtype bfloat16" in line
    assert not list(tmp_path.rglob("results.json"))


def test_memory_that_runs_out_while_clips_are_read(data, folders, tmp_path, monkeypatch):
    def exhausted(*_: object) -> None:
        raise MemoryError("Unable to allocate 7.45 GiB for an array")

    monkeypatch.setattr(FolderPair, "target_inputs", exhausted)
    with pytest.raises(MemoryError):
        run_e2e(options(data, tmp_path / "out", folders))
