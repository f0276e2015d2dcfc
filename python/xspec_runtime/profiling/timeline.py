"""What every source is read into: ranges on the host, and work on the device where it is known."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

ROUNDS = ("verify", "target.decode")
# What may come first in a request.
OPENINGS = ("target.preprocess", "target.vision", "target.prefill", "draft.prefill")


class Span(NamedTuple):
    """One range of `xspec_kernels.ranges`; microseconds."""

    name: str
    start: float
    end: float
    payload: int | None
    thread: int


class Op(NamedTuple):
    """Work on a device in microseconds; `call` is when the host asked for it, where known."""

    start: float
    end: float
    call: float | None


@dataclass(slots=True)
class Timeline:
    """A recording; a list that is None was not recorded.

    Attributes:
        source: what the file is.
        spans: ranges in the order they opened.
        device: kernels, copies and whole graphs.
        launches, waits: when the host called CUDA to launch, and to wait.
        notes: what the reader could not tell, for the table.
    """

    source: str
    spans: list[Span]
    device: list[Op] | None = None
    launches: list[float] | None = None
    waits: list[float] | None = None
    notes: list[str] = field(default_factory=list)


def requests_of(spans: Sequence[Span]) -> list[list[Span]]:
    """The spans of each request: one begins with the first opening after a round, or with a second
    prefill. Requests are taken to follow one another.
    """
    found: list[list[Span]] = []
    rounds = prefilled = False
    for span in sorted(spans, key=lambda s: (s.start, -s.end)):
        again = span.name in OPENINGS and rounds
        again |= span.name == "target.prefill" and prefilled
        if again or not found:
            found.append([])
            rounds = prefilled = False
        rounds |= span.name in ROUNDS
        prefilled |= span.name == "target.prefill"
        found[-1].append(span)
    return found


Interval = tuple[float, float]


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """Their union, in order."""
    found: list[Interval] = []
    for start, end in sorted(intervals):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], end)
        else:
            found.append((start, end))
    return found


def length(intervals: Iterable[Interval]) -> float:
    """Microseconds that the intervals of a `union` cover."""
    return math.fsum(end - start for start, end in intervals)


def common(left: Sequence[Interval], right: Sequence[Interval]) -> float:
    """Microseconds that two unions share."""
    total, i, j = 0.0, 0, 0
    while i < len(left) and j < len(right):
        total += max(0.0, min(left[i][1], right[j][1]) - max(left[i][0], right[j][0]))
        if left[i][1] < right[j][1]:
            i += 1
        else:
            j += 1
    return total
