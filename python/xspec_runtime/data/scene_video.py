"""A procedural scene as the video file that a camera would have left."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

WIDTH, HEIGHT, RATE = 640, 480, 20
PICTURES, GROUP = 100, 25
# H.264 where PyAV was built with it.
CODECS = ("libx264", "mpeg4")


def pictures(frames: np.ndarray, count: int) -> Iterator[np.ndarray]:
    """`count` pictures uint8 ``[480, 640, 3]`` that pass through `frames` uint8 ``[F, H, W, 3]`` in
    order; those between two of them fade from one to the other.
    """
    rows = np.arange(HEIGHT) * frames.shape[1] // HEIGHT
    columns = np.arange(WIDTH) * frames.shape[2] // WIDTH
    for place in np.linspace(0, len(frames) - 1, count):
        before = min(int(place), len(frames) - 2)
        share = place - before
        small = (1 - share) * frames[before] + share * frames[before + 1]
        yield small.round().astype(np.uint8)[rows][:, columns]


def write_scene(path: Path, frames: np.ndarray, count: int = PICTURES) -> None:
    """Write `count` of the `pictures` of `frames`, 20 a second.

    Raises:
        RuntimeError: PyAV is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise RuntimeError("writing video files needs PyAV: pip install av") from error
    codec = next((name for name in CODECS if name in av.codecs_available), CODECS[-1])
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=RATE)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.gop_size, stream.bit_rate = GROUP, 4_000_000
        if codec == "libx264":
            stream.options = {"preset": "veryfast", "crf": "18"}
        for picture in pictures(frames, count):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
