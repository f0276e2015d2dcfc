"""Parts of a phase, and what runs them one after another."""

from __future__ import annotations

import importlib
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import out_of_memory
from . import PHASES

Event = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Options:
    """What a run was asked for.

    Attributes:
        phases: names out of `PHASES`, in order.
        dry_run: tiny shapes on the CPU, wall clock instead of device events, no process per phase.
        out: folder of results.json and log.txt.
        bundle: folder that `make gpu-bundle` filled; it may be absent.
        budget: seconds for the whole run; a part that would not fit in what is left is skipped.
        seed: of every random case and weight.
        commit: what the result file names where the tree has no .git.
    """

    phases: tuple[str, ...] = tuple(PHASES)
    dry_run: bool = False
    out: Path = Path("results/gpu")
    bundle: Path = Path("gpu_bundle")
    budget: float = 520.0
    seed: int = 0
    commit: str | None = None

    @property
    def device(self) -> str:
        """Where the tensors live."""
        return "cpu" if self.dry_run else "cuda"


class Skip(Exception):
    """Raised by a part that cannot run here; the message says why."""


class CheckFailed(Exception):
    """Raised by a part whose results are wrong."""


@dataclass(slots=True)
class Context:
    """What a part is given.

    Attributes:
        options: of the run.
        deadline: `time.monotonic()` at which the budget is spent.
        known: results of the parts before this one, by "phase.part".
        log: takes one line of text.
    """

    options: Options
    deadline: float
    known: dict[str, dict] = field(default_factory=dict)
    log: Callable[[str], None] = lambda line: None

    def left(self) -> float:
        """Seconds until the budget is spent."""
        return self.deadline - time.monotonic()

    def has_room(self, part: Part) -> bool:
        """Whether the part's estimate fits in what is left; a dry run has no estimates."""
        return self.options.dry_run or self.left() >= part.seconds


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a phase that is estimated, run and recorded as one.

    Attributes:
        phase, name: together unique.
        run: generator; the dictionaries it yields are merged into the part's results, lists
            extended. A list under "verify" goes to the run's table of v(M). It raises `Skip`
            where it cannot run and `CheckFailed`, or anything, where it fails.
        seconds: what it takes on a GPU, an estimate on the safe side.
        paths: folders put first on the module path; such a part gets a process of its own.
    """

    phase: str
    name: str
    run: Callable[[Context], Iterator[dict]]
    seconds: float
    paths: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """The part's name in a result file."""
        return f"{self.phase}.{self.name}"


def parts_of(phase: str, options: Options) -> list[Part]:
    """The parts of a phase, in order; `phase` is a key of `PHASES`."""
    return importlib.import_module(PHASES[phase]).parts(options)


def merge(into: dict, data: dict) -> None:
    """Lists are extended, dictionaries merged, all else replaced."""
    for key, value in data.items():
        if isinstance(value, list):
            into.setdefault(key, []).extend(value)
        elif isinstance(value, dict):
            merge(into.setdefault(key, {}), value)
        else:
            into[key] = value


def execute(
    parts: Sequence[Part],
    context: Context,
    emit: Callable[[Event], None],
    stop_on_failure: bool = False,
) -> None:
    """Run `parts`; everything that happens becomes an event.

    Args:
        emit: takes {"part", "event": "start" | "data" | "passed" | "failed" | "skipped", ...}.
        stop_on_failure: a CUDA error outlives the call that caused it, so what comes after a
            failure needs a fresh process.
    """
    for part in parts:
        if not context.has_room(part):
            emit(budget_event(part, context.left()))
            continue
        emit({"part": part.key, "event": "start"})
        start = time.monotonic()
        found = context.known.setdefault(part.key, {})
        ending: Event = {"event": "passed"}
        try:
            for data in part.run(context):
                merge(found, data)
                emit({"part": part.key, "event": "data", "data": data})
        except Skip as reason:
            ending = {"event": "skipped", "message": str(reason)}
        except Exception as error:
            ending = {"event": "failed", "message": _message(error)}
            if not isinstance(error, CheckFailed):
                context.log(traceback.format_exc().rstrip())
        emit({"part": part.key, "seconds": time.monotonic() - start, **ending})
        if stop_on_failure and ending["event"] == "failed":
            return


def budget_event(part: Part, left: float) -> Event:
    """The part is skipped because its estimate exceeds what is left of the budget."""
    message = f"the budget: about {part.seconds:.0f} s needed, {max(left, 0):.0f} s left"
    return {"part": part.key, "event": "skipped", "message": message}


def _message(error: Exception) -> str:
    first = str(error).strip().split("\n\n")[0]
    text = " ".join(first.split())
    if out_of_memory(error):
        text += "; end what else is on the card, or leave this phase out of --phases"
    return text if isinstance(error, CheckFailed) else f"{type(error).__name__}: {text}"
