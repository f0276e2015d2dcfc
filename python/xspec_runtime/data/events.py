"""Event-camera streams: a safe reader, slicing by count or time, EventGPT's red/blue picture.

Published event files are ``np.save`` of a dict ``{x, y, t, p}``, that is, pickles;
``pickled.py`` reads them without running any of their content.
"""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..files import existing_file, read_bytes
from .images import CLIP_MEAN, CLIP_STD, clip_preprocess
from .pickled import read_pickled_arrays

__all__ = [
    "CLIP_MEAN",
    "CLIP_STD",
    "HEIGHT",
    "WIDTH",
    "Events",
    "clip_preprocess",
    "event_images",
    "load_events",
    "rasterize",
    "split_by_count",
    "window",
]

HEIGHT, WIDTH = 480, 640
FIELDS = ("x", "y", "t", "p")
MAX_BYTES = 4 << 30
_PALETTE = np.array([[255, 255, 255], [0, 0, 255], [255, 0, 0]], dtype=np.uint8)


@dataclass(frozen=True, eq=False)
class Events:
    """A stream of E events, sorted by time.

    Attributes:
        x, y: uint16 ``[E]``, column and row in pixels.
        t: int64 ``[E]``, microseconds, non-decreasing.
        p: uint8 ``[E]``, polarity: 1 brighter, 0 darker.
    """

    x: np.ndarray
    y: np.ndarray
    t: np.ndarray
    p: np.ndarray

    def __len__(self) -> int:
        return len(self.t)

    def __getitem__(self, part: slice) -> Events:
        """A view of consecutive events (no copy)."""
        return Events(self.x[part], self.y[part], self.t[part], self.p[part])

    @property
    def duration_us(self) -> int:
        """Microseconds between the first and the last event; 0 for fewer than two events."""
        return int(self.t[-1] - self.t[0]) if len(self) else 0

    @classmethod
    def from_arrays(
        cls, fields: Mapping[str, np.ndarray], height: int = HEIGHT, width: int = WIDTH
    ) -> Events:
        """Check raw ``x, y, t, p`` arrays (any integer dtype) and convert them.

        Raises:
            ValueError: missing field, unequal lengths, no events, out of range, or unsorted times.
        """
        arrays = _check_shapes(fields)
        for name, limit in (("x", width), ("y", height), ("p", 2)):
            low, high = int(arrays[name].min()), int(arrays[name].max())
            if low < 0 or high >= limit:
                bad = low if low < 0 else high
                what = "polarity p" if name == "p" else f"{name} on a {width}x{height} canvas"
                raise ValueError(f"{what} must be in 0..{limit - 1}, got {bad}")
        time = arrays["t"]
        if int(time.max()) > np.iinfo(np.int64).max:
            raise ValueError(f"t must fit int64 microseconds, got {int(time.max())}")
        time = np.ascontiguousarray(time, dtype=np.int64)
        backward = time[1:] < time[:-1]
        if backward.any():
            at = int(backward.argmax()) + 1
            raise ValueError(
                f"events are not sorted by time: t[{at}]={time[at]} < t[{at - 1}]={time[at - 1]}"
            )
        x, y = (np.ascontiguousarray(arrays[name], dtype=np.uint16) for name in ("x", "y"))
        return cls(x, y, time, np.ascontiguousarray(arrays["p"], dtype=np.uint8))


def _check_shapes(fields: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    missing = [name for name in FIELDS if name not in fields]
    if missing:
        names = ", ".join("polarity (p)" if name == "p" else name for name in missing)
        found = ", ".join(sorted(map(str, fields)))
        raise ValueError(f"missing {names}: expected fields x, y, t, p, found {found or 'none'}")
    arrays = {name: np.asarray(fields[name]) for name in FIELDS}
    # A file may hold any byte in a bool array; as bytes they face the range check.
    arrays = {n: a.view(np.uint8) if a.dtype == bool else a for n, a in arrays.items()}
    for name, array in arrays.items():
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise ValueError(
                f"{name} must be a 1-D integer array, got {array.dtype} {list(array.shape)}"
            )
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"x, y, t, p differ in length: {lengths}")
    if lengths["t"] == 0:
        raise ValueError("holds no events")
    return arrays


