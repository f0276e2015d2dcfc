"""A trace that torch.profiler exported, with the ranges of `ranges.TorchProfiler` in it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

from xspec_kernels import ranges

from ..files import read_json
from .timeline import Op, Span, Timeline

DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
CALLS = ("cuda_runtime", "cuda_driver")
# Names of CUDA's functions; versions are suffixes.
LAUNCH = re.compile(r"cu(da)?(Graph)?Launch|cu(da)?Mem(cpy|set)")
WAIT = re.compile(r"cu(da)?(Device|Stream|Event|Ctx)Synchronize|cu(da)?Memcpy(?!.*Async)")


def read_chrome(path: Path) -> Timeline:
    """The ranges, and where a GPU was recorded, its work and the calls of CUDA.

    Raises:
        FileNotFoundError: there is no file.
        ValueError: it is no such trace, or has no ranges of ours.
    """
    events = list(_complete(path))
    spans, ops, calls = [], [], {}
    launches: list[float] = []
    waits: list[float] = []
    for kind, name, start, end, thread, args in events:
        if kind == "user_annotation" and name.startswith(f"{ranges.DOMAIN}:"):
            spans.append(_span(path, name, start, end, thread))
        elif kind in CALLS:
            calls[args.get("correlation")] = start
            if LAUNCH.match(name):
                launches.append(start)
            if WAIT.match(name):
                waits.append(start)
        elif kind in DEVICE:
            ops.append((start, end, args.get("correlation")))
    if not spans:
        raise ValueError(
            f"{path} has no ranges of ours: profile under ranges.listening(ranges.TorchProfiler())"
        )
    spans.sort(key=lambda span: span.start)
    if not ops and not calls:
        return Timeline("torch.profiler trace, CPU only", spans)
    device = [Op(start, end, calls.get(link)) for start, end, link in ops]
    return Timeline("torch.profiler trace", spans, device, launches, waits)


def _complete(path: Path) -> Iterator[tuple[str, str, float, float, int, dict]]:
    """(category, name, start, end, thread, arguments) of every event that has a duration."""
    value = read_json(path, "trace")
    events = value.get("traceEvents") if isinstance(value, dict) else value
    if not isinstance(events, list):
        raise ValueError(f"{path} is no chrome trace: expected a list traceEvents")
    for i, event in enumerate(events):
        if not isinstance(event, dict) or event.get("ph") != "X":
            continue
        start, span = event.get("ts"), event.get("dur", 0)
        numbers = all(
            isinstance(n, int | float) and not isinstance(n, bool) and math.isfinite(n)
            for n in (start, span)
        )
        if not numbers or span < 0:
            raise ValueError(f"{path}: event {i} has no time: {json.dumps(event)[:80]}")
        args, thread = event.get("args"), event.get("tid")
        yield (
            str(event.get("cat")),
            str(event.get("name")),
            float(start),
            float(start + span),
            thread if isinstance(thread, int) else hash(str(thread)),
            {k: v for k, v in args.items() if isinstance(v, int)} if isinstance(args, dict) else {},
        )


def _span(path: Path, label: str, start: float, end: float, thread: int) -> Span:
    name, _, payload = label.removeprefix(f"{ranges.DOMAIN}:").partition("#")
    if name not in ranges.NAMES or not re.fullmatch(r"-?\d{1,19}|", payload):
        raise ValueError(f"{path}: {label[:60]!r} is no range of ours")
    return Span(name, start, end, int(payload) if payload else None, thread)
