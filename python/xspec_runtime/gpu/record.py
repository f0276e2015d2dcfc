"""The result file of a run, schema ``xspec.gpu/1``, and its log, rewritten after every event."""

from __future__ import annotations

import hashlib
import math
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from .. import environment as _environment
from ..files import write_json, write_text
from .parts import Event, Options, Part, merge

SCHEMA = "xspec.gpu/1"
ROW = (
    *("weights", "prompt_tokens", "rows", "shape", "backend", "mode", "ms", "ratio"),
    "floor_ratio",
)
STATUSES = ("waiting", "running", "passed", "failed", "skipped")


def gpu_environment(options: Options) -> dict[str, Any]:
    """Machine, card, driver, versions and sources, as JSON types; what is absent is None."""
    found = _environment.environment()
    if options.commit:
        found["commit"] = options.commit
    if options.dry_run:
        found["gpu"] = None
    found |= {"cuda": torch.version.cuda, "driver": None, "sources": source_hash()}
    found |= {"multiprocessors": None, "memory_bytes": None, "capability": None}
    if found["gpu"]:
        card = torch.cuda.get_device_properties(0)
        found["multiprocessors"] = card.multi_processor_count
        found["memory_bytes"] = card.total_memory
        found["capability"] = f"{card.major}.{card.minor}"
        found["driver"] = _driver()
    return found


def source_hash() -> str:
    """Of every Python file of both packages: names the code where there is no .git."""
    import xspec_kernels

    digest = hashlib.sha256()
    for package in (Path(xspec_kernels.__file__).parent, Path(_environment.__file__).parent):
        for file in sorted(package.rglob("*.py")):
            digest.update(f"{package.name}/{file.relative_to(package)}\0".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


class Record:
    """What is known so far, on disk at every moment."""

    def __init__(
        self, options: Options, parts: list[Part], command: str, echo: Callable[[str], None]
    ) -> None:
        self.out = options.out
        self.echo = echo
        self.lines: list[str] = []
        self._start = time.monotonic()
        phases: dict[str, dict] = {phase: {"status": "waiting", "parts": {}} for phase in
                                   options.phases}  # fmt: skip
        for part in parts:
            phases[part.phase]["parts"][part.name] = _waiting()
        self.results: dict[str, Any] = {
            "schema": SCHEMA,
            "dry_run": options.dry_run,
            "complete": False,
            "environment": gpu_environment(options),
            "command": command,
            "budget_s": options.budget,
            "elapsed_s": 0.0,
            "seed": options.seed,
            "phases": phases,
            "verify": [],
        }
        self.save()

    def log(self, line: str) -> None:
        """One line, to the log and the screen."""
        stamped = f"{time.monotonic() - self._start:7.1f} {line}"
        self.lines.append(stamped)
        self.echo(stamped)

    def apply(self, event: Event) -> None:
        """Take one event of `parts.execute`."""
        phase, name = event["part"].split(".", 1)
        part = self.results["phases"][phase]["parts"].setdefault(name, _waiting())
        if event["event"] == "data":
            data = _finite(event["data"])
            self.results["verify"] += data.pop("verify", [])
            merge(part["data"], data)
        else:
            part["status"] = "running" if event["event"] == "start" else event["event"]
            part["message"] = event.get("message")
            part["seconds"] = event.get("seconds", part["seconds"])
            took = "" if part["status"] == "running" else f" {part['seconds']:.1f} s"
            said = f": {part['message']}" if part["message"] else ""
            self.log(f"{event['part']} {part['status']}{took}{said}")
        self.results["phases"][phase]["status"] = _phase_status(self.results["phases"][phase])
        self.save()

    def close(self) -> None:
        """Nothing more will come."""
        self.results["complete"] = True
        self.save()

    @property
    def failed(self) -> bool:
        """Whether any part failed."""
        return any(phase["status"] == "failed" for phase in self.results["phases"].values())

    def save(self) -> None:
        """Rewrite both files."""
        self.results["elapsed_s"] = time.monotonic() - self._start
        write_json(self.out / "results.json", self.results)
        write_text(self.out / "log.txt", "".join(f"{line}\n" for line in self.lines))


def _waiting() -> dict[str, Any]:
    return {"status": "waiting", "message": None, "seconds": 0.0, "data": {}}


def _phase_status(phase: Mapping[str, Any]) -> str:
    found = {part["status"] for part in phase["parts"].values()}
    for status in ("failed", "running", "waiting", "passed"):
        if status in found:
            return "running" if status == "waiting" and "passed" in found else status
    return "skipped"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def validate_gpu_results(results: Mapping[str, Any]) -> None:
    """Check a results dictionary of schema ``xspec.gpu/1``.

    Raises:
        ValueError: names the first missing or wrong field, e.g. ``verify[2].ms``.
    """
    _require(results.get("schema") == SCHEMA, "schema", repr(SCHEMA), results.get("schema"))
    for key, kind in (
        *(("dry_run", bool), ("complete", bool), ("environment", dict), ("command", str)),
        *(("budget_s", float), ("elapsed_s", float), ("phases", dict), ("verify", list)),
    ):
        _require(isinstance(results.get(key), kind), key, kind.__name__, results.get(key))
    for key in ("gpu", "driver", "torch", "triton", "commit", "sources", "cuda"):
        _require(key in results["environment"], f"environment.{key}", "a value or null", "nothing")
    for name, phase in results["phases"].items():
        for part, found in phase["parts"].items():
            where = f"phases.{name}.parts.{part}"
            _require(found["status"] in STATUSES, f"{where}.status", STATUSES, found["status"])
            if found["status"] in ("failed", "skipped"):
                _require(bool(found["message"]), f"{where}.message", "a reason", found["message"])
        statuses = [part["status"] for part in phase["parts"].values()]
        good = phase["status"] == "failed" or "failed" not in statuses
        _require(good, f"phases.{name}.status", "'failed', as a part is", phase["status"])
    for index, row in enumerate(results["verify"]):
        for key in ROW:
            _require(key in row, f"verify[{index}].{key}", "a value", "nothing")
        positive = isinstance(row["ms"], float) and row["ms"] > 0
        _require(positive, f"verify[{index}].ms", "milliseconds above 0", row["ms"])


def _require(good: bool, where: str, expected: object, found: object) -> None:
    if not good:
        raise ValueError(f"{where}: expected {expected}, got {found}")
