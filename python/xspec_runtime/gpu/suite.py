"""Runs the phases within the budget and keeps the results."""

from __future__ import annotations

import contextlib
import math
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path

import torch

from ..files import write_text
from . import PHASES
from .parts import Context, Options, Part, budget_event, execute, merge, parts_of
from .record import Record
from .report import gpu_markdown
from .worker import job, parse

# Seconds past the budget that a part may still run before it is stopped.
GRACE = 15.0
# A part that takes so many times its estimate hangs.
PATIENCE = 3.0


def run_suite(options: Options, command: str, echo: Callable[[str], None]) -> int:
    """Run the phases; results.json and log.txt in `options.out` are rewritten as they go, and
    REPORT.md is their tables.

    Args:
        command: as the result file names it.
        echo: takes every line of the log.

    Returns:
        0, or 1 if a part failed. What was skipped, the log says why, does not count.

    Raises:
        ValueError: an unknown phase, or a budget that is not positive.
        RuntimeError: no CUDA device, and this is no dry run.
    """
    parts, broken = _plan(options)
    if not options.dry_run and not torch.cuda.is_available():
        raise RuntimeError(
            f"torch {torch.__version__} sees no CUDA device; --dry-run runs tiny shapes on the CPU"
        )
    record = Record(options, parts, command, echo)
    context = Context(options, time.monotonic() + options.budget, log=record.log)
    env = record.results["environment"]
    record.log(f"{env['gpu'] or env['cpu']}, torch {env['torch']}, triton {env['triton']}")
    for phase, message in broken.items():
        record.apply({"part": f"{phase}.load", "event": "failed", "message": message})
    for (_, paths), group in groupby(parts, key=lambda part: (part.phase, part.paths)):
        if options.dry_run and not paths:
            execute(list(group), context, record.apply)
        else:
            _run_apart(list(group), context, record)
    for line in summary(record.results):
        record.log(line)
    record.close()
    write_text(options.out / "REPORT.md", gpu_markdown(record.results) + "\n")
    return 1 if record.failed else 0


def _plan(options: Options) -> tuple[list[Part], dict[str, str]]:
    """Every part in order, and the phases whose module does not load with the reason."""
    if not 0 < options.budget < math.inf:
        raise ValueError(f"--budget is {options.budget}, expected seconds above 0")
    unknown = [phase for phase in options.phases if phase not in PHASES]
    if unknown or not options.phases:
        name = f"unknown phase {unknown[0]!r}" if unknown else "no phase was named"
        raise ValueError(f"{name}; there are {', '.join(PHASES)}")
    parts, broken = [], {}
    for phase in dict.fromkeys(options.phases):
        try:
            parts += parts_of(phase, options)
        except Exception as error:
            broken[phase] = f"{type(error).__name__}: {error}"
    return parts, broken


def _run_apart(parts: list[Part], context: Context, record: Record) -> None:
    """Run parts of one phase in a process, and in a fresh one whatever a failure left over."""
    waiting = {part.key: part for part in parts}
    while waiting:
        if not any(context.has_room(part) for part in waiting.values()):
            for part in waiting.values():
                record.apply(budget_event(part, context.left()))
            return
        before, running, started = len(waiting), None, time.monotonic()
        stop = context.deadline + GRACE
        with _worker(list(waiting.values()), context) as (process, lines):
            try:
                while (line := lines.get(timeout=max(stop - time.monotonic(), 0.01))) is not None:
                    text, event = parse(line)
                    if text:
                        record.log(text)
                    if event is None:
                        continue
                    record.apply(event)
                    if event["event"] == "data":
                        merge(context.known.setdefault(event["part"], {}), event["data"])
                    elif event["event"] == "start":
                        running, started = event["part"], time.monotonic()
                        limit = PATIENCE * waiting[running].seconds or math.inf
                        stop = min(context.deadline + GRACE, started + limit)
                    else:
                        running, stop = None, context.deadline + GRACE
                        del waiting[event["part"]]
                trouble = _ending(process)
            except queue.Empty:
                spent = context.left() < 0
                trouble = f"stopped: {'the budget was spent' if spent else 'it hangs'}"
        if running or (waiting and (trouble or len(waiting) == before)):
            stopped = running or next(iter(waiting))
            del waiting[stopped]
            event = {"part": stopped, "event": "failed", "seconds": time.monotonic() - started}
            record.apply(event | {"message": trouble or "its process ended early"})


@contextlib.contextmanager
def _worker(parts: list[Part], context: Context) -> Iterator[tuple]:
    """A process on `parts` and the queue of its output lines, None at the end."""
    # -P: the current folder may hold the source of an installed package, without its native module.
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "xspec_runtime.gpu.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, "PYTHONPATH": _module_path(), "PYTHONUNBUFFERED": "1"},
    )
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in process.stdout:
            lines.put(line.rstrip("\n"))
        lines.put(None)

    try:
        process.stdin.write(job(parts, context))
        process.stdin.close()
        threading.Thread(target=read, daemon=True).start()
        yield process, lines
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def _module_path() -> str:
    """Where this process found the packages, installed or not, ahead of PYTHONPATH."""
    import xspec_kernels

    homes = (Path(xspec_kernels.__file__).parents[1], Path(__file__).parents[2])
    folders = [str(home.resolve()) for home in homes]
    before = os.environ.get("PYTHONPATH")
    return os.pathsep.join(dict.fromkeys([*folders, *([before] if before else [])]))


def _ending(process: subprocess.Popen) -> str | None:
    """Why the process, whose output has ended, did not end well, or None."""
    try:
        status = process.wait(timeout=30)
    except subprocess.TimeoutExpired:
        return "its process closed its output and hung"
    if status < 0:
        return f"its process died of {signal.Signals(-status).name}"
    return f"its process ended with status {status}" if status else None


def summary(results: dict) -> Iterator[str]:
    """Lines of a short table: every part, then v(M)."""
    for phase, found in results["phases"].items():
        for name, part in found["parts"].items():
            yield f"{phase + '.' + name:32} {part['status']:8} {part['seconds']:6.1f} s"
    kinds: dict[tuple[str, ...], list[dict]] = {}
    for row in results["verify"]:
        kind = (row["weights"], row["backend"], row["mode"], row["shape"])
        kinds.setdefault((*kind, f"{row['prompt_tokens']} tokens"), []).append(row)
    for kind, rows in kinds.items():
        first = rows[0]
        floor = "" if first["floor_ratio"] is None else f", / floor {first['floor_ratio']:.2f}"
        cells = " ".join(f"{row['rows']}:{row['ratio']:.2f}" for row in rows)
        one = f"v({first['rows']}) {first['ms']:.3f} ms{floor}"
        yield f"{' '.join(kind)}: {one}; v(M)/v(1) {cells}"
