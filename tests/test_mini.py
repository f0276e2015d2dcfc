"""The embedded pair: scenes, shipped checkpoints, training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from running import invoke
from xspec_runtime.data.captions import QUESTIONS, Scene, draft_caption, target_caption
from xspec_runtime.data.scenes import FACT_SIZES, event_stream, facts, make_sample, render
from xspec_runtime.files import read_json
from xspec_runtime.models import mini
from xspec_runtime.models.eventgpt import EventGPTForConditionalGeneration
from xspec_runtime.models.mini_train import app

TRAINING = mini.CHECKPOINTS / "training.json"


def test_scenes_are_reproducible() -> None:
    first, second = make_sample(7), make_sample(7)
    assert first.scene == second.scene
    assert np.array_equal(first.video, second.video)
    assert np.array_equal(first.event_image, second.event_image)
    assert first.video.shape == (8, 64, 64, 3) and first.video.dtype == np.uint8


def test_facts_stay_in_range_and_vary() -> None:
    rows = np.array([facts(Scene.draw(np.random.default_rng(s))) for s in range(400)])
    assert (rows >= 0).all() and (rows < np.array(FACT_SIZES)).all()
    # Every entry takes at least two values; a lane's vehicle may lack motions of other lanes.
    assert all(len(np.unique(rows[:, i])) >= 2 for i in range(rows.shape[1]))


def test_target_caption_is_a_function_of_all_facts() -> None:
    drawn = [Scene.draw(np.random.default_rng(s)) for s in range(3000)]
    by_caption: dict[str, Scene] = {}
    for scene in drawn:
        assert by_caption.setdefault(target_caption(scene), scene) == scene


def test_draft_caption_hides_what_events_cannot_show() -> None:
    scene = next(
        s
        for s in (Scene.draw(np.random.default_rng(i)) for i in range(100))
        if not s.driving and s.light != "none"
    )
    text = draft_caption(scene)
    assert "light" not in text and not any(v.color in text for v in scene.vehicles)


def test_event_stream_is_sorted_and_matches_the_picture() -> None:
    scene = Scene.draw(np.random.default_rng(3))
    frames = render(scene, np.random.default_rng(3))
    stream = event_stream(frames, np.random.default_rng(4))
    assert (np.diff(stream["t"]) >= 0).all() and set(np.unique(stream["p"])) <= {0, 1}
    from xspec_runtime.data.scenes import event_image

    image = event_image(frames, np.random.default_rng(4))
    expected = np.full((64, 64, 3), 255, np.uint8)
    for polarity, color in ((0, (0, 0, 255)), (1, (255, 0, 0))):
        keep = stream["p"] == polarity
        expected[stream["y"][keep], stream["x"][keep]] = color
    assert np.array_equal(image, expected)


@pytest.mark.parametrize("name", list(mini.MODELS))
def test_every_linear_reads_whole_tiles(name: str) -> None:
    widths = {m.in_features for m in mini.build(name).modules() if isinstance(m, nn.Linear)}
    assert all(w % 64 == 0 for w in widths)


def test_checkpoints_are_small_and_complete() -> None:
    size = sum(f.stat().st_size for f in mini.CHECKPOINTS.rglob("*") if f.is_file())
    assert size <= 16e6
    assert read_json(TRAINING)["stages_cpu_seconds"] < 40 * 60
    assert len(mini.load_answers()) >= 2000


@pytest.mark.parametrize("name", list(mini.MODELS))
def test_checkpoints_load(name: str) -> None:
    model = mini.load(name)
    assert not model.training
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_captions_of_unseen_scenes() -> None:
    model, tokenizer = mini.load("target"), mini.load_tokenizer()
    right = 0
    for i in range(30):
        sample = make_sample(mini.TEST_SEED + 500_000 + i)
        inputs = mini.target_inputs(QUESTIONS[i % len(QUESTIONS)], sample.video, tokenizer)
        out = model.generate(
            **inputs, do_sample=False, max_new_tokens=128, pad_token_id=0, eos_token_id=mini.EOS
        )
        answer = out[0, inputs["input_ids"].shape[1] :].tolist()
        right += mini.decode_answer(answer, tokenizer) == target_caption(sample.scene)
    recorded = read_json(TRAINING)["stages"]["target_lm"]["held_out_exact_captions"]
    assert recorded >= 0.9
    # Three standard deviations of 30 draws below what training recorded.
    low = 30 * recorded - 3 * (30 * recorded * (1 - recorded)) ** 0.5
    assert right >= max(low, 1), f"{right} of 30 captions exact, the record says {recorded:.0%}"


def test_eventgpt_generates_and_round_trips(tmp_path: Path) -> None:
    model, tokenizer = mini.load("draft_raw"), mini.load_tokenizer()
    inputs = mini.draft_inputs(QUESTIONS[0], make_sample(mini.TEST_SEED).event_image, tokenizer)
    options = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0}
    out = model.generate(**inputs, **options)
    model.save_pretrained(tmp_path)
    again = EventGPTForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert torch.equal(again.generate(**inputs, **options), out)


def test_eventgpt_pools_time_and_space() -> None:
    model = mini.load("draft_raw").model
    images = torch.randn(2, 3, 3, 64, 64)
    tokens = model.get_event_features(images)
    assert tokens.shape == (2, 3 + mini.PATCH_TOKENS, 128)
    patches = model.visual_tower(images[1, 2:3]).last_hidden_state
    frame = model.feature_adaptor(model.visual_projector(patches)).mean(1)[0]
    torch.testing.assert_close(tokens[1, 2], frame, rtol=1e-4, atol=1e-5)


def test_eventgpt_counts_placeholders() -> None:
    model = mini.build("draft_raw")
    with pytest.raises(ValueError, match=r"17 event placeholders.*18 tokens"):
        model(
            input_ids=torch.tensor([[1, *[mini.EVENT] * 17]]),
            event_pixel_values=torch.zeros(1, 1, 3, 64, 64),
        )


def test_missing_and_truncated_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"model.safetensors is missing"):
        mini.load("target", tmp_path)
    (tmp_path / "draft").mkdir()
    whole = (mini.CHECKPOINTS / "draft" / "model.safetensors").read_bytes()
    (tmp_path / "draft" / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RuntimeError, match="not a readable safetensors"):
        mini.load("draft", tmp_path)
    shutil.copytree(mini.CHECKPOINTS / "assistant", tmp_path / "assistant")
    shutil.copytree(mini.CHECKPOINTS / "assistant", tmp_path / "draft_raw")
    with pytest.raises(RuntimeError, match="does not fit draft_raw"):
        mini.load("draft_raw", tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--part", "half"], "--part must be all, target or draft, got 'half'"),
        (["--threads", "0"], "--threads must be in 1..1024, got 0"),
        (["--smoke-steps", "-5"], "--smoke-steps must be in 0..10000, got -5"),
        (["--seed", "-1"], "--seed must be in"),
        (["--out", "FILE"], "Not a directory"),
        (["--to", "FILE"], "Not a directory"),
        (["--speed", "1"], "No such option"),
    ],
)
def test_bad_options_of_training(options: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    options = [o.replace("FILE", str(tmp_path / "file")) for o in options]
    arguments = ["train", "--out", str(tmp_path / "run"), "--to", str(tmp_path / "to"), *options]
    result = invoke(app, *arguments)
    assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1, result.output
    assert result.stderr.startswith("error: ") and message in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("name", ["scenes.npz", "target_tower.pt"])
def test_damaged_stage_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"half")
    arguments = ["train", "--out", str(tmp_path), "--smoke-steps", "1", "--threads", "1"]
    result = invoke(app, *arguments, "--to", tmp_path / "to")
    assert result.exit_code == 2 and not (tmp_path / "to").exists()
    assert f"{tmp_path / name} is damaged" in result.stderr and "remove it" in result.stderr


def test_smoke_training_resumes(tmp_path: Path) -> None:
    arguments = ["train", "--out", str(tmp_path / "run"), "--to", str(tmp_path / "out")]
    arguments += ["--smoke-steps", "20", "--threads", "1"]
    for _ in range(2):  # the second run finds everything done and only exports
        result = invoke(app, *arguments)
        assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "out" / "training.json").read_text())
    assert record["stages"]["target_lm"]["steps"] == 20
    model = mini.load("target", tmp_path / "out")
    assert all(torch.isfinite(p).all() for p in model.parameters())
