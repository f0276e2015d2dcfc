"""Datasets in the DSEC layout: a miniature one written, read back, damaged and split by drive."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from running import xspec
from xspec_runtime.data.dsec import SAMPLES, check, open_dataset, present_durations
from xspec_runtime.data.dsec_miniature import FIRST_SCENE, write_miniature
from xspec_runtime.data.events import load_events, rasterize
from xspec_runtime.data.images import resize
from xspec_runtime.data.scenes import make_sample
from xspec_runtime.data.video import load_video


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("dsec")
    write_miniature(root, ("500ms", "1s"), drives=2, clips=2)
    return root


@pytest.fixture
def copy(written, tmp_path) -> Path:
    return shutil.copytree(written / "my_egpt_dsec_seq_500ms", tmp_path / "data")


def edit(folder: Path, index: int, **values) -> None:
    samples = json.loads((folder / SAMPLES).read_text())
    samples[index] |= values
    (folder / SAMPLES).write_text(json.dumps(samples))


def test_layout(written):
    assert present_durations(written) == ["500ms", "1s"]
    data = open_dataset(written, "1s")
    assert (data.duration, len(data.clips)) == ("1s", 4)
    assert data.drives == ["procedural_00", "procedural_01"]
    assert check(data, read=True) == []
    clip = data.clips[3]
    assert clip.events.relative_to(data.folder).as_posix() == "event_npy/procedural_01/000001.npy"
    assert [p.name for p in clip.images] == [f"000001_{i}.png" for i in range(5)]
    assert clip.question.endswith(("?", "."))
    assert load_video(clip.film, 8).shape == load_video(clip.frames, 8).shape == (8, 480, 640, 3)
    events = load_events(clip.events)
    assert 500_000 < int(events.t.max() - events.t.min()) <= 1_000_000


def test_clips_show_their_scene(written):
    clip = open_dataset(written, "500ms").clips[0]
    scene = make_sample(FIRST_SCENE)
    small = resize(load_video(clip.frames, 8), 64, "squash").astype(int)
    assert np.abs(small - scene.video).mean() < 3
    image = resize(rasterize(load_events(clip.events))[None], 64, "squash")[0].astype(int)
    assert np.abs(image - scene.event_image).mean() < 6


def test_split_by_drive(written):
    data = open_dataset(written / "my_egpt_dsec_seq_1s")
    parts = data.by_drive(2)
    assert sorted(len(part) for part in parts) == [2, 2]
    assert not {c.drive for c in parts[0]} & {c.drive for c in parts[1]}
    with pytest.raises(ValueError, match="2 drives, which do not make 3 folds"):
        data.by_drive(3)


def test_what_is_there_is_kept(written):
    film = open_dataset(written, "1s").clips[0].film
    before = film.stat().st_mtime_ns
    write_miniature(written, ("1s",), drives=2, clips=2)
    assert film.stat().st_mtime_ns == before


def test_faults_are_named(copy):
    clips = open_dataset(copy).clips
    clips[0].events.unlink()
    clips[1].film.write_bytes(b"no film")
    shutil.rmtree(clips[2].frames)
    clips[2].film.unlink()
    clips[3].events.write_bytes(b"")
    edit(copy, 3, id=clips[0].id)
    data = open_dataset(copy)
    found = check(data)
    assert [clips[0].events.name in found[0], len(found)] == [True, 4]
    assert "neither frames nor a film" in found[1] and found[2] == f"{clips[3].events}: empty"
    assert "twice" in found[3]
    assert any(clips[1].film.name in fault for fault in check(data, read=True))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"event_data": "/etc/passwd"}, "sample 1: event_data is '/etc/passwd', expected a path"),
        ({"video_data": "../../x"}, "sample 1: video_data is"),
        ({"mp4_data": 3}, "sample 1: mp4_data must be a path, got 3"),
        ({"event_image": "x.png"}, "sample 1: event_image must be a list"),
        ({"conversations": ["hello"]}, "sample 1: conversations must be a list of turns"),
        ({"event_data": None}, "sample 1: event_data must be a path"),
    ],
)
def test_damaged_samples(copy, values, words):
    edit(copy, 1, **values)
    with pytest.raises(ValueError, match=words):
        open_dataset(copy)


def test_missing_datasets(written, tmp_path):
    with pytest.raises(FileNotFoundError, match="dataset folder not found"):
        open_dataset(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="has neither my_egpt_dsec_seq_20s"):
        open_dataset(written, "20s")
    with pytest.raises(ValueError, match="duration must be one of"):
        open_dataset(written, "3s")
    with pytest.raises(FileNotFoundError, match="file of samples not found"):
        open_dataset(tmp_path)
    with pytest.raises(ValueError, match=f"{written} holds datasets of .*: --duration names one"):
        open_dataset(written)


def test_commands(tmp_path, capsys):
    run = partial(xspec, "dataset")

    root = tmp_path / "root"
    assert run("generate", str(root), "--durations", "500ms", "--drives", "1", "--clips", "1") == 0
    assert run("check", str(root), "--duration", "500ms", "--read") == 0
    assert "1 clips of 1 drives, 500ms each" in capsys.readouterr().out
    open_dataset(root, "500ms").clips[0].events.unlink()
    assert run("check", str(root), "--duration", "500ms") == 2
    told = capsys.readouterr()
    assert "missing" in told.out and "1 faults" in told.err
    assert run("generate", str(root), "--durations", "3s") == 2
