"""Frames of a video file by PyAV: only what the wanted ones need is decoded, on several threads."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer

_CONTAINERS = (
    *("mov", "mp4", "matroska", "webm", "avi", "mpeg", "mpegts", "mpegvideo", "flv", "ogg", "asf"),
    *("h264", "hevc", "ivf", "m4v", "mjpeg", "gif", "apng", "yuv4mpegpipe"),
)
# Containers whose packets are whole pictures, never single fields of one.
_WHOLE_PICTURES = ("mov", "matroska")
# Decoders that leave out pictures which no other refers to, and only those. HEVC's may leave out
# some that higher temporal layers refer to.
_SKIPPING = ("h264",)
MOST_THREADS = 8
# What one decoder's threads lose to each other, measured on H.264: 1.15 to 1.2.
_FRAME_THREADS_COST = 1.2

Shape = Callable[[np.ndarray], np.ndarray]


class Stopped(RuntimeError):
    """Whoever wanted the frames no longer does."""


class _UnindexedError(Exception):
    """The packets' display times do not tell which frame is which."""


@dataclass(slots=True)
class _Run:
    """Packets to decode in a row.

    Attributes:
        key: display time of the key frame it starts at.
        wanted: display times of the frames to keep.
        packets: how many packets that takes.
    """

    key: int
    wanted: list[int]
    packets: int


class _Keeper:
    """Hands the frames that are wanted to a pool, which converts and shapes them."""

    def __init__(self, pool: ThreadPoolExecutor, shape: Shape, stop: Event | None) -> None:
        self.pool = pool
        self.failed = Event()
        self._shape = shape
        self._stop = stop

    def keep(self, frame: VideoFrame) -> Future[np.ndarray]:
        return self.pool.submit(self._shaped, frame)

    def check(self) -> None:
        """Raise if nobody wants more frames."""
        self._check_stop()
        if self.failed.is_set():
            raise _UnindexedError

    def _shaped(self, frame: VideoFrame) -> np.ndarray:
        self._check_stop()
        return self._shape(frame.to_ndarray(format="rgb24"))

    def _check_stop(self) -> None:
        if self._stop is not None and self._stop.is_set():
            raise Stopped("reading the video was stopped")


def read_frames(
    path: Path,
    choose: Callable[[int], list[int]],
    shape: Shape,
    stop: Event | None = None,
) -> list[np.ndarray]:
    """The frames `choose` picks, each as `shape` returns it.

    Args:
        choose: from the number of frames to the indices wanted, non-decreasing.
        shape: applied to every wanted frame, uint8 ``[H, W, 3]`` RGB, on any thread.
        stop: once set, reading ends with `Stopped`.

    Raises:
        ValueError: not a video, or one without frames.
        RuntimeError: PyAV is not installed, or `stop` was set.
    """
    try:
        import av
    except ImportError as error:
        raise RuntimeError("reading video files needs PyAV: pip install av") from error
    try:
        try:
            with _keeper(shape, stop) as keeper:
                return _by_time(path, choose, keeper)
        except (av.error.FFmpegError, _UnindexedError):
            with _keeper(shape, stop) as keeper:
                return _by_count(path, choose, keeper)
    except av.error.FFmpegError as error:
        raise ValueError(f"{path}: not a readable video ({error.strerror})") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


@contextmanager
def _keeper(shape: Shape, stop: Event | None) -> Iterator[_Keeper]:
    """A keeper whose threads have ended when its block has."""
    # Decoding takes up to half of the threads, so that shaping never waits for it to end.
    pool = ThreadPoolExecutor(2 * cores(), "xspec-video")
    keeper = _Keeper(pool, shape, stop)
    try:
        yield keeper
    finally:
        keeper.failed.set()
        pool.shutdown(wait=True, cancel_futures=True)


def cores() -> int:
    """Threads worth starting: the cores this process may use, 8 at most."""
    usable = getattr(os, "sched_getaffinity", None)
    return min(len(usable(0)) if usable else os.cpu_count() or 1, MOST_THREADS)


def _open(path: Path, threads: int) -> InputContainer:
    import av

    # Demuxers that read other files or addresses (playlists, concatenations) and those that render
    # text are left out; an absolute path cannot be read as a protocol.
    options = {"protocol_whitelist": "file", "format_whitelist": ",".join(_CONTAINERS)}
    container = av.open(str(path.absolute()), options=options)
    if not container.streams.video:
        container.close()
        raise ValueError("no video stream in this file")
    _set_threads(container, threads)
    return container


def _set_threads(container: InputContainer, threads: int) -> None:
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    stream.codec_context.thread_count = threads


