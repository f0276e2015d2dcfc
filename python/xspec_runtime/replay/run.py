"""Recorded answers through drafters and the accept op: what a drafter is worth, without a model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from time import perf_counter

import torch

from xspec_kernels import require_backend, tree_mask, verify_greedy

from ..data.pairs import Pair, contiguous_folds, read_pairs
from ..drafters.base import MAX_ROWS, Drafter, DraftTree, Request
from ..environment import environment
from ..files import JsonLines
from .arms import Arm, replay_arms
from .drafters import request_of
from .report import replay_markdown
from .tally import ReplayRound, Tally

__all__ = ["ReplayOptions", "ReplayRound", "replay", "replay_markdown", "run_replay"]

SCHEMA = "xspec.replay/1"
FIGURES = ("tokens_per_verify", "acceptance_rate", "after_10")


@dataclass(slots=True)
class ReplayOptions:
    """What to replay.

    Attributes:
        pairs: file of recorded pairs to test on.
        train: file that fills memories; without one, all folds but the tested one do.
        folds: contiguous folds of `pairs`, unused with `train`.
        gamma: draft tokens a round of the raw draft and of the constant string.
        rows: rows of a verify, root included, of the memory drafters; text as in "6,16" will do.
        limit: only the first so many pairs of each file.
        backend: of the accept op.
    """

    pairs: Path
    train: Path | None = None
    folds: int = 5
    gamma: int = 5
    rows: Sequence[int] | str = (6, 16, 32, 64)
    limit: int | None = None
    backend: str = "auto"
    command: str = ""

    def __post_init__(self) -> None:
        if isinstance(self.rows, str):
            try:
                self.rows = [int(part) for part in self.rows.split(",")]
            except ValueError:
                raise ValueError(f"rows must be numbers like 6,16, got {self.rows!r}") from None
        if not 1 <= self.gamma < MAX_ROWS:
            raise ValueError(f"gamma must be from 1 to {MAX_ROWS - 1}, got {self.gamma}")
        for value in self.rows:
            if not 2 <= value <= MAX_ROWS:
                raise ValueError(f"rows must be from 2 to {MAX_ROWS}, got {value}")
        require_backend(self.backend, "cpu", ("tree_mask", "verify_greedy"))
        if not self.rows or len(set(self.rows)) < len(self.rows):
            raise ValueError(f"rows must be one or more different numbers, got {list(self.rows)}")


def replay(
    drafter: Drafter,
    target_tokens: Sequence[int],
    rows: int,
    request: Request | None = None,
    backend: str = "auto",
) -> list[ReplayRound]:
    """Walk one recorded answer, its first token given, as a greedy target would emit it.

    Trees of more than 64 rows, which no verify takes, are walked on the host.

    Raises:
        ValueError: the answer is empty.
    """
    if not target_tokens:
        raise ValueError("replay needs an answer of at least one token")
    answer = list(target_tokens)
    drafter.begin(request or Request())
    rounds, known = [], 1
    while known < len(answer):
        start = perf_counter()
        tree = drafter.propose(answer[:known], rows)
        spent = perf_counter() - start
        if len(tree) > MAX_ROWS:
            accepted = _walked(tree, answer[known:])
        else:
            accepted = _accept(tree, answer[known:], backend)
        emitted = min(accepted + 1, len(answer) - known)
        rounds.append(ReplayRound(known, tree, accepted, emitted, spent))
        known += emitted
    drafter.end(answer)
    return rounds


def _accept(tree: DraftTree, future: Sequence[int], backend: str) -> int:
    """Accepted draft tokens. Off the recorded path the target is unknown: -1, never accepted."""
    depth, targets = [0], [future[0]]
    for i in range(1, len(tree)):
        up = tree.parent_idx[i]
        depth.append(depth[up] + 1)
        on_path = targets[up] >= 0 and tree.tokens[i] == targets[up]
        targets.append(future[depth[i]] if on_path and depth[i] < len(future) else -1)
    parents = torch.tensor([tree.parent_idx], dtype=torch.int32)
    mask = tree_mask(parents, max_depth=MAX_ROWS, backend=backend)
    ids = torch.tensor([tree.tokens, targets])
    return int(verify_greedy(ids[:1], parents, ids[1:], mask.ancestor_bits, backend=backend)[0])


def _walked(tree: DraftTree, future: Sequence[int]) -> int:
    """The same for trees of any size."""
    node, accepted = 0, 0
    while accepted < len(future) and (child := tree.child(node, future[accepted])) is not None:
        node, accepted = child, accepted + 1
    return accepted


class ReplayRun:
    """A replay in progress: `results` are whole at any time.

    Attributes:
        results: schema ``xspec.replay/1``; its ``replay`` grows by one entry an arm.
        steps: answers that will be replayed in all.
    """

    def __init__(self, options: ReplayOptions) -> None:
        self.options = o = options
        test = read_pairs(o.pairs, o.limit)
        if o.train:
            self._folds = [(test, read_pairs(o.train, o.limit))]
        else:
            self._folds = [
                ([test[i] for i in fold], [*test[: fold.start], *test[fold.stop :]])
                for fold in contiguous_folds(len(test), o.folds)
            ]
        for fold, _ in self._folds:
            if all(len(pair.target) < 2 for pair in fold):
                raise ValueError(
                    f"{o.pairs}: no answer from row {fold[0].row} to {fold[-1].row} is longer than "
                    "the one token that is given"
                )
        self._arms = replay_arms(o.gamma, o.rows)
        self.steps = len(self._arms) * len(test)
        config = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(o).items()}
        config |= {"rows": list(o.rows), "samples": len(test), "folds": len(self._folds)}
        self.results = {
            "schema": SCHEMA,
            "command": config.pop("command"),
            "environment": environment(),
            "config": config,
            "complete": False,
            "replay": [],
        }

    def run(self, trace: JsonLines | None = None) -> Iterator[str]:
        """Replay everything; yields the arm's name after every answer."""
        for arm in self._arms:
            folds, lines = [], []
            for number, (test, train) in enumerate(self._folds):
                drafter, tally = arm.make(number, train), Tally()
                for pair in test:
                    request = request_of(pair)
                    rounds = replay(drafter, pair.target, arm.rows, request, self.options.backend)
                    tally.count(rounds)
                    if trace:
                        lines += [_trace_line(arm, pair, r) for r in rounds]
                    yield f"{arm.drafter}, {arm.rows} rows"
                folds.append({key: tally.figures()[key] for key in FIGURES})
            for line in lines:
                trace.write(line)
            self.results["replay"].append(_entry(arm, folds))
        self.results["complete"] = True


