"""Recorded pairs made up for tests."""

from __future__ import annotations

import json
import random
from pathlib import Path


def write_pairs(path: Path, rng: random.Random, count: int, agree: float, **extra) -> Path:
    """`count` answers made of few phrases, whose drafts hold about `agree` of their tokens.

    Args:
        extra: further keys; a function gets the row's number.
    """
    phrases = [[rng.randrange(9, 40) for _ in range(6)] for _ in range(6)]
    lines = []
    for i in range(count):
        target = [7] + [t for p in rng.choices(phrases, k=rng.randint(2, 4)) for t in p]
        draft = [t if rng.random() < agree else 5 for t in target][: rng.randint(12, 25)]
        row = {"sample_idx": 3 * i, "egpt_tokens": draft, "vl_tokens": target}
        row |= {key: value(i) if callable(value) else value for key, value in extra.items()}
        lines.append(json.dumps(row) + "\n")
    path.write_text("".join(lines))
    return path
