"""Frames of video files, image folders and arrays: which ones, exactly, and clear errors."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from xspec_runtime.data import video_file
from xspec_runtime.data.images import clip_preprocess, resize
from xspec_runtime.data.video import frame_indices, load_video, preprocess_video, resized_video
from xspec_runtime.data.video_file import Stopped, read_frames

av = pytest.importorskip("av")


def moving(count: int, height: int = 48, width: int = 64) -> np.ndarray:
    """uint8 [count, height, width, 3]: a smooth picture that drifts and changes its level."""
    columns = np.arange(width)[None, None, :] + 2 * np.arange(count)[:, None, None]
    wave = 40 * np.sin(columns / 9) + 60 + 3 * np.arange(count)[:, None, None]
    gray = np.broadcast_to(wave, (count, height, width))
    return np.stack([gray, gray * 0.8, 200 - gray * 0.5], -1).clip(0, 255).astype(np.uint8)


def write(
    path: Path,
    frames: np.ndarray,
    codec: str,
    group: int = 12,
    options: dict[str, str] | None = None,
) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=20, options=options or {})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt, stream.gop_size, stream.bit_rate = "yuv420p", group, 8_000_000
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


def decode_all(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


def test_uniform_frames_of_a_clip(tmp_path):
    frames = moving(40)
    found = load_video(write(tmp_path / "clip.mp4", frames, "mpeg4"))
    assert found.shape == (8, 48, 64, 3) and found.dtype == np.uint8
    distance = np.abs(found[:, None].astype(int) - frames[None]).mean((2, 3, 4))
    assert distance.argmin(1).tolist() == [0, 5, 11, 16, 22, 27, 33, 39]


@pytest.mark.parametrize("group", [5, 250])
@pytest.mark.parametrize(
    ("suffix", "codec"), [("mp4", "mpeg4"), ("avi", "mpeg4"), ("mkv", "libx264"), ("ts", "libx264")]
)
def test_same_frames_as_decoding_everything(suffix, codec, group, tmp_path):
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no {codec}")
    path = write(tmp_path / f"clip.{suffix}", moving(33), codec, group)
    whole = decode_all(path)
    assert len(whole) == 33
    for n, mode in ((8, "uniform"), (8, "first-n"), (1, "uniform"), (50, "uniform")):
        assert np.array_equal(load_video(path, n, mode), whole[frame_indices(33, n, mode)])


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize(
    ("codec", "group", "options"),
    [
        ("libx264", 7, {"bf": "3", "b-pyramid": "normal"}),
        ("libx264", 250, {"bf": "8", "b-pyramid": "none"}),
        ("libx264", 11, {"bf": "3", "x264-params": "open-gop=1"}),
        ("mpeg2video", 6, {"bf": "2"}),
        ("mpeg4", 9, {"bf": "1"}),
    ],
)
def test_threads_and_skipped_pictures_change_no_byte(
    threads, codec, group, options, tmp_path, monkeypatch
):
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no {codec}")
    path = write(tmp_path / "clip.mp4", moving(47), codec, group, options)
    whole = decode_all(path)
    monkeypatch.setattr(video_file, "cores", lambda: threads)
    for n, mode in ((8, "uniform"), (3, "uniform"), (8, "first-n"), (47, "uniform")):
        assert np.array_equal(load_video(path, n, mode), whole[frame_indices(47, n, mode)])


class Decoded:
    """What `video_file` decodes: one count of frames for each run of packets."""

    def __init__(self, monkeypatch) -> None:
        self.runs: list[int] = []
        frames_of = video_file._frames_of

        def counting(container, run):
            self.runs.append(0)
            place = len(self.runs) - 1
            for frame in frames_of(container, run):
                self.runs[place] += 1
                yield frame

        monkeypatch.setattr(video_file, "_frames_of", counting)
        monkeypatch.setattr(video_file, "_by_count", lambda *_: pytest.fail("decoded everything"))


def test_decodes_only_what_is_needed(tmp_path, monkeypatch):
    path = write(tmp_path / "clip.mp4", moving(200), "mpeg4", group=4)
    decoded = Decoded(monkeypatch)
    assert np.array_equal(load_video(path, 4), decode_all(path)[[0, 66, 133, 199]])
    assert len(decoded.runs) == 4 and sum(decoded.runs) <= 4 * 4
    # 8 frames of the first two groups, each decoded once.
    decoded.runs.clear()
    load_video(path, 8, "first-n")
    assert decoded.runs == [4, 4]


@pytest.mark.skipif("libx264" not in av.codecs_available, reason="this PyAV has no libx264")
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_pictures_that_no_other_needs_are_left_out(suffix, tmp_path, monkeypatch):
    options = {"bf": "3", "b-pyramid": "none", "x264-params": "b-adapt=0:scenecut=0"}
    path = write(tmp_path / f"clip.{suffix}", moving(100), "libx264", 250, options)
    decoded = Decoded(monkeypatch)
    assert np.array_equal(load_video(path), decode_all(path)[frame_indices(100)])
    # Of each 4 pictures 3 are not referred to; 8 wanted ones may be among those.
    assert len(decoded.runs) == 1 and decoded.runs[0] <= 100 // 4 + 2 + 8


def test_damaged_tail_gives_the_frames_before_it(tmp_path):
    path = write(tmp_path / "clip.mkv", moving(60), "mpeg4")
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert load_video(cut).shape == (8, 48, 64, 3)


@pytest.mark.parametrize(
    ("total", "n", "mode", "expected"),
    [
        (20, 4, "uniform", [0, 6, 12, 19]),
        (3, 5, "uniform", [0, 0, 1, 1, 2]),
        (1, 3, "uniform", [0, 0, 0]),
        (9, 1, "uniform", [0]),
        (20, 3, "first-n", [0, 1, 2]),
        (2, 4, "first-n", [0, 1, 1, 1]),
    ],
)
def test_frame_indices(total, n, mode, expected):
    assert frame_indices(total, n, mode) == expected


def test_folder_of_images_and_array_agree(tmp_path):
    from PIL import Image

    frames = moving(12)
    folder = tmp_path / "frames"
    folder.mkdir()
    for index in reversed(range(12)):
        Image.fromarray(frames[index]).save(folder / f"{index:03d}.PNG", format="png")
    (folder / "notes.txt").write_text("not a frame")
    np.save(tmp_path / "frames.npy", frames)
    for n, mode in ((8, "uniform"), (5, "first-n"), (20, "uniform")):
        expected = frames[frame_indices(12, n, mode)]
        assert np.array_equal(load_video(folder, n, mode), expected)
        assert np.array_equal(load_video(tmp_path / "frames.npy", n, mode), expected)


def test_to_tensor(tmp_path):
    frames = moving(10)
    np.save(tmp_path / "frames.npy", frames)
    pixels = preprocess_video(tmp_path / "frames.npy", n=8, size=32, fit="squash")
    assert pixels.shape == (8, 3, 32, 32) and pixels.dtype == torch.float32
    expected = clip_preprocess(frames[frame_indices(10)], 32, fit="squash")
    assert torch.equal(pixels, expected)


@pytest.mark.parametrize("fit", ["crop", "squash"])
def test_frames_prepared_while_others_decode_are_the_same(fit, tmp_path):
    path = write(tmp_path / "clip.mp4", moving(40, 90, 120), "mpeg4", group=6)
    frames = load_video(path, 5)
    assert np.array_equal(resized_video(path, 5, size=32, fit=fit), resize(frames, 32, fit))
    buffer = torch.full((5, 3, 32, 32), torch.nan)
    for n, mode in ((5, "first-n"), (5, "uniform")):
        pixels = preprocess_video(path, n, mode, size=32, fit=fit, out=buffer)
        assert pixels is buffer
        assert torch.equal(pixels, clip_preprocess(load_video(path, n, mode), 32, fit=fit))
    short = write(tmp_path / "short.mp4", moving(3), "mpeg4")
    assert torch.equal(preprocess_video(short, 8, size=16), clip_preprocess(load_video(short), 16))


def test_buffers_that_do_not_fit_come_before_the_file(tmp_path):
    for out in (
        torch.zeros(8, 3, 32, 31),
        torch.zeros(8, 3, 32, 32, dtype=torch.float64),
        torch.zeros(8, 3, 32, 64)[..., ::2],
    ):
        with pytest.raises(ValueError, match=r"out must be contiguous float32 \[8, 3, 32, 32\]"):
            preprocess_video(tmp_path / "absent.mp4", size=32, out=out)
    with pytest.raises(ValueError, match="fit must be one of"):
        resized_video(tmp_path / "absent.mp4", fit="pad")


def reading_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("xspec-video")]


@pytest.mark.parametrize("group", [5, 250])
def test_reading_can_be_stopped(group, tmp_path):
    path = write(tmp_path / "clip.mp4", moving(60), "mpeg4", group)
    stop = threading.Event()
    shaped = []

    def shape(frame: np.ndarray) -> np.ndarray:
        shaped.append(frame)
        stop.set()
        return frame

    with pytest.raises(Stopped, match="was stopped"):
        read_frames(path, lambda total: list(range(total)), shape, stop)
    assert len(shaped) < 60 and not reading_threads()
    with pytest.raises(Stopped):
        load_video(path, stop=stop)


@pytest.mark.parametrize("group", [5, 250])
def test_an_error_on_another_thread_is_raised_once(group, tmp_path):
    path = write(tmp_path / "clip.mp4", moving(60), "mpeg4", group)

    def shape(frame: np.ndarray) -> np.ndarray:
        raise MemoryError("no room for a frame")

    with pytest.raises(MemoryError, match="no room"):
        read_frames(path, frame_indices, shape)
    assert not reading_threads()


def test_bad_files_are_named(tmp_path):
    def wrong(name: str, message: str, content: bytes | None = None) -> None:
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message) as caught:
            load_video(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)

    with pytest.raises(FileNotFoundError, match=r"video not found: .*none\.mp4"):
        load_video(tmp_path / "none.mp4")
    wrong("empty.mp4", "not a readable video", b"")
    wrong("text.mp4", "not a readable video", b"not a video\n" * 50)
    wrong("text.txt", "not a readable video", b"not a video\n" * 50)
    np.save(tmp_path / "float.npy", np.zeros((2, 4, 4, 3), np.float32))
    wrong("float.npy", r"expected uint8 \[F, H, W, 3\] frames, got float32")
    np.save(tmp_path / "dict.npy", {"x": 1})
    wrong("dict.npy", r"expected a .npy of uint8")
    np.save(tmp_path / "none.npy", np.zeros((0, 4, 4, 3), np.uint8))
    wrong("none.npy", "no frames")
    (tmp_path / "folder").mkdir()
    wrong("folder", "no images")
    wrong("folder", r"no images \(")
    (tmp_path / "folder" / "a.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"a\.png: not a readable image"):
        load_video(tmp_path / "folder")


def test_images_of_two_sizes_are_refused(tmp_path):
    from PIL import Image

    for index, size in enumerate([(4, 4), (4, 5)]):
        Image.new("RGB", size).save(tmp_path / f"{index}.png")
    with pytest.raises(ValueError, match="images differ in size"):
        load_video(tmp_path)


def test_sound_and_playlists_are_no_video(tmp_path):
    with av.open(str(tmp_path / "sound.mkv"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    with pytest.raises(ValueError, match=r"sound\.mkv: no video stream"):
        load_video(tmp_path / "sound.mkv")
    clip = write(tmp_path / "clip.ts", moving(20), "mpeg2video")
    playlist = tmp_path / "list.m3u8"
    playlist.write_text(
        f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{clip.name}\n#EXT-X-ENDLIST\n"
    )
    assert len(decode_all(playlist)) == 20, "the playlist works where it is not stopped"
    with pytest.raises(ValueError, match=r"list\.m3u8: not a readable video"):
        load_video(playlist)


def test_bad_arguments_come_before_the_file(tmp_path):
    for arguments, message in (
        ({"n": 0}, "at least 1 frame"),
        ({"mode": "last"}, "mode must be one of uniform, first-n, got 'last'"),
    ):
        with pytest.raises(ValueError, match=message):
            load_video(tmp_path / "absent.mp4", **arguments)


def test_missing_pyav_is_named(tmp_path, monkeypatch):
    path = write(tmp_path / "clip.mp4", moving(5), "mpeg4")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(RuntimeError, match="needs PyAV"):
        load_video(path)
