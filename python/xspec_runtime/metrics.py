"""What the figures mean: one definition each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence


def tokens_per_verify(emitted: int, verifies: int) -> float:
    """Tokens emitted after the given first token, a verify; 1 is plain decoding.

    A verify emits what it accepts and one token of its own, less what lies beyond the answer's end.

    Raises:
        ValueError: `verifies` is not positive.
    """
    if verifies < 1:
        raise ValueError(f"tokens_per_verify needs at least one verify, got {verifies}")
    return emitted / verifies


def acceptance_rate(accepted: int, drafted: int) -> float | None:
    """Accepted draft tokens / proposed ones; root and bonus tokens are neither. None if none were
    proposed.

    In a tree all nodes but the root count as proposed, so siblings lower it: compare it between
    chains of one length, and trees by `tokens_per_verify` or `gain`.
    """
    return accepted / drafted if drafted else None


def accept_histogram(accepted: Iterable[int]) -> dict[int, int]:
    """Verifies that accepted 0, 1, ... draft tokens, without gaps up to the largest."""
    counts = Counter(accepted)
    return {k: counts[k] for k in range(max(counts, default=-1) + 1)}


def gain(per_verify: float, v_rows: float, v_one: float) -> float:
    """`per_verify` / (v(M) / v(1)): speed-up of the decode phase if drafting cost nothing.

    Args:
        per_verify: tokens per verify of M rows.
        v_rows: time of a forward over those M rows.
        v_one: time of a forward over one row, same unit and mode.

    Raises:
        ValueError: a time is not positive.
    """
    if not (v_rows > 0 and v_one > 0):
        raise ValueError(f"times must be positive, got v(M) = {v_rows} and v(1) = {v_one}")
    return per_verify * v_one / v_rows


def position_match(draft: Sequence[int], target: Sequence[int], start: int = 1) -> float | None:
    """Share of the target's positions from `start` at which the draft has the same token.

    A position that the draft does not reach is a miss; by default the given first token is left
    out. None if the target has no such position.
    """
    positions = len(target) - start
    if positions < 1:
        return None
    same = sum(d == t for d, t in zip(draft[start:], target[start:], strict=False))
    return same / positions
