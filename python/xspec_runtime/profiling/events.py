"""Ranges that this process recorded itself, as a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from xspec_kernels import ranges

from ..files import read_text, write_text
from .timeline import Span, Timeline

__all__ = ["read_events", "write_events"]

FORMAT = "xspec events 1"


def write_events(path: Path, events: Sequence[ranges.Event]) -> None:
    """JSON lines: a header, then [name, start, end, payload, thread] in nanoseconds.

    Raises:
        OSError: the file cannot be written.
    """
    lines = [{"format": FORMAT}, *events]
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))


def read_events(path: Path) -> Timeline:
    """What `write_events` wrote.

    Raises:
        FileNotFoundError: there is no file.
        ValueError: it holds something else; the message names the line.
    """
    spans = []
    for number, line in enumerate(read_text(path, "events").splitlines(), 1):
        try:
            value = json.loads(line)
            if number == 1:
                if value["format"] != FORMAT:
                    raise ValueError
                continue
            name, start, end, payload, thread = value
            numbers = (start, end, thread) if payload is None else (start, end, thread, payload)
            if name not in ranges.NAMES or end < start or any(type(n) is not int for n in numbers):
                raise ValueError
        except (ValueError, TypeError, KeyError, RecursionError):
            what = f'a header {{"format": "{FORMAT}"}}' if number == 1 else "an event"
            raise ValueError(f"{path}, line {number}: expected {what}") from None
        spans.append(Span(name, start / 1e3, end / 1e3, payload, thread))
    if not spans:
        raise ValueError(f"{path} holds no events")
    return Timeline("events of this package", sorted(spans, key=lambda s: s.start))
