"""End-to-end runs that start at a video file, with the draft beside its preparation or not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from xspec_runtime.data.dsec_miniature import write_miniature
from xspec_runtime.data.scene_video import write_scene
from xspec_runtime.data.scenes import event_stream, make_sample, render
from xspec_runtime.data.video_file import read_frames
from xspec_runtime.e2e import Options, run_e2e
from xspec_runtime.inputs import read_video
from xspec_runtime.models import mini
from xspec_runtime.overlap import Stages, mean_stages
from xspec_runtime.report import markdown_table, validate_results
from xspec_runtime.workloads import video as video_workload
from xspec_runtime.workloads.video import overlap_modes

pytest.importorskip("av")
ARMS = ["target", "hf_generate", "tree", "tree_window", "tree_off"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[dict, Path, list[Path]]:
    folder, files = tmp_path_factory.mktemp("video"), []
    write = video_workload.write_scene
    with pytest.MonkeyPatch.context() as patch:

        def short(file: Path, frames: np.ndarray) -> None:
            files.append(file)
            write(file, frames, 20)

        patch.setattr(video_workload, "write_scene", short)
        results = run_e2e(
            Options(
                "python bench/e2e.py",
                overlap="window,off",
                arms=",".join(ARMS),
                samples=2,
                warmup=0,
                output_dir=folder,
            )
        )
    return results, folder, files


def test_every_mode_gives_the_targets_answers(finished) -> None:
    results, _, files = finished
    validate_results(results)
    assert [arm["name"] for arm in results["arms"]] == ARMS
    assert all(arm["identical"] == arm["samples"] == 2 for arm in results["arms"])
    assert results["config"]["overlap"] == "window,off"
    assert len(files) == 2 and not any(file.exists() for file in files)


def test_times_start_at_the_file(finished) -> None:
    results, _, _ = finished
    for sample in results["samples"]:
        assert sample["prepare_ms"] > 5
        assert sample["ttft_ms"] == pytest.approx(
            sample["prepare_ms"] + sample["prefill_ms"], abs=1e-6
        )
        assert sample["total_ms"] > sample["ttft_ms"]
    for arm in results["arms"]:
        own = [s for s in results["samples"] if s["arm"] == arm["name"]]
        spent = [s["total_ms"] - s["prepare_ms"] - s["prefill_ms"] for s in own]
        assert arm["decode_ms"] == pytest.approx(sum(spent) / 2)


def test_stages_of_the_draft(finished) -> None:
    results, _, _ = finished
    stages = {arm["name"]: arm.get("stages") for arm in results["arms"]}
    assert [stages[name] for name in ("target", "hf_generate", "tree")] == [None] * 3
    for mode in ("window", "off"):
        found = stages[f"tree_{mode}"]
        assert found["mode"] == mode
        assert 0 <= found["hidden_tokens"] <= found["drafted_tokens"] <= 16
        assert found["window_used_ms"] <= found["draft_ms"]
    assert stages["tree_off"]["draft_start_ms"] >= stages["tree_off"]["video_ms"]
    assert stages["tree_off"]["hidden_tokens"] == 0 < stages["tree_off"]["drafted_tokens"]


def test_the_timeline_shows_the_window(finished) -> None:
    results, folder, _ = finished
    by_name = {arm["name"]: arm["timeline"] for arm in results["arms"]}
    assert by_name["target"][0]["name"] == "video" and by_name["target"][0]["start_ms"] == 0
    for mode in ("window", "off"):
        spans = {s["name"]: s for s in by_name[f"tree_{mode}"]}
        text = spans["draft text"]
        assert text["beside"] == (mode != "off")
        assert (text["start_ms"] < spans["video"]["end_ms"]) == (mode != "off")
        assert spans["prefill"]["start_ms"] >= spans["video"]["end_ms"]
    page = (folder / "RESULTS.md").read_text()
    assert "## Beside the video" in page and "| prepare ms |" in page
    assert (folder / "timeline.png").stat().st_size > 0


def test_runs_without_a_video_have_no_such_column(finished) -> None:
    results, _, _ = finished
    plain = {**results, "arms": [dict(arm) for arm in results["arms"]]}
    for arm in plain["arms"]:
        arm.pop("prepare_ms"), arm.pop("stages", None)
    assert "prepare ms" not in markdown_table(plain)
    plain["arms"][0]["prepare_ms"] = "long"
    with pytest.raises(ValueError, match=r"arms\[0\].prepare_ms"):
        validate_results(plain)


def test_a_recording_with_a_video_counts_from_the_file(tmp_path: Path) -> None:
    sample, draw = make_sample(mini.TEST_SEED), np.random.default_rng(0)
    np.save(tmp_path / "e.npy", event_stream(render(sample.scene, draw), draw), allow_pickle=True)
    write_scene(tmp_path / "v.mp4", sample.video, 20)
    results = run_e2e(
        Options(
            "",
            events=tmp_path / "e.npy",
            video=tmp_path / "v.mp4",
            arms="target,tree_window",
            samples=1,
            warmup=0,
            max_new_tokens=24,
            output_dir=tmp_path / "out",
        )
    )
    assert [arm["identical"] for arm in results["arms"]] == [1, 1]
    assert results["arms"][1]["stages"]["mode"] == "window"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"overlap": "both"}, "--overlap must be one of window, concurrent, off, got 'both'"),
        ({"overlap": "off,off"}, "--overlap names a mode more than once"),
        ({"overlap": "off", "target": "/nowhere"}, "--overlap goes with the embedded pair"),
        ({"overlap": "off", "events": Path("e.npy")}, "--overlap needs a video beside --events"),
    ],
)
def test_bad_options(values: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        run_e2e(Options("", output_dir=tmp_path / "out", **values))
    assert not (tmp_path / "out").exists()


def test_which_modes_run() -> None:
    video, events = Path("v.mp4"), Path("e.npy")
    assert overlap_modes("", None, None, "mini") == []
    assert overlap_modes("", None, events, "mini") == []
    assert overlap_modes("", video, events, "mini") == ["window"]
    assert overlap_modes("off, window", None, None, "mini") == ["off", "window"]
    assert overlap_modes("", None, None, "/a/model") == []


def test_a_scene_comes_back_from_its_file(tmp_path: Path) -> None:
    frames = make_sample(mini.TEST_SEED + 3).video
    write_scene(tmp_path / "scene.mp4", frames, 40)
    found = read_video(tmp_path / "scene.mp4")
    assert np.abs(found.astype(int) - frames).mean() < 6
    shapes = read_frames(tmp_path / "scene.mp4", lambda n: [n - 1], lambda frame: frame)
    assert shapes[0].shape == (480, 640, 3)


def test_means_of_stages() -> None:
    one, two = Stages("off", video_ms=2.0, hidden_tokens=1), Stages("off", video_ms=4.0)
    found = mean_stages([one, two])
    assert (found["mode"], found["video_ms"], found["hidden_tokens"]) == ("off", 3.0, 0.5)


def test_clips_of_a_dataset(tmp_path):
    write_miniature(tmp_path, ("500ms",), drives=1, clips=1)
    common = {"arms": "target,ngram_tree", "samples": 2, "warmup": 0, "max_new_tokens": 12}
    options = Options(
        "", dataset_dir=tmp_path, duration="500ms", output_dir=tmp_path / "out", **common
    )
    results = run_e2e(options)
    assert [arm["identical"] for arm in results["arms"]] == [1, 1]
    assert results["samples"][0]["task"] == "procedural_00 000000"
    with pytest.raises(ValueError, match="--duration goes with --dataset-dir"):
        Options("", duration="1s").settings()
    with pytest.raises(ValueError, match="--dataset-dir goes with the embedded pair"):
        Options("", dataset_dir=tmp_path, target="x").settings()
    with pytest.raises(FileNotFoundError, match="has neither my_egpt_dsec_seq_1s"):
        run_e2e(Options("", dataset_dir=tmp_path, duration="1s", **common))
