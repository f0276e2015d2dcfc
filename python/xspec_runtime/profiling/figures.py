"""Figures of a recording: the same ones from every source."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from ..files import existing_file
from .chrome import read_chrome
from .events import read_events
from .nsys import read_nsys
from .timeline import ROUNDS, Interval, Span, Timeline, common, length, requests_of, union


def read_timeline(path: Path) -> Timeline:
    """A recording of any of the three kinds, told by its content.

    Raises:
        FileNotFoundError: there is no file.
        ValueError: it is none of them, or damaged.
    """
    with existing_file(path, "recording").open("rb") as file:
        head = file.read(64)
    if head.startswith(b"SQLite format 3\0"):
        return read_nsys(path)
    return read_events(path) if head.startswith(b'{"format"') else read_chrome(path)


def figures(timeline: Timeline, step_ms: float | None = None) -> dict:
    """What the table shows; milliseconds, None where the source does not tell.

    Args:
        step_ms: a plain step of the target; by default the median of those in the recording, or
            what `verify.saved` says.

    Raises:
        ValueError: the recording has no round, or `step_ms` is not positive.
    """
    if step_ms is not None and not 0 < step_ms < math.inf:
        raise ValueError(f"step is {step_ms} ms, expected more than 0")
    requests = [r for r in requests_of(timeline.spans) if any(s.name in ROUNDS for s in r)]
    if not requests:
        raise ValueError(f"the recording has no range {' or '.join(ROUNDS)}: nothing was decoded")
    spans = [span for request in requests for span in request]
    windows = [(r[0].start, max(s.end for s in r)) for r in requests]
    rounds = [sorted((s for s in r if s.name in ROUNDS), key=lambda s: s.start) for r in requests]
    verifies = [s for r in rounds for s in r if s.name == "verify"]
    gaps = [b.start - a.end for r in rounds for a, b in pairwise(r)]
    return {
        "source": timeline.source,
        "notes": timeline.notes,
        "requests": len(requests),
        "request_ms": length(windows) / 1e3,
        "verify": _spread(s.end - s.start for s in verifies),
        "plain": _spread(s.end - s.start for r in rounds for s in r if s.name != "verify"),
        "gap": _spread(gaps),
        **_device(timeline, rounds, windows),
        **_calls(timeline, [s for r in rounds for s in r], spans),
        "ranges": _shares(spans, length(windows)),
        "ledger": _ledger(spans, verifies, step_ms),
    }


def _spread(lengths: Iterable[float]) -> dict:
    """Count, median and 95th percentile of microseconds, in milliseconds."""
    values = np.array(list(lengths)) / 1e3
    if not len(values):
        return {"count": 0, "median_ms": None, "p95_ms": None}
    median, high = np.percentile(values, (50, 95))
    return {"count": len(values), "median_ms": float(median), "p95_ms": float(high)}


def _shares(spans: Sequence[Span], total: float) -> dict[str, dict]:
    """Every range; those within another one count in both."""
    found: dict[str, list[float]] = {}
    for span in spans:
        found.setdefault(span.name, []).append(span.end - span.start)
    return {
        name: _spread(times) | {"total_ms": sum(times) / 1e3, "share": sum(times) / total}
        for name, times in sorted(found.items(), key=lambda item: -sum(item[1]))
    }


def _device(
    timeline: Timeline, rounds: Sequence[Sequence[Span]], windows: Sequence[Interval]
) -> dict:
    """Busy time of the device, and how long it rests from one round's work to the next one's."""
    if not timeline.device:
        return {"gpu_busy": None, "gpu_busy_per_round_ms": None, "gpu_rest": None}
    busy = union((op.start, op.end) for op in timeline.device)
    flat = [span for request in rounds for span in request]
    starts = [span.start for span in flat]
    work: dict[int, list] = {}
    for op in timeline.device:
        at = bisect_right(starts, op.call) - 1 if op.call is not None else -1
        if at >= 0 and op.call <= flat[at].end:
            work.setdefault(at, []).append(op)
    rests, first = [], 0
    for request in rounds:
        for i in range(first, first + len(request) - 1):
            if i in work and i + 1 in work:
                last = max(op.end for op in work[i])
                rests.append(max(0.0, min(op.start for op in work[i + 1]) - last))
        first += len(request)
    spent = [length(union((op.start, op.end) for op in ops)) for ops in work.values()]
    return {
        "gpu_busy": common(busy, union(windows)) / length(windows),
        "gpu_busy_per_round_ms": float(np.median(spent)) / 1e3 if spent else None,
        "gpu_rest": _spread(rests),
    }


def _calls(timeline: Timeline, rounds: Sequence[Span], spans: Sequence[Span]) -> dict:
    """Calls per round, counted while the round's range was open."""

    def per_round(times: Iterable[float] | None) -> float | None:
        if times is None:
            return None
        order = sorted(times)
        inside = (bisect_right(order, r.end) - bisect_left(order, r.start) for r in rounds)
        return sum(inside) / len(rounds)

    return {
        "launches_per_round": per_round(timeline.launches),
        "cuda_waits_per_round": per_round(timeline.waits),
        "readbacks_per_round": per_round(s.start for s in spans if s.name == "readback"),
    }


def _ledger(spans: Sequence[Span], verifies: Sequence[Span], step_ms: float | None) -> dict:
    """Tokens saved x step - overhead of the verifies - drafting that nothing hid = net."""
    inside = union((s.start, s.end) for s in verifies)
    begins = [start for start, _ in inside]

    def verified(name: str) -> list[int]:
        found = [s for s in spans if s.name == name and s.payload is not None]
        at = [(bisect_right(begins, s.start) - 1, s) for s in found]
        return [s.payload for i, s in at if i >= 0 and s.end <= inside[i][1]]

    accepted, rows = sum(verified("verify.commit")), [s.payload or 0 for s in verifies]
    step, how = step_ms, "given"
    plain = [s.end - s.start for s in spans if s.name == "target.decode" and s.payload == 1]
    if step is None and plain:
        step, how = float(np.median(plain)) / 1e3, f"median of {len(plain)} plain rounds"
    saved = verified("verify.saved")
    if step is None and accepted and len(saved) == len(verifies):
        step, how = sum(saved) / accepted / 1e3, "as verify.saved has it"
    work = union((s.start, s.end) for s in spans if s.name.startswith("draft."))
    target = union((s.start, s.end) for s in spans if s.name.split(".")[0] in ("target", "verify"))
    drafting = (length(work) - common(work, target)) / 1e3
    known = {
        "tokens_saved": accepted,
        "rows_per_verify": sum(rows) / len(rows) if rows else None,
        "drafting_ms": drafting,
        "step_ms": step,
        "step_from": how if step is not None else None,
    }
    if step is None:
        return known | dict.fromkeys(("saved_ms", "overhead_ms", "net_ms"))
    saved_ms = accepted * step
    overhead = sum(s.end - s.start for s in verifies) / 1e3 - len(verifies) * step
    return known | {
        "saved_ms": saved_ms,
        "overhead_ms": overhead,
        "net_ms": saved_ms - overhead - drafting,
    }