def run_replay(
    options: ReplayOptions,
    trace: Path | None = None,
    progress: Callable[[int, int, str], None] = lambda done, steps, arm: None,
) -> dict:
    """Replay a file through all drafters.

    Ctrl-C ends it early: ``complete`` is then false and ``replay`` holds the arms that are done.

    Returns:
        Results of schema ``xspec.replay/1``; figures of an entry are means over its folds.

    Raises:
        FileNotFoundError, ValueError: a file is missing or malformed, see `read_pairs`.
    """
    run = ReplayRun(options)
    with JsonLines(trace) as lines:
        try:
            for done, arm in enumerate(run.run(lines if trace else None), 1):
                progress(done, run.steps, arm)
        except KeyboardInterrupt:
            pass
    return run.results


def _entry(arm: Arm, folds: list[dict]) -> dict:
    means = {}
    for key in FIGURES:
        values = [fold[key] for fold in folds if fold[key] is not None]
        means[key] = fmean(values) if values else None
    return {
        "drafter": arm.drafter, "rows": arm.rows, "online": arm.online, **means, "folds": folds,
    }  # fmt: skip


def _trace_line(arm: Arm, pair: Pair, step: ReplayRound) -> str:
    return json.dumps(
        {
            "sample": pair.sample,
            "row": pair.row,
            "drafter": arm.drafter,
            "rows": arm.rows,
            "online": arm.online,
            "context": list(pair.target[: step.known]),
            "tokens": step.tree.tokens[1:],
            "parent_idx": [parent - 1 for parent in step.tree.parent_idx[1:]],
            "accepted": step.accepted,
        }
    )
