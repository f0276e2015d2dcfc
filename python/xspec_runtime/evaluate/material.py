"""What an evaluation runs on: recorded answers, in folds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

from ..data.pairs import Pair, contiguous_folds, drive_folds, read_pairs
from ..drafters.base import Drafter, Request
from ..files import read_bytes
from ..replay.arms import Training
from ..replay.drafters import request_of
from ..replay.run import replay
from ..replay.tally import ReplayRound
from .plan import EvaluateOptions


class Material(Protocol):
    """Answers to evaluate on. An item is one request; what it is, is the material's business."""

    def folds(self) -> int:
        """How many there are."""

    def items(self, fold: int) -> Sequence[Any]:
        """Requests to test on."""

    def training(self, fold: int, size: int | None = None) -> Training:
        """What drafters of the fold learn from; of `size` answers where given."""

    def request(self, item: Any, hide_draft: bool) -> Request:
        """What drafters may know before the answer."""

    def answer(self, item: Any) -> Sequence[int]:
        """The target's answer."""

    def decode(
        self, drafter: Drafter, item: Any, rows: int, hide_draft: bool
    ) -> Sequence[ReplayRound]:
        """The rounds of the request with this drafter."""

    def facts(self) -> dict[str, object]:
        """What reports say of it."""


@dataclass(frozen=True, slots=True)
class Fold:
    """Pairs to test on and pairs to learn from."""

    test: list[Pair]
    train: list[Pair]


class RecordedPairs:
    """Pairs of a file.

    Raises:
        FileNotFoundError, ValueError: a file is missing or malformed, or cannot be cut so.
    """

    def __init__(self, options: EvaluateOptions) -> None:
        self._options = o = options
        pairs = read_pairs(o.pairs, o.limit)
        self._folds = self._cut(pairs)
        for fold in self._folds:
            if all(len(pair.target) < 2 for pair in fold.test):
                raise ValueError(
                    f"{o.pairs}: no answer from row {fold.test[0].row} to {fold.test[-1].row} is "
                    "longer than the one token that is given"
                )
        o.check_sizes(min(len(fold.train) for fold in self._folds))
        self._trainings: dict[int, Training] = {}

    def _cut(self, pairs: list[Pair]) -> list[Fold]:
        o = self._options
        if o.train:
            return [Fold(pairs, read_pairs(o.train, o.limit))]
        rows = drive_folds(pairs) if o.by_drive else contiguous_folds(len(pairs), o.folds)
        return [
            Fold([pairs[i] for i in fold], [p for i, p in enumerate(pairs) if i not in kept])
            for fold, kept in ((fold, frozenset(fold)) for fold in rows)
        ]

    def folds(self) -> int:
        """One with a training file."""
        return len(self._folds)

    def items(self, fold: int) -> Sequence[Pair]:
        """The fold's pairs."""
        return self._folds[fold].test

    def training(self, fold: int, size: int | None = None) -> Training:
        """The other folds' pairs; `size` of them evenly spaced."""
        if size is not None:
            train = self._folds[fold].train
            some = [train[i * len(train) // size] for i in range(size)]
            return Training(fold, some)
        if fold not in self._trainings:
            train, folder = self._folds[fold].train, self._options.folder
            # Named by what it learned: with other folds, it would know what it is tested on.
            kept = folder / "trained" / _digest(repr(train).encode())[:16] if folder else None
            self._trainings[fold] = Training(fold, train, kept)
        return self._trainings[fold]

    def request(self, item: Pair, hide_draft: bool) -> Request:
        """The pair's question and, unless hidden, its draft."""
        return request_of(item, hide_draft)

    def answer(self, item: Pair) -> Sequence[int]:
        """As it was recorded."""
        return item.target

    def decode(
        self, drafter: Drafter, item: Pair, rows: int, hide_draft: bool
    ) -> Sequence[ReplayRound]:
        """See `replay`."""
        request = self.request(item, hide_draft)
        return replay(drafter, item.target, rows, request, self._options.backend)

    def facts(self) -> dict[str, object]:
        """Numbers of answers, and what the files hold, for the fingerprint of a run."""
        files = [self._options.pairs, self._options.train]
        return {
            "kind": "recorded",
            "answers": sum(len(fold.test) for fold in self._folds),
            "training_answers": [len(fold.train) for fold in self._folds],
            "sha256": [_digest(read_bytes(Path(path))) for path in files if path],
        }


def _digest(content: bytes) -> str:
    return sha256(content).hexdigest()