def _by_time(path: Path, choose: Callable[[int], list[int]], keeper: _Keeper) -> list[np.ndarray]:
    """Decode only the groups of pictures that hold a wanted frame, several at a time.

    A first pass reads packet headers (no decoding) for display times and key frames.
    """
    with _open(path, 1) as container:
        times, keys, order = _index(container)
        wanted = [times[index] for index in choose(len(times))]
        parts = _split(_plan(sorted(set(wanted)), keys, order), cores())
        if len(parts) == 1:
            _set_threads(container, cores())
        others = [keeper.pool.submit(_decode_part, path, part, keeper) for part in parts[1:]]
        found = _decode(container, parts[0], keeper)
        for other in others:
            found |= other.result()
        return [found[time].result() for time in wanted]


def _index(container: InputContainer) -> tuple[list[int], list[int], dict[int, int]]:
    """Display times of all frames and of the key frames, ascending; each time's place in the
    file.
    """
    stream = container.streams.video[0]
    packets = [p for p in container.demux(stream) if p.size and not p.is_discard]
    order = {p.pts: place for place, p in enumerate(packets)}
    if not packets or None in order or len(order) < len(packets):
        raise _UnindexedError
    return sorted(order), sorted(p.pts for p in packets if p.is_keyframe), order


def _plan(wanted: Sequence[int], keys: Sequence[int], order: dict[int, int]) -> list[_Run]:
    """One run for each key frame that wanted frames follow."""
    runs: list[_Run] = []
    for time in wanted:
        before = bisect_right(keys, time)
        if before == 0:
            raise _UnindexedError
        key = keys[before - 1]
        if not runs or runs[-1].key != key:
            runs.append(_Run(key, [], 0))
        runs[-1].wanted.append(time)
        runs[-1].packets = max(runs[-1].packets, order[time] - order[key] + 1)
    return runs


def _split(runs: list[_Run], threads: int) -> list[list[_Run]]:
    """Neighboring runs for one decoder each; a single part where one decoder on all threads is
    faster.
    """
    total, done = sum(run.packets for run in runs), 0
    parts: list[list[_Run]] = [[] for _ in range(threads)]
    for run in runs:
        parts[(2 * done + run.packets) * threads // (2 * total)].append(run)
        done += run.packets
    longest = max(sum(run.packets for run in part) for part in parts)
    return [p for p in parts if p] if longest * threads <= _FRAME_THREADS_COST * total else [runs]


def _decode_part(path: Path, runs: list[_Run], keeper: _Keeper) -> dict[int, Future[np.ndarray]]:
    with _open(path, 1) as container:
        return _decode(container, runs, keeper)


def _decode(
    container: InputContainer, runs: list[_Run], keeper: _Keeper
) -> dict[int, Future[np.ndarray]]:
    """Decode `runs`; display times to frames that are being shaped."""
    found: dict[int, Future[np.ndarray]] = {}
    for run in runs:
        container.seek(run.key, stream=container.streams.video[0])
        missing = set(run.wanted)
        for frame in _frames_of(container, run):
            keeper.check()
            if frame.pts in missing:
                missing.remove(frame.pts)
                found[frame.pts] = keeper.keep(frame)
        if missing:
            raise _UnindexedError
    return found


def _frames_of(container: InputContainer, run: _Run) -> Iterator[VideoFrame]:
    """Frames from the packets of `run`, the wanted ones among them."""
    context = container.streams.video[0].codec_context
    skips = context.name in _SKIPPING
    # Where a packet may be one field, the next may be the other field of the last frame.
    left = run.packets + (not container.format.name.startswith(_WHOLE_PICTURES))
    started = False
    for packet in container.demux(container.streams.video[0]):
        started = started or packet.pts == run.key
        if not started and packet.pts in run.wanted:
            raise _UnindexedError  # some demuxers land behind the key frame
        if skips:
            context.skip_frame = "DEFAULT" if packet.pts in run.wanted else "NONREF"
        yield from packet.decode()
        if not packet.size:
            return
        left -= started and not packet.is_discard
        if not left:
            break
    yield from context.decode(None)


def _by_count(path: Path, choose: Callable[[int], list[int]], keeper: _Keeper) -> list[np.ndarray]:
    """Decode the whole clip twice: to count what is decodable, then to keep the wanted frames."""
    with _open(path, cores()) as container:
        total = sum(1 for _ in _decodable(container, keeper))
    wanted = choose(total)
    found: dict[int, Future[np.ndarray]] = {}
    with _open(path, cores()) as container:
        for index, frame in enumerate(_decodable(container, keeper)):
            if index in wanted:
                found[index] = keeper.keep(frame)
            if index == wanted[-1]:
                break
    return [found[index].result() for index in wanted]


def _decodable(container: InputContainer, keeper: _Keeper) -> Iterator[VideoFrame]:
    """Frames up to the first damaged packet."""
    import av

    try:
        for frame in container.decode(video=0):
            keeper.check()
            yield frame
    except av.error.FFmpegError:
        return
