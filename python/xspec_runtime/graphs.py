"""Functions over memory that stays, captured once into CUDA graphs and replayed.

A captured function takes no arguments: it reads and writes tensors whose addresses never change,
and everything that differs from call to call, numbers of rows and lengths included, lies in them.
Where there is no CUDA the same function is called plainly, over the same tensors.

What capture asks for, and where it is seen to:

    kernels are loaded         A module loaded while capturing breaks the capture, whatever
                               CUDA_MODULE_LOADING says. So the first call runs the function, and
                               only then captures it: the very same launches on the same stream,
                               which is also where cuBLAS keeps its workspace.
    scratch memory             `Workspace` and tables of addresses refuse to grow while capturing.
                               The first call has grown them.
    other threads              They may allocate or pin memory: capture_error_mode="thread_local".
                               Two captures at once may not be, as each begins by waiting for the
                               whole device: first calls take turns.
    garbage                    A collected graph or pinned tensor would call CUDA while capturing:
                               the collector rests.
    waits                      CUDA refuses whatever waits for the device while capturing.
    memory between calls       Results lie in the pool of the graphs and are overwritten by the next
                               call. Graphs that share a pool must run one after the other: one
                               `Graphs` a decoder and stream. What is read or written from outside
                               belongs elsewhere, allocated before.
    dropped graphs             Dropping a graph clears the cuBLAS workspace of the stream that it
                               was captured on, under any other graph of that stream. So graphs that
                               may be dropped have a stream each.
    streams                    torch hands out 32 a device, then the same ones again. Graphs of one
                               stream share a cuBLAS workspace, and what another thread launches on
                               a stream that captures becomes part of the graph: `own_stream`.
"""

from __future__ import annotations

import gc
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from threading import RLock
from typing import Generic, Protocol, TypeVar
from weakref import WeakValueDictionary

import torch

T = TypeVar("T")
S = TypeVar("S")
# Streams of a device in torch's pool.
_STREAMS = 32

_first_calls = RLock()
_held: WeakValueDictionary[tuple[str, int], torch.cuda.Stream] = WeakValueDictionary()


class Recorder(Protocol):
    """How a function becomes a graph."""

    def warm(self, run: Callable[[], T]) -> T:
        """Run it as `record` will."""

    def record(self, run: Callable[[], T]) -> tuple[Callable[[], None], T]:
        """(replay, result): nothing has been computed yet, `replay` fills the result."""


class CudaRecorder:
    """Captures on a stream of its own; replays run on the caller's."""

    def __init__(self, device: torch.device, pool: tuple[int, int]) -> None:
        self._device, self._pool = device, pool
        self._stream = own_stream(device)

    def warm(self, run: Callable[[], T]) -> T:
        """Run it between what the caller's stream has launched and what it will."""
        here = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(here)
        try:
            with torch.cuda.stream(self._stream):
                return run()
        finally:
            here.wait_stream(self._stream)

    def record(self, run: Callable[[], T]) -> tuple[Callable[[], None], T]:
        """Capture it. Raises what CUDA does where it cannot be captured."""
        graph, here = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._device)
        with (
            torch.cuda.device(self._device),
            # Where a capture fails, torch leaves its stream behind as the current one.
            torch.cuda.stream(here),
            no_collection(),
            torch.cuda.graph(
                graph,
                pool=self._pool,
                stream=self._stream,
                capture_error_mode="thread_local",
            ),
        ):
            result = run()
        return graph.replay, result


@contextmanager
def no_collection() -> Iterator[None]:
    """Collect garbage now, and none while this lasts."""
    gc.collect()
    resting = not gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if not resting:
            gc.enable()


