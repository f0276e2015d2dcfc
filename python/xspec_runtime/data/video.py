"""Frames of a clip: a video file (PyAV), a directory of images, or a ``.npy`` array of frames."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from threading import Event

import numpy as np
import torch

from .device_images import preprocess_frames
from .images import CLIP_MEAN, CLIP_STD, check_fit, check_scale, normalize, resize_frame
from .staging import StagingBuffers
from .video_file import Shape, read_frames

__all__ = [
    "IMAGE_SUFFIXES",
    "MODES",
    "DeviceVideo",
    "frame_indices",
    "load_video",
    "preprocess_video",
    "resized_video",
]

MODES = ("uniform", "first-n")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


def frame_indices(total: int, n: int = 8, mode: str = "uniform") -> list[int]:
    """Which of ``total`` frames to show.

    ``uniform`` spreads ``n`` frames from the first to the last, both included, and cuts places
    between two frames down to the earlier one, as Video-LLaVA's own ``processing_video.py`` does;
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
    return np.linspace(0, total - 1, n).astype(int).tolist()


def load_video(
    path: str | Path, n: int = 8, mode: str = "uniform", stop: Event | None = None
) -> np.ndarray:
    """Read `n` frames of a clip.

    Args:
        path: a video file, a directory of equally sized images (sorted by name), or a ``.npy`` of
            uint8 ``[F, H, W, 3]``.
        n: frames to return.
        mode: ``"uniform"`` or ``"first-n"``, see `frame_indices`.
        stop: once set, reading a video file ends with `video_file.Stopped`.

    Returns:
        uint8 ``[n, H, W, 3]`` RGB.

    Raises:
        FileNotFoundError: no such file or directory.
        ValueError: not a video, no frames, or a bad argument.
        RuntimeError: a video file is given and PyAV is not installed, or `stop` was set.
    """
    return np.stack(_frames(path, n, mode, lambda frame: frame, stop))


def resized_video(
    path: str | Path,
    n: int = 8,
    mode: str = "uniform",
    size: int = 224,
    fit: str = "crop",
    stop: Event | None = None,
) -> np.ndarray:
    """`images.resize` of `load_video`; frames are resized while others are decoded.

    Returns:
        uint8 ``[n, size, size, 3]``.
    """
    check_fit(size, fit)
    return np.stack(_frames(path, n, mode, lambda frame: resize_frame(frame, size, fit), stop))


def preprocess_video(
    path: str | Path,
    n: int = 8,
    mode: str = "uniform",
    size: int = 224,
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
    fit: str = "crop",
    out: torch.Tensor | None = None,
    stop: Event | None = None,
) -> torch.Tensor:
    """`clip_preprocess` of `load_video`; frames are prepared while others are decoded.

    Args:
        out: contiguous float32 ``[n, 3, size, size]`` on the CPU to write to, such as a pinned
            buffer that is used again and again; its last contents must have been copied already.

    Returns:
        float32 ``[n, 3, size, size]``; `out` if that is given.
    """
    check_fit(size, fit)
    check_scale(mean, std)
    shape = (n, 3, size, size)
    if out is None:
        out = torch.empty(shape)
    elif (
        out.shape != shape
        or out.dtype != torch.float32
        or out.device.type != "cpu"
        or not out.is_contiguous()
    ):
        raise ValueError(
            f"out must be contiguous float32 {list(shape)} on the CPU, got {out.dtype} "
            f"{list(out.shape)} on {out.device}"
        )
    frames = _frames(
        path, n, mode, lambda frame: normalize(resize_frame(frame, size, fit), mean, std), stop
    )
    np.stack(frames, out=out.numpy())
    return out


class DeviceVideo:
    """`preprocess_video` with the pixels' work on a device: the CPU only decodes.

    Decoded frames go through pinned memory that is used again; resizing and normalizing give the
    same bits as on the CPU (`device_images`).

    Args:
        n, mode, size, mean, std, fit: as in `preprocess_video`.
        device: where the result lies.
    """

    def __init__(
        self,
        device: torch.device | str,
        n: int = 8,
        mode: str = "uniform",
        size: int = 224,
        mean: Sequence[float] = CLIP_MEAN,
        std: Sequence[float] = CLIP_STD,
        fit: str = "crop",
    ) -> None:
        check_fit(size, fit)
        check_scale(mean, std)
        self._options = (size, mean, std, fit)
        self._n, self._mode, self._device = n, mode, torch.device(device)
        self._staging: StagingBuffers | None = None

    def __call__(self, path: str | Path, stop: Event | None = None) -> torch.Tensor:
        """Float32 ``[n, 3, size, size]`` on the device; raises as `preprocess_video` does."""
        frames = _frames(path, self._n, self._mode, lambda frame: frame, stop)
        shape = (len(frames), *frames[0].shape)
        if self._staging is None or self._staging.shape != shape:
            self._staging = StagingBuffers(shape, torch.uint8, self._device)
        pixels = self._staging.upload(lambda host: np.stack(frames, out=host.numpy()))
        return preprocess_frames(pixels, *self._options)


def _frames(
    path: str | Path, n: int, mode: str, shape: Shape, stop: Event | None
) -> list[np.ndarray]:
    """`shape` of each of `n` frames, some the same object where a clip is short."""
    path = Path(path)
    frame_indices(1, n, mode)
    if not path.exists():
        raise FileNotFoundError(f"video not found: {path}")
    if path.is_dir():
        return [shape(frame) for frame in _from_directory(path, n, mode)]
    if path.suffix == ".npy":
        return [shape(frame) for frame in _from_array(path, n, mode)]
    return read_frames(path, lambda total: frame_indices(total, n, mode), shape, stop)


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
