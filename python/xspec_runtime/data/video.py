"""Frames of a clip: a video file (PyAV), a directory of images, or a ``.npy`` array of frames."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from .images import CLIP_MEAN, CLIP_STD, clip_preprocess

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer

MODES = ("uniform", "first-n")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
_CONTAINERS = (
    *("mov", "mp4", "matroska", "webm", "avi", "mpeg", "mpegts", "mpegvideo", "flv", "ogg", "asf"),
    *("h264", "hevc", "ivf", "m4v", "mjpeg", "gif", "apng", "yuv4mpegpipe"),
)


def frame_indices(total: int, n: int = 8, mode: str = "uniform") -> list[int]:
    """Which of ``total`` frames to show.

    ``uniform`` spreads ``n`` frames from the first to the last, both included, as Video-LLaVA does;
    ``first-n`` takes the head of the clip. A clip of fewer than ``n`` frames repeats some of them
    (``uniform``) or its last one (``first-n``).

    Returns:
        ``n`` non-decreasing indices in ``0..total - 1``.

    Raises:
        ValueError: ``total`` or ``n`` < 1, or an unknown mode.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if n < 1:
        raise ValueError(f"at least 1 frame must be asked for, got {n}")
    if total < 1:
        raise ValueError("the clip has no frames")
    if mode == "first-n":
        return [min(i, total - 1) for i in range(n)]
    return np.linspace(0, total - 1, n).round().astype(int).tolist()


def load_video(path: str | Path, n: int = 8, mode: str = "uniform") -> np.ndarray:
    """Read ``n`` frames of a clip.

    Args:
        path: a video file, a directory of equally sized images (sorted by name), or a ``.npy`` of
            uint8 ``[F, H, W, 3]``.
        n: frames to return.
        mode: ``"uniform"`` or ``"first-n"``, see `frame_indices`.

    Returns:
        uint8 ``[n, H, W, 3]`` RGB.

    Raises:
        FileNotFoundError: no such file or directory.
        ValueError: not a video, no frames, or a bad argument.
        RuntimeError: a video file is given and PyAV is not installed.
    """
    path = Path(path)
    frame_indices(1, n, mode)
    if not path.exists():
        raise FileNotFoundError(f"video not found: {path}")
    if path.is_dir():
        return _from_directory(path, n, mode)
    if path.suffix == ".npy":
        return _from_array(path, n, mode)
    return _from_video(path, n, mode)


def preprocess_video(
    path: str | Path,
    n: int = 8,
    mode: str = "uniform",
    size: int = 224,
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
    fit: str = "crop",
) -> torch.Tensor:
    """Read and preprocess a clip: `load_video`, then `clip_preprocess`.

    Returns:
        float32 ``[n, 3, size, size]``.
    """
    return clip_preprocess(load_video(path, n, mode), size, mean, std, fit)


def _from_directory(path: Path, n: int, mode: str) -> np.ndarray:
    from PIL import Image

    files = sorted(f for f in path.iterdir() if f.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise ValueError(f"{path}: no images ({', '.join(IMAGE_SUFFIXES)}) in this directory")
    wanted = frame_indices(len(files), n, mode)
    images: dict[int, np.ndarray] = {}
    for index in sorted(set(wanted)):
        try:
            with Image.open(files[index]) as picture:
                images[index] = np.asarray(picture.convert("RGB"))
        except Exception as error:
            raise ValueError(f"{files[index]}: not a readable image ({error})") from error
    shapes = {image.shape[:2] for image in images.values()}
    if len(shapes) > 1:
        raise ValueError(f"{path}: images differ in size: {sorted(shapes)}")
    return np.stack([images[index] for index in wanted])


def _from_array(path: Path, n: int, mode: str) -> np.ndarray:
    try:
        frames = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:
        raise ValueError(
            f"{path}: expected a .npy of uint8 [F, H, W, 3] frames ({error})"
        ) from error
    shape = list(frames.shape)
    if frames.dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or 0 in shape[1:]:
        raise ValueError(f"{path}: expected uint8 [F, H, W, 3] frames, got {frames.dtype} {shape}")
    if shape[0] == 0:
        raise ValueError(f"{path}: the clip has no frames")
    return np.array(frames[frame_indices(shape[0], n, mode)])


def _from_video(path: Path, n: int, mode: str) -> np.ndarray:
    try:
        import av
    except ImportError as error:
        raise RuntimeError("reading video files needs PyAV: pip install av") from error
    try:
        try:
            wanted, found = _decode_by_time(path, n, mode)
        except (av.error.FFmpegError, _UnindexedError):
            wanted, found = _decode_by_count(path, n, mode)
    except av.error.FFmpegError as error:
        raise ValueError(f"{path}: not a readable video ({error.strerror})") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return np.stack([found[index] for index in wanted])


class _UnindexedError(Exception):
    """The packets' display times do not tell which frame is which."""


def _open(path: Path) -> InputContainer:
    import av

    # Demuxers that read other files or addresses (playlists, concatenations) and those that render
    # text are left out; an absolute path cannot be read as a protocol.
    options = {"protocol_whitelist": "file", "format_whitelist": ",".join(_CONTAINERS)}
    container = av.open(str(path.absolute()), options=options)
    if not container.streams.video:
        container.close()
        raise ValueError("no video stream in this file")
    container.streams.video[0].thread_type = "AUTO"
    return container


def _decode_by_time(path: Path, n: int, mode: str) -> tuple[list[int], dict[int, np.ndarray]]:
    """Decode only the groups of pictures that hold a wanted frame.

    A first pass reads packet headers (no decoding) for display times and key frames.
    """
    with _open(path) as container:
        stream = container.streams.video[0]
        packets = [p for p in container.demux(stream) if p.size and not p.is_discard]
        if not packets or any(p.pts is None for p in packets):
            raise _UnindexedError
        times = sorted(p.pts for p in packets)
        keys = sorted(p.pts for p in packets if p.is_keyframe)
        wanted = frame_indices(len(times), n, mode)
        found: dict[int, np.ndarray] = {}
        position: int | None = None
        frames: Iterator[VideoFrame] = iter(())
        for index in sorted(set(wanted)):
            before = bisect_right(keys, times[index])
            if before == 0:
                raise _UnindexedError
            if position is None or position < keys[before - 1]:
                container.seek(keys[before - 1], stream=stream)
                frames = container.decode(stream)
            frame = next((f for f in frames if f.pts is not None and f.pts >= times[index]), None)
            if frame is None or frame.pts != times[index]:
                raise _UnindexedError
            position = frame.pts
            found[index] = frame.to_ndarray(format="rgb24")
        return wanted, found


def _decode_by_count(path: Path, n: int, mode: str) -> tuple[list[int], dict[int, np.ndarray]]:
    """Decode the whole clip twice: to count what is decodable, then to keep the wanted frames."""
    with _open(path) as container:
        total = sum(1 for _ in _decodable(container))
    wanted = frame_indices(total, n, mode)
    found: dict[int, np.ndarray] = {}
    with _open(path) as container:
        for index, frame in enumerate(_decodable(container)):
            if index in wanted:
                found[index] = frame.to_ndarray(format="rgb24")
            if index == wanted[-1]:
                break
    return wanted, found


def _decodable(container: InputContainer) -> Iterator[VideoFrame]:
    """Frames up to the first damaged packet."""
    import av

    try:
        yield from container.decode(video=0)
    except av.error.FFmpegError:
        return
