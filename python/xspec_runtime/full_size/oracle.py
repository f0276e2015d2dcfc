"""Accepted lengths that were recorded somewhere, one a verify."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..data.pairs import read_pairs
from ..drafters.base import MAX_ROWS
from ..drafters.memory import NgramMemory
from ..drafters.ngram import NgramDrafter
from ..files import read_text
from ..metrics import consecutive_matches
from ..replay.run import replay


@dataclass(frozen=True, slots=True)
class Oracle:
    """Accepted lengths, in turn and then from the first on again.

    Attributes:
        source: where they come from, for reports.
    """

    source: str
    accepted: Sequence[int]

    def __getitem__(self, number: int) -> int:
        return self.accepted[number % len(self.accepted)]

    @property
    def mean(self) -> float:
        """Of all lengths."""
        return sum(self.accepted) / len(self.accepted)


def read_oracle(path: Path, rows: int, seed: int = 0) -> Oracle:
    """JSON lines, each a length or an object with one under `accepted` (the --trace of bench/e2e.py
    and bench/replay.py), or one JSON object of counts by length, whose draws `seed` puts in order.

    Args:
        rows: of the verifies that they are imposed on; a longer length has no room.

    Raises:
        FileNotFoundError: there is no file.
        ValueError: a line is neither, a length is out of range, or several arms are mixed.
    """
    lines = [line for line in read_text(path, "oracle").splitlines() if line.strip()]
    counts = _counts(lines)
    if counts is not None:
        accepted = [n for n, count in counts.items() for _ in range(count)]
        random.Random(seed).shuffle(accepted)
    else:
        accepted, arms = [], set()
        for number, line in enumerate(lines, 1):
            try:
                value = json.loads(line)
                if isinstance(value, dict):
                    arms.add((str(value.get("drafter")), str(value.get("rows"))))
                    value = value["accepted"]
                if type(value) is not int or value < 0:
                    raise ValueError
            except (ValueError, KeyError, RecursionError):
                raise ValueError(
                    f"{path}, line {number}: expected an accepted length or an object with one "
                    f"under `accepted`, got {line[:60]!r}"
                ) from None
            accepted.append(value)
        if len(arms) > 1:
            raise ValueError(f"{path} mixes {len(arms)} arms, expected rounds of one")
    if not accepted:
        raise ValueError(f"{path} holds no accepted lengths")
    if max(accepted) >= rows:
        raise ValueError(
            f"{path} has {max(accepted)} accepted tokens, expected less than the {rows} rows"
        )
    return Oracle(str(path), accepted)


def oracles_of_pairs(path: Path, rows: int, gamma: int) -> tuple[Oracle, Oracle]:
    """Of recorded answers of both models: a memory that learns them one after another, as a tree,
    and the draft's own text against the target's, a chain of `gamma` from its first token on.

    Raises:
        FileNotFoundError: there is no file.
        ValueError: it holds no such answers.
    """
    pairs = [pair for pair in read_pairs(path) if pair.target]
    memory, trees, chains = NgramDrafter(NgramMemory(), online=True), [], []
    for pair in pairs:
        trees += [r.accepted for r in replay(memory, pair.target, rows)]
        chains.append(consecutive_matches(pair.draft[:gamma], pair.target))
    if not trees:
        raise ValueError(f"{path} holds no answer of two tokens or more")
    source = f"{path.name}, {len(pairs)} recorded answers"
    return (
        Oracle(f"memory of {rows} rows that learns {source}", trees),
        Oracle(f"draft's text in {source}", chains),
    )


def made_up(rows: int, seed: int) -> Oracle:
    """Random lengths that stand for nothing: for walking through the code."""
    rng = random.Random(seed)
    return Oracle(
        f"made up from seed {seed}, not recorded", [rng.randrange(rows) for _ in range(64)]
    )


def _counts(lines: Sequence[str]) -> dict[int, int] | None:
    """Runs by accepted length, where the whole file is one object of nothing else."""
    try:
        value = json.loads("\n".join(lines))
        if not isinstance(value, dict) or not value:
            return None
        counts = {int(key): count for key, count in value.items()}
    except (ValueError, RecursionError):
        return None
    fits = all(0 <= n < MAX_ROWS for n in counts)
    if not fits or any(type(c) is not int or not 0 <= c <= 10**6 for c in counts.values()):
        return None
    return counts
