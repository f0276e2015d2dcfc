"""Image preprocessing shared by event images and video frames: resize, crop, rescale, normalize.

The arithmetic is that of transformers' processors on Pillow and numpy, bit for bit:
CLIPImageProcessor (EventGPT, LLaVA-1.5) and VideoLlavaImageProcessor, with which the published
models were run. torchvision is not needed. Where transformers 5 finds it, CLIPImageProcessor and
VideoLlavaVideoProcessor resize with coarser weights: about one byte in a hundred differs, by 1 or 2
of 255. `tests/data/processors_record.py` recorded all of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

__all__ = [
    "CLIP_MEAN",
    "CLIP_STD",
    "FITS",
    "clip_preprocess",
    "normalize",
    "resize",
    "resize_frame",
]

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
FITS = ("crop", "squash")


def clip_preprocess(
    image: np.ndarray,
    size: int = 336,
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
    fit: str = "crop",
) -> torch.Tensor:
    """Turn RGB bytes into normalized model input.

    ``fit="crop"`` resizes the short side to ``size`` and keeps the central square, as the published
    models do: of a 640x480 canvas only the central 480x480 pixels survive, so 80 columns at each
    side (a quarter of the picture) are never seen. ``fit="squash"`` resizes both sides to ``size``:
    everything is seen, at a changed aspect ratio.

    Args:
        image: uint8 ``[H, W, 3]`` or ``[T, H, W, 3]``.
        size: side of the square output in pixels (EventGPT 336, Video-LLaVA 224).
        mean, std: per channel, in units of the 0..1 range.
        fit: ``"crop"`` or ``"squash"``.

    Returns:
        float32 ``[T, 3, size, size]`` (T = 1 for a single image).

    Raises:
        ValueError: wrong dtype, shape, size, fit, mean or std.
    """
    check_scale(mean, std)
    return torch.from_numpy(normalize(resize(_as_frames(image), size, fit), mean, std))


def normalize(pixels: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Bytes to model input: rescaled to 0..1, less `mean`, over `std`, channels first.

    Args:
        pixels: uint8 ``[..., H, W, 3]``.

    Returns:
        float32 ``[..., 3, H, W]``.
    """
    table = level_table(mean, std)
    out = np.empty((*pixels.shape[:-3], 3, *pixels.shape[-3:-1]), np.float32)
    for channel in range(3):
        np.take(table[channel], pixels[..., channel], out=out[..., channel, :, :], mode="clip")
    return out


def level_table(mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """What each byte becomes in `normalize`, float32 ``[3, 256]``: a channel knows no other values.

    As in transformers, the product with 1/255 is rounded once, from float64.
    """
    levels = (np.arange(256) * (1 / 255)).astype(np.float32)
    return (levels - np.float32(mean)[:, None]) / np.float32(std)[:, None]


def check_scale(mean: Sequence[float], std: Sequence[float]) -> None:
    """Raise `ValueError` unless there is a mean and a positive deviation for each channel."""
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ValueError(f"mean and std need 3 values and std > 0, got mean={mean}, std={std}")


def check_fit(size: int, fit: str) -> None:
    """Raise `ValueError` unless frames can be brought to `size` pixels by `fit`."""
    if size < 1:
        raise ValueError(f"size must be at least 1 pixel, got {size}")
    if fit not in FITS:
        raise ValueError(f"fit must be one of {', '.join(FITS)}, got {fit!r}")


def resize(frames: np.ndarray, size: int, fit: str = "crop") -> np.ndarray:
    """Bring frames to a square of ``size`` pixels; what ``fit`` does is said in `clip_preprocess`.

    Args:
        frames: uint8 ``[T, H, W, 3]``.
        size, fit: as in `clip_preprocess`.

    Returns:
        uint8 ``[T, size, size, 3]``.

    Raises:
        ValueError: wrong dtype, shape, size or fit.
    """
    check_fit(size, fit)
    if np.ndim(frames) != 4:
        raise ValueError(f"expected uint8 [T, H, W, 3], got shape {list(np.shape(frames))}")
    return np.stack([resize_frame(frame, size, fit) for frame in _as_frames(frames)])


def _as_frames(image: np.ndarray) -> np.ndarray:
    array = np.asarray(image)
    if (
        array.dtype != np.uint8
        or array.ndim not in (3, 4)
        or array.shape[-1] != 3
        or 0 in array.shape
    ):
        raise ValueError(
            f"expected uint8 [H, W, 3] or [T, H, W, 3], got {array.dtype} {list(array.shape)}"
        )
    return array if array.ndim == 4 else array[None]


def resize_frame(frame: np.ndarray, size: int, fit: str) -> np.ndarray:
    """`resize` of one frame: uint8 ``[H, W, 3]`` to ``[size, size, 3]``."""
    from PIL import Image

    height, width = frame.shape[:2]
    if fit == "squash":
        new_height = new_width = size
    else:
        short = min(height, width)
        new_height, new_width = int(size * height / short), int(size * width / short)
    if (new_height, new_width) != (height, width):
        picture = Image.fromarray(np.ascontiguousarray(frame))
        frame = np.asarray(picture.resize((new_width, new_height), Image.Resampling.BICUBIC))
    top, left = (new_height - size) // 2, (new_width - size) // 2
    return frame[top : top + size, left : left + size]