def load_events(path: str | Path, height: int = HEIGHT, width: int = WIDTH) -> Events:
    """Read ``x, y, t, p`` from a ``.npy`` (pickled dict or structured array) or ``.npz`` file.

    Args:
        path: the file.
        height, width: the sensor in pixels; coordinates outside are an error.

    Raises:
        FileNotFoundError: no such file.
        ValueError: one line saying what is wrong with the content.
        OSError: it cannot be read; names the file.
    """
    path = Path(path)
    existing_file(path, "event file")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path}: event files above {MAX_BYTES >> 30} GiB are refused")
    data = read_bytes(path, "event file")
    try:
        if data.startswith(b"PK\x03\x04"):
            fields = _read_npz(data)
        elif data.startswith(b"\x93NUMPY"):
            fields = _read_npy(data)
        else:
            raise ValueError("neither a .npy nor a .npz file" if data else "the file is empty")
        return Events.from_arrays(fields, height, width)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _read_npz(data: bytes) -> dict[str, np.ndarray]:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if sum(member.file_size for member in archive.infolist()) > MAX_BYTES:
                raise ValueError(f"unpacks to more than {MAX_BYTES >> 30} GiB")
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            return {name: archive[name] for name in FIELDS if name in archive.files}
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"truncated or damaged .npz file ({error})") from error


def _read_npy(data: bytes) -> Mapping[str, np.ndarray]:
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, _, dtype = read_header(stream)
    except Exception as error:
        raise ValueError("truncated file or damaged .npy header") from error
    body = data[stream.tell() :]
    if dtype.kind == "O" and shape == ():
        return read_pickled_arrays(body, FIELDS)
    if dtype.names is None or dtype.hasobject:
        raise ValueError(
            f"expected a dict or a structured array with x, y, t, p, got {dtype} {list(shape)}"
        )
    count = math.prod(shape)
    if count * dtype.itemsize > len(body):
        raise ValueError(
            f"truncated: {count} events announced, {len(body) // dtype.itemsize} present"
        )
    records = np.frombuffer(body, dtype=dtype, count=count)
    return {name: records[name] for name in dtype.names}


def rasterize(events: Events, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Draw events as EventGPT was trained to see them: blue for p == 0, red for p == 1, on white.

    Red wins where both fall on a pixel, whatever their order. The canvas is fixed, so a pixel
    keeps its place however few events there are.

    Returns:
        uint8 ``[height, width, 3]`` RGB.

    Raises:
        ValueError: an event lies outside the canvas.
    """
    if len(events) and (int(events.x.max()) >= width or int(events.y.max()) >= height):
        raise ValueError(
            f"events reach x={int(events.x.max())}, y={int(events.y.max())}, "
            f"outside the {width}x{height} canvas"
        )
    pixel = events.y.astype(np.intp) * width + events.x
    ink = np.zeros(height * width, dtype=np.uint8)
    ink[pixel] = 1
    ink[pixel[events.p != 0]] = 2
    return _PALETTE[ink].reshape(height, width, 3)


def split_by_count(events: Events, n: int) -> list[Events]:
    """Cut into ``n`` consecutive slices of equal count; the last takes the remainder.

    EventGPT's multi-frame mode uses n = 5.

    Raises:
        ValueError: ``n`` < 1 or fewer events than slices.
    """
    if n < 1 or len(events) < n:
        raise ValueError(f"cannot cut {len(events)} events into {n} slices")
    each = len(events) // n
    return [events[i * each : (i + 1) * each if i < n - 1 else None] for i in range(n)]


def window(events: Events, start_us: int, end_us: int) -> Events:
    """Events with ``start_us <= t < end_us`` (microseconds, on the file's own clock); may be empty.

    Raises:
        ValueError: ``end_us`` <= ``start_us``.
    """
    if end_us <= start_us:
        raise ValueError(f"window needs start_us < end_us, got {start_us}..{end_us}")
    first, last = np.searchsorted(events.t, (start_us, end_us), side="left")
    return events[int(first) : int(last)]


def event_images(
    events: Events, n: int = 1, height: int = HEIGHT, width: int = WIDTH
) -> np.ndarray:
    """Rasterize ``n`` slices of equal count.

    Returns:
        uint8 ``[n, height, width, 3]`` RGB.
    """
    return np.stack([rasterize(part, height, width) for part in split_by_count(events, n)])
