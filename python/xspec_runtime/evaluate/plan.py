"""What an evaluation measures: options in, a list of cells out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from xspec_kernels import require_backend

from ..drafters.base import MAX_ROWS
from ..replay.arms import ANY_ROWS, SOURCES, Source, Training, Variant, combined

COMBINED = "combined"
SIZE_ROWS = 16  # rows at which acceptance against training size is measured


@dataclass(slots=True)
class EvaluateOptions:
    """What to evaluate.

    Attributes:
        pairs: file of recorded pairs; None: the embedded pair, live.
        train: file that drafters learn from; without one, all folds but the tested one.
        folds: contiguous folds; of a live run, groups of scenes.
        by_drive: a fold for each drive that the file names instead.
        gamma: draft tokens of sources that propose a chain.
        rows: rows of a verify, root included; above 64 of replayed sources that can. Text as in
            "6,16" will do.
        sources: names of `SOURCES`, with commas between; empty: all that can run here.
        sizes: training answers at which acceptance is measured too, text or numbers; 0 is an empty
            memory.
        limit: only the first so many pairs of each file.
        scenes, seed: of a live run: how many unseen scenes, and which.
        backend: of the ops.
        folder: where results are written, after every cell; trained networks are kept there.
        resume: take over the cells of an unfinished run of the same options from `folder`.
    """

    pairs: Path | None = None
    train: Path | None = None
    folds: int = 5
    by_drive: bool = False
    gamma: int = 5
    rows: Sequence[int] | str = (6, 16, 32, 64)
    sources: str = ""
    sizes: Sequence[int] | str = ()
    limit: int | None = None
    scenes: int = 24
    seed: int = 0
    backend: str = "auto"
    folder: Path | None = None
    resume: bool = False
    command: str = ""

    def __post_init__(self) -> None:
        self.rows = _numbers("rows", self.rows)
        self.sizes = _numbers("sizes", self.sizes)
        limit = MAX_ROWS if self.pairs is None else ANY_ROWS
        if not self.rows:
            raise ValueError("rows must be one number or more")
        if not 1 <= self.gamma < MAX_ROWS:
            raise ValueError(f"gamma must be from 1 to {MAX_ROWS - 1}, got {self.gamma}")
        for value in self.rows:
            if not 2 <= value <= limit:
                raise ValueError(f"rows must be from 2 to {limit}, got {value}")
        if any(value < 0 for value in self.sizes):
            raise ValueError(f"sizes must not be negative, got {min(self.sizes)}")
        if self.pairs is None and (self.train or self.by_drive or self.limit):
            raise ValueError("train, by-drive and limit go with a file of pairs, not a live run")
        if self.by_drive and self.train:
            raise ValueError("by-drive makes folds of one file; it does not go with train")
        if self.resume and self.folder is None:
            raise ValueError("resume needs the folder that the unfinished run wrote to")
        if not 1 <= self.scenes <= 100_000 or not 0 <= self.seed <= 1_000_000:
            raise ValueError(
                "scenes must be from 1 to 100000 and seed from 0 to 1000000, got "
                f"{self.scenes} and {self.seed}"
            )
        require_backend(self.backend, "cpu", ("tree_mask", "verify_greedy"))
        self.chosen()

    def check_sizes(self, answers: int) -> None:
        """Raise `ValueError` if a size is more than the answers there are to learn from."""
        if self.sizes and self.sizes[-1] > answers:
            raise ValueError(
                f"sizes must be at most {answers}, the answers to learn from, got {self.sizes[-1]}"
            )

    def chosen(self) -> dict[str, Source]:
        """The sources to run, by name.

        Raises:
            ValueError: a name is unknown, or nothing is left.
            RuntimeError: a source asked for by name cannot run here.
        """
        names = [name.strip() for name in self.sources.split(",") if name.strip()]
        for name in names:
            if name not in SOURCES:
                raise ValueError(f"unknown source {name!r}; there are {', '.join(SOURCES)}")
            reason = self.absent(SOURCES[name])
            if reason:
                raise RuntimeError(f"source {name!r}: {reason}")
        there = {n: s for n, s in SOURCES.items() if not self.absent(s)}
        return {n: s for n, s in there.items() if not names or n in names}

    def absent(self, source: Source) -> str:
        """Why a source cannot be part of this run, or ""."""
        if source.live and self.pairs is not None:
            return "it runs the embedded pair's models; leave the file of pairs out"
        if not source.live and source.recorded and self.pairs is None:
            return "it reads recorded drafts; name a file of pairs"
        return source.missing()


@dataclass(frozen=True, slots=True)
class Subject:
    """Drafters under test: one source, or several in one tree.

    Attributes:
        label: how reports call it.
        members: names of `SOURCES`.
        left_out: the source that the combination lacks, or "".
    """

    label: str
    members: tuple[str, ...]
    variant: Variant
    left_out: str = ""

    def make(self, training: Training):
        """A fresh drafter."""
        made = {name: SOURCES[name].make(training, self.variant) for name in self.members}
        return combined(made)


@dataclass(frozen=True, slots=True)
class Cell:
    """One subject on one fold: the unit that is measured, written and resumed.

    Attributes:
        part: "verify": answers are decoded; "next": every next token is asked for, the right ones
            given; "size": "verify" with `size` training answers.
    """

    part: str
    subject: Subject
    fold: int
    size: int | None = None

    def key(self) -> tuple:
        """What tells cells apart in a result file."""
        v = self.subject.variant
        return (self.part, self.subject.label, v.rows, v.online, v.hide_draft, self.fold, self.size)


def plan(options: EvaluateOptions, folds: int) -> list[Cell]:
    """All cells, those of one line of a report next to each other."""
    chosen = options.chosen()
    cells = []
    for subject in subjects(options, chosen):
        cells += [Cell("verify", subject, fold) for fold in range(folds)]
    for name, source in chosen.items():
        for variant in _variants(source, options.gamma + 1, options.gamma):
            cells += [Cell("next", Subject(name, (name,), variant), f) for f in range(folds)]
    for subject in _size_subjects(options, chosen):
        for size in options.sizes:
            cells += [Cell("size", subject, fold, size) for fold in range(folds)]
    return cells


def subjects(options: EvaluateOptions, chosen: dict[str, Source]) -> Iterator[Subject]:
    """Every source at every number of rows, then all that join, then all but one."""
    for name, source in chosen.items():
        for rows in [options.gamma + 1] if source.chain else options.rows:
            if rows <= source.most_rows:
                for variant in _variants(source, rows, options.gamma):
                    yield Subject(name, (name,), variant)
    joining = [name for name, source in chosen.items() if not source.baseline]
    if len(joining) < 2:
        return
    for rows in (rows for rows in options.rows if rows <= MAX_ROWS):
        online = Variant(rows, options.gamma, any(chosen[name].learns for name in joining))
        yield Subject(COMBINED, tuple(joining), online)
        if any(chosen[name].reads_draft for name in joining):
            yield Subject(COMBINED, tuple(joining), replace(online, hide_draft=True))
        for name in joining:
            rest = tuple(other for other in joining if other != name)
            yield Subject(f"{COMBINED} without {name}", rest, online, left_out=name)


def _size_subjects(options: EvaluateOptions, chosen: dict[str, Source]) -> Iterator[Subject]:
    for name, source in chosen.items():
        if source.learns and not source.chain:
            for online in (False, True):
                yield Subject(name, (name,), Variant(SIZE_ROWS, options.gamma, online))


def _variants(source: Source, rows: int, gamma: int) -> Iterator[Variant]:
    for online in (False, True) if source.learns else (False,):
        for hidden in (False, True) if source.reads_draft else (False,):
            yield Variant(rows, gamma, online, hidden)


def _numbers(name: str, given: Sequence[int] | str) -> list[int]:
    if isinstance(given, str):
        try:
            given = [int(part) for part in given.split(",") if part.strip()]
        except ValueError:
            raise ValueError(f"{name} must be numbers like 6,16, got {given!r}") from None
    if len(set(given)) < len(given):
        raise ValueError(f"{name} must be different numbers, got {list(given)}")
    return sorted(given)