class Captured(Generic[T]):
    """`run`, captured at its first call and replayed from the second on.

    A result is valid until the next call of any function in the same pool.

    Args:
        run: of fixed shapes over fixed memory, without any wait for the device; it must not refer
            to the object that owns this one, or both wait for the garbage collector.
        recorder: None calls `run` plainly.
    """

    def __init__(self, run: Callable[[], T], recorder: Recorder | None = None) -> None:
        self.recorder = recorder
        self._run = run
        self._replay: Callable[[], None] | None = None
        self._result: T | None = None

    def __call__(self) -> T:
        """One launch. Where the first call fails, the next one starts anew."""
        if self._replay is not None:
            self._replay()
            return self._result
        if self.recorder is None:
            return self._run()
        with _first_calls:
            result = self.recorder.warm(self._run)
            self._replay, self._result = self.recorder.record(self._run)
        return result


class Fork:
    """Two functions that run at the same time: one on the caller's stream, one on its own.

    Inside a captured function the events between the streams become edges of the graph: both
    branches follow what came before, and what comes after follows both. They share no memory that
    either writes, workspaces and semaphores included. Where there is no CUDA, they are two calls.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = own_stream(device) if device.type == "cuda" else None

    def __call__(self, main: Callable[[], T], side: Callable[[], S]) -> tuple[T, S]:
        """Both results; whatever the caller launches next comes after both."""
        if self._stream is None:
            beside = side()
            return main(), beside
        here = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(here)
        try:
            with torch.cuda.stream(self._stream):
                beside = side()
            return main(), beside
        finally:
            # A capture that a branch has left open could not even be given up.
            here.wait_stream(self._stream)


class Graphs:
    """The captured functions of one decoder on one stream, made when they are first called.

    Args:
        limit: functions kept; the least recently used one is dropped. None keeps all, for keys that
            are few by nature.
        beside: share the pool of these, which never run at the same time.
    """

    def __init__(
        self, device: torch.device, limit: int | None = None, beside: Graphs | None = None
    ) -> None:
        self.device, self.limit = device, limit
        self.captures = can_capture(device)
        self._pool = beside._pool if beside else new_pool(device)
        self._kept: OrderedDict[Hashable, Captured] = OrderedDict()
        self._idle: list[Recorder] = []

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: Hashable, make: Callable[[], Callable[[], T]]) -> Captured[T]:
        """The function of `key`, which `make` makes where it is missing."""
        found = self._kept.get(key)
        if found is None:
            if self.limit is not None and len(self._kept) >= self.limit:
                dropped = self._kept.popitem(last=False)[1]
                if dropped.recorder:
                    self._idle.append(dropped.recorder)
                del dropped
            found = self._kept[key] = Captured(make(), self._recorder())
        self._kept.move_to_end(key)
        return found

    def _recorder(self) -> Recorder | None:
        if not self.captures:
            return None
        # Streams are few in torch, 32 a device: a dropped graph's serves the one in its place.
        recorder = self._idle.pop() if self._idle else new_recorder(self.device, self._pool)
        if self.limit is None:
            self._idle.append(recorder)
        return recorder


def own_stream(device: torch.device) -> torch.cuda.Stream:
    """A stream that nobody holds who got it here; with a warning another one's, where all 32 of
    torch's are held.
    """
    for _ in range(_STREAMS):
        stream = torch.cuda.Stream(device)
        key = (str(stream.device), stream.cuda_stream)
        if key not in _held:
            _held[key] = stream
            return stream
    warnings.warn(
        f"all {_STREAMS} streams of {device} are in use: what runs at the same time may share one",
        RuntimeWarning,
        stacklevel=2,
    )
    return stream


def can_capture(device: torch.device) -> bool:
    """Whether functions on this device become graphs."""
    return device.type == "cuda"


def new_pool(device: torch.device) -> tuple[int, int] | None:
    """Memory of graphs that never run at the same time."""
    return torch.cuda.graph_pool_handle() if device.type == "cuda" else None


def new_recorder(device: torch.device, pool: tuple[int, int] | None) -> Recorder:
    """What captures on this device."""
    return CudaRecorder(device, pool)
