"""`xspec evaluate`: every source of drafts, alone and together, on the same answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..drafters.base import Drafter
from ..environment import environment
from ..files import check_output, read_json, write_json
from ..metrics import OPENING_TOKENS, first_token_accuracy, top_k_accuracy
from ..replay.arms import SOURCES
from ..replay.tally import Tally
from .material import Material, RecordedPairs
from .plan import Cell, EvaluateOptions, plan

__all__ = ["EvaluateOptions", "Evaluation", "evaluate"]

SCHEMA = "xspec.evaluate/1"
NEXT_ROWS = 16  # of trees where only the next token counts; they hold its five best, or fewer


def evaluate(
    options: EvaluateOptions,
    progress: Callable[[int, int, str], None] = lambda done, steps, label: None,
) -> dict[str, Any]:
    """Measure all cells.

    With a folder, ``results.json`` there is replaced after every cell. Ctrl-C ends it early:
    ``complete`` is then false and ``cells`` holds what is done.

    Returns:
        Results of schema ``xspec.evaluate/1``.

    Raises:
        FileNotFoundError, ValueError, RuntimeError: an option, a file or an unfinished result is
            wrong, or a source cannot run here; see `EvaluateOptions`.
    """
    run = Evaluation(options)
    try:
        for label in run.run():
            progress(run.done, run.steps, label)
    except KeyboardInterrupt:
        pass
    return run.results


class Evaluation:
    """An evaluation in progress: `results` are whole at any time.

    Attributes:
        results: schema ``xspec.evaluate/1``; its ``cells`` grow by one at a time.
        steps, done: answers to go through in all, and so far.
    """

    def __init__(self, options: EvaluateOptions, material: Material | None = None) -> None:
        self.options = options
        self._file = options.folder / "results.json" if options.folder else None
        if self._file:
            check_output(self._file)
        self._material = material or _material(options)
        self._cells = plan(options, self._material.folds())
        self.results = _header(options, self._material.facts())
        self._measured: set[tuple] = set()
        if options.resume:
            self._take_over()
        self.steps = sum(len(self._material.items(cell.fold)) for cell in self._left())
        self.done = 0

    def run(self) -> Iterator[str]:
        """Measure what is left; yields what was under way after every answer."""
        for cell in self._left():
            variant = cell.subject.variant
            label = f"{cell.part}: {cell.subject.label}, {variant.rows} rows, fold {cell.fold + 1}"
            measure = self._next_tokens if cell.part == "next" else self._rounds
            figures: dict[str, Any] = {}
            for figures in measure(cell):  # noqa: B007 the last ones count
                self.done += 1
                yield label
            self.results["cells"].append(_entry(cell, figures))
            self._save()
        self.results["complete"] = True
        self._save()

    def _rounds(self, cell: Cell) -> Iterator[dict[str, Any]]:
        material, variant = self._material, cell.subject.variant
        drafter = self._drafter(cell)
        tally = Tally()
        items = material.items(cell.fold)
        for number, item in enumerate(items, 1):
            rounds = material.decode(drafter, item, variant.rows, variant.hide_draft)
            tally.count(rounds, material.answer(item))
            yield tally.figures() if number == len(items) else {}

    def _next_tokens(self, cell: Cell) -> Iterator[dict[str, Any]]:
        material, variant = self._material, cell.subject.variant
        drafter = self._drafter(cell)
        ranked, tokens, late, first = [], [], [], []
        items = material.items(cell.fold)
        for number, item in enumerate(items, 1):
            drafter.begin(material.request(item, variant.hide_draft))
            answer = list(material.answer(item))
            asked = next_tokens(drafter, answer, max(NEXT_ROWS, variant.rows))
            drafter.end(answer)
            ranked += asked
            tokens += answer[1:]
            late += range(len(ranked) - len(asked) + OPENING_TOKENS - 1, len(ranked))
            first += [(asked[0], answer[1:])] if asked else []
            if number < len(items):
                yield {}
        after = [ranked[i] for i in late], [tokens[i] for i in late]
        yield {
            "top_1": top_k_accuracy(ranked, tokens),
            "top_5": top_k_accuracy(ranked, tokens, 5),
            "top_1_after_10": top_k_accuracy(*after),
            "first_token": first_token_accuracy(first),
            "positions": len(tokens),
        }

    def _drafter(self, cell: Cell) -> Drafter:
        return cell.subject.make(self._material.training(cell.fold, cell.size))

    def _left(self) -> list[Cell]:
        return [cell for cell in self._cells if cell.key() not in self._measured]

    def _take_over(self) -> None:
        if not self._file.exists():
            return
        before = read_json(self._file, "unfinished evaluation")
        known = before if isinstance(before, dict) else {}
        for key in ("schema", "config", "material"):
            if known.get(key) != self.results[key]:
                raise ValueError(
                    f"{self._file} was measured with another {key}; leave --resume out to start "
                    "over, or name another folder"
                )
        planned = {cell.key() for cell in self._cells}
        for entry in known.get("cells", []):
            if _key(entry) in planned - self._measured:
                self.results["cells"].append(entry)
                self._measured.add(_key(entry))

    def _save(self) -> None:
        if self._file:
            write_json(self._file, self.results)


def next_tokens(drafter: Drafter, answer: Sequence[int], rows: int) -> list[list[int]]:
    """What the drafter proposes as next token at every position after the first, best first, when
    all tokens before it are the answer's own. The request has begun.
    """
    found = []
    for known in range(1, len(answer)):
        tree = drafter.propose(answer[:known], rows)
        below = [i for i in range(1, len(tree)) if tree.parent_idx[i] == 0]
        below.sort(key=lambda i: -tree.scores[i])
        found.append([tree.tokens[i] for i in below])
    return found


def _material(options: EvaluateOptions) -> Material:
    if options.pairs is not None:
        return RecordedPairs(options)
    from .live import LiveScenes

    return LiveScenes(options)


def _header(options: EvaluateOptions, facts: dict[str, object]) -> dict[str, Any]:
    config = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(options).items()}
    for key in ("command", "folder", "resume"):
        config.pop(key)
    chosen = options.chosen()
    absent = {name: options.absent(source) for name, source in SOURCES.items()}
    return {
        "schema": SCHEMA,
        "command": options.command,
        "environment": environment(),
        "config": config,
        "material": facts,
        "sources": {
            name: {"baseline": source.baseline, "reads_draft": source.reads_draft}
            for name, source in chosen.items()
        },
        "missing": {name: reason for name, reason in absent.items() if reason},
        "complete": False,
        "cells": [],
    }


def _entry(cell: Cell, figures: dict[str, Any]) -> dict[str, Any]:
    subject, variant = cell.subject, cell.subject.variant
    if "histogram" in figures:
        figures = {**figures, "histogram": {str(k): n for k, n in figures["histogram"].items()}}
    return {
        "part": cell.part,
        "drafter": subject.label,
        "rows": variant.rows,
        "online": variant.online,
        "learns": any(SOURCES[name].learns for name in subject.members),
        "hide_draft": variant.hide_draft,
        "fold": cell.fold,
        "size": cell.size,
        "members": list(subject.members),
        "left_out": subject.left_out,
        **figures,
    }


def _key(entry: dict[str, Any]) -> tuple:
    """`Cell.key` of an entry."""
    names = ("part", "drafter", "rows", "online", "hide_draft", "fold", "size")
    return tuple(entry.get(name) for name in names)
