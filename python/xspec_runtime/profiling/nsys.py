"""An SQLite file that `nsys export --type sqlite` made.

The schema is NVIDIA's, described in the Nsight Systems user guide under "SQLite schema reference";
columns that are read are looked up first, as they differ between versions.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

from xspec_kernels import ranges

from ..files import existing_file
from .chrome import LAUNCH, WAIT
from .timeline import Op, Span, Timeline

PREFIX = "CUPTI_ACTIVITY_KIND_"
DEVICE = ("KERNEL", "MEMCPY", "MEMSET", "GRAPH_TRACE")
# Values of NVTX_EVENTS.eventType.
PUSH_POP, START_END, DOMAIN_CREATED = 59, 60, 75
PAYLOADS = ("int64Value", "uint64Value", "int32Value", "uint32Value")


def read_nsys(path: Path) -> Timeline:
    """The ranges of our domain, and what CUDA did.

    Raises:
        FileNotFoundError: there is no file.
        ValueError: it is no such export, or lacks a table or our ranges; the message names which.
    """
    existing_file(path, "Nsight Systems export")
    address = f"file:{quote(str(path.resolve()))}?mode=ro&immutable=1"
    try:
        with closing(sqlite3.connect(address, uri=True)) as base:
            base.execute("PRAGMA trusted_schema = OFF")
            return _Export(path, base).timeline()
    except (sqlite3.Error, TypeError, OverflowError) as error:
        raise ValueError(f"{path} is no Nsight Systems export: {error}") from None


class _Export:
    """An open file."""

    def __init__(self, path: Path, base: sqlite3.Connection) -> None:
        self._path, self._base = path, base
        # Views are left aside: what they compute is the file's choice.
        found = base.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        self._tables = {name for (name,) in found}

    def timeline(self) -> Timeline:
        missing = sorted({"NVTX_EVENTS", "StringIds"} - self._tables)
        if missing:
            raise ValueError(
                f"{self._path} has no table {' and no '.join(missing)}: profile with "
                "--trace=cuda,nvtx and export with --type=sqlite"
            )
        spans, notes = self._spans(), []
        runtime, device = f"{PREFIX}RUNTIME", [k for k in DEVICE if PREFIX + k in self._tables]
        if runtime not in self._tables:
            return Timeline(
                "Nsight Systems", spans, notes=[f"no table {runtime}: nothing of CUDA is known"]
            )
        calls, launches, waits = self._calls(runtime)
        ops = []
        for kind in device:
            rows = self._rows(PREFIX + kind, ("start", "end", "correlationId"))
            ops += [Op(a / 1e3, b / 1e3, calls.get(c)) for a, b, c in rows if b >= a]
        if not {"KERNEL", "GRAPH_TRACE"} & set(device):
            notes.append(f"neither {PREFIX}KERNEL nor {PREFIX}GRAPH_TRACE: no kernel was recorded")
        return Timeline("Nsight Systems", spans, ops, launches, waits, notes)

    def _columns(self, table: str) -> set[str]:
        return {row[1] for row in self._base.execute(f"PRAGMA table_info({table})")}

    def _rows(self, table: str, names: tuple[str, ...]) -> sqlite3.Cursor:
        missing = sorted(set(names) - self._columns(table))
        if missing:
            raise ValueError(f"{self._path}: {table} has no column {', '.join(missing)}")
        chosen = ", ".join(f'"{name}"' for name in names)
        return self._base.execute(f"SELECT {chosen} FROM {table}")

    def _spans(self) -> list[Span]:
        strings = dict(self._rows("StringIds", ("id", "value")))
        have = self._columns("NVTX_EVENTS")
        payloads = tuple(name for name in PAYLOADS if name in have)
        wanted = ("start", "end", "eventType", "text", "textId", "domainId", "globalTid")
        rows = self._rows("NVTX_EVENTS", (*wanted, *payloads)).fetchall()
        ours = {
            row[5]
            for row in rows
            if row[2] == DOMAIN_CREATED and (row[3] or strings.get(row[4])) == ranges.DOMAIN
        }
        spans = []
        for start, end, kind, text, text_id, domain, thread, *values in rows:
            name = text or strings.get(text_id)
            if kind not in (PUSH_POP, START_END) or domain not in ours or name not in ranges.NAMES:
                continue
            # A range that was open when the recording stopped has no end.
            if end is not None and end >= start:
                payload = next((value for value in values if value is not None), None)
                spans.append(Span(name, start / 1e3, end / 1e3, payload, thread))
        if not spans:
            raise ValueError(f"{self._path} has no ranges in the NVTX domain {ranges.DOMAIN!r}")
        return sorted(spans, key=lambda span: span.start)

    def _calls(self, table: str) -> tuple[dict[int, float], list[float], list[float]]:
        """Start of every call by correlation, then those that launch and those that wait."""
        strings = dict(self._rows("StringIds", ("id", "value")))
        calls: dict[int, float] = {}
        launches: list[float] = []
        waits: list[float] = []
        for start, link, name_id in self._rows(table, ("start", "correlationId", "nameId")):
            name, at = str(strings.get(name_id)), start / 1e3
            calls[link] = at
            if LAUNCH.match(name):
                launches.append(at)
            if WAIT.match(name):
                waits.append(at)
        return calls, launches, waits
