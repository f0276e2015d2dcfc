"""Time on a GPU by device events, on a CPU by the wall clock; CUDA graphs."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from statistics import median, quantiles
from typing import NamedTuple, TypeVar

import torch

from ..graphs import no_collection

Key = TypeVar("Key", bound=Hashable)


class Timing(NamedTuple):
    """Milliseconds of one call.

    Attributes:
        ms: median.
        spread: 10th to 90th percentile, over the median.
        calls: how many were timed.
    """

    ms: float
    spread: float
    calls: int


def once(work: Callable[[], object], device: str) -> float:
    """Milliseconds from before the first launch to the end of the last kernel."""
    if device == "cpu":
        start = time.perf_counter()
        work()
        return (time.perf_counter() - start) * 1e3
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def current(device: str) -> AbstractContextManager[object]:
    """While this lasts, events, streams and graphs are made on `device`, if that is a GPU."""
    return torch.cuda.device(device) if device.startswith("cuda") else nullcontext()


def interleaved(
    work: Mapping[Key, Callable[[], object]], device: str, repeats: int, burst: int = 3
) -> dict[Key, Timing]:
    """Time every entry in rotating order, so that a slow stretch of the machine meets all of them.

    Args:
        repeats: rounds over all entries.
        burst: see `visit`.
    """
    samples: dict[Key, list[float]] = {key: [] for key in work}
    for key in rotated(list(work), repeats):
        samples[key] += visit(work[key], device, burst)
    return {key: summarize(values) for key, values in samples.items()}


def rotated(keys: Sequence[Key], rounds: int) -> Iterator[Key]:
    """All `keys` in every round, each time from another one on."""
    for number in range(rounds):
        shift = number % len(keys)
        yield from (*keys[shift:], *keys[:shift])


def visit(work: Callable[[], object], device: str, burst: int = 3) -> list[float]:
    """Milliseconds of `burst` calls, after one untimed that absorbs the change of code and data."""
    work()
    return [once(work, device) for _ in range(burst)]


def summarize(samples: list[float]) -> Timing:
    """Median and spread of at least two samples."""
    deciles = quantiles(samples, n=10, method="inclusive")
    middle = median(samples)
    return Timing(middle, (deciles[-1] - deciles[0]) / middle, len(samples))


def captured(work: Callable[[], object], device: str) -> Callable[[], object]:
    """Replay of a CUDA graph of `work`, after eager runs that load every kernel; on a CPU, `work`.

    The graph object stays alive with the returned function, and so do `work`, and with it what it
    reads, and the results of `work`, which each replay overwrites.
    """
    if device == "cpu":
        return work
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with no_collection(), torch.cuda.graph(graph):
        result = work()

    def replay() -> object:
        graph.replay()
        return result

    # The graph knows addresses alone.
    replay.reads = work
    return replay
