"""The preprocessing of `images` as tensor operations, on any device, bit for bit.

Pillow resizes bytes in two passes of fixed-point sums, each rounded back to bytes. All of these
sums are whole numbers below 2^53, so products in float64 give them exactly, in whatever order.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch

from .images import CLIP_MEAN, CLIP_STD, check_fit, check_scale, level_table

# Fractional bits of Pillow's weights for bytes, and its cubic's reach and parameter.
_BITS, _REACH, _A = 22, 2.0, -0.5


def preprocess_frames(
    frames: torch.Tensor,
    size: int = 336,
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
    fit: str = "crop",
) -> torch.Tensor:
    """`images.clip_preprocess` where `frames` lie.

    Args:
        frames: uint8 ``[T, H, W, 3]``.
        size, mean, std, fit: as there.

    Returns:
        float32 ``[T, 3, size, size]`` on the same device, with the same bits.

    Raises:
        ValueError: wrong dtype, shape, size, fit, mean or std.
    """
    check_fit(size, fit)
    check_scale(mean, std)
    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or 0 in frames.shape:
        raise ValueError(f"expected uint8 [T, H, W, 3], got {frames.dtype} {list(frames.shape)}")
    height, width = frames.shape[1:3]
    if fit == "squash":
        new_height = new_width = size
    else:
        short = min(height, width)
        new_height, new_width = int(size * height / short), int(size * width / short)
    top, left = (new_height - size) // 2, (new_width - size) // 2
    # Only what the crop keeps is computed: a row or column does not depend on the others.
    passes = [(3, new_width, left), (2, new_height, top)]
    if not _columns_first(height, width, new_height, new_width):
        passes.reverse()
    planes = frames.permute(0, 3, 1, 2)
    for dim, new, first in passes:
        planes = _resized(planes.transpose(dim, 3), new, first, size).transpose(dim, 3)
    return _normalized(planes, tuple(mean), tuple(std))


@lru_cache(maxsize=64)
def _columns_first(height: int, width: int, new_height: int, new_width: int) -> bool:
    """Which pass Pillow begins with. Its versions differ in how they choose, so it is asked.

    Raises:
        RuntimeError: neither order gives what it gives.
    """
    if height == new_height or width == new_width:
        return True
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    picture = Image.fromarray(noise).resize((new_width, new_height), Image.Resampling.BICUBIC)
    want = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    planes = torch.from_numpy(noise).permute(2, 0, 1)
    for columns in (True, False):
        passes = [(2, new_width), (1, new_height)]
        found = planes
        for dim, new in passes if columns else reversed(passes):
            found = _resized(found.transpose(dim, 2), new, 0, new).transpose(dim, 2)
        if torch.equal(found, want):
            return columns
    raise RuntimeError(
        f"this version of Pillow resizes {width}x{height} to {new_width}x{new_height} in a way "
        "that has no counterpart on a device; preprocess on the CPU"
    )


def _resized(planes: torch.Tensor, new: int, first: int, count: int) -> torch.Tensor:
    """Columns `first` .. `first + count` of `planes`, uint8 ``[..., W]``, resized to `new` wide."""
    old = planes.shape[-1]
    if old == new:
        return planes[..., first : first + count]
    weights = _weights(old, new, planes.device)[first : first + count]
    sums = planes.double() @ weights.T + (1 << (_BITS - 1))
    return (sums / (1 << _BITS)).floor().clamp_(0, 255).byte()


@lru_cache(maxsize=32)
def _weights(old: int, new: int, device: torch.device) -> torch.Tensor:
    """Pillow's bicubic weights, whole numbers in float64 ``[new, old]``."""
    scale = old / new
    stretch = max(scale, 1.0)
    reach = _REACH * stretch
    table = np.zeros((new, old))
    for column in range(new):
        center = (column + 0.5) * scale
        low = max(int(center - reach + 0.5), 0)
        high = min(int(center + reach + 0.5), old)
        row = np.array([_cubic((x - center + 0.5) / stretch) for x in range(low, high)])
        row /= row.sum()
        fixed = row * (1 << _BITS)
        table[column, low:high] = np.trunc(fixed + np.where(fixed < 0, -0.5, 0.5))
    return torch.from_numpy(table).to(device)


def _cubic(x: float) -> float:
    x = abs(x)
    if x < 1:
        return ((_A + 2) * x - (_A + 3)) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * _A if x < 2 else 0.0


def _normalized(
    planes: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]
) -> torch.Tensor:
    """`images.normalize` of uint8 ``[T, 3, H, W]``."""
    table = _levels(mean, std, planes.device)
    return torch.stack([table[c][planes[:, c].int()] for c in range(3)], 1)


@lru_cache(maxsize=8)
def _levels(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """`level_table` on a device."""
    return torch.from_numpy(level_table(mean, std)).to(device)
