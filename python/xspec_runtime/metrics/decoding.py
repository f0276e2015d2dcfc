"""What verification gave: tokens a verify, acceptance, gain, speedups."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import fmean

# Tokens of an answer that are nearly always the same. Figures "after" them count the verifies that
# start with so many or more known tokens.
OPENING_TOKENS = 10


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


def acceptance_by_depth(accepted: Iterable[int], proposed: Iterable[int]) -> list[float]:
    """For depth 1, 2, ...: verifies that accepted a draft there / those that proposed one there and
    had accepted everything above.

    Args:
        accepted: draft tokens accepted, one number a verify.
        proposed: depth of what was proposed below the accepted path (of a chain its length), one
            number a verify.

    Returns:
        As many as there are depths at which anything was at stake.

    Raises:
        ValueError: a verify accepted more than it proposed, or the numbers of verifies differ.
    """
    hits: Counter[int] = Counter()
    stakes: Counter[int] = Counter()
    for got, offered in zip(accepted, proposed, strict=True):
        if not 0 <= got <= offered:
            raise ValueError(f"{got} of {offered} proposed tokens cannot have been accepted")
        hits.update(range(1, got + 1))
        stakes.update(range(1, min(got + 1, offered) + 1))
    return [hits[depth] / stakes[depth] for depth in range(1, max(stakes, default=0) + 1)]


def accepted_prefix(first_accepted: Sequence[int]) -> float | None:
    """Draft tokens that the first verify of an answer accepts, on average; None without answers."""
    return fmean(first_accepted) if first_accepted else None


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


def expected_tokens(alpha: float, gamma: int) -> float:
    """(1 - alpha^(gamma + 1)) / (1 - alpha): tokens of a verify of a chain of `gamma` drafts, each
    accepted with chance `alpha` independently of the others.

    Tokens, not a speedup: what drafting and a taller verify cost is not in it
    (https://arxiv.org/abs/2211.17192, equation 1).

    Raises:
        ValueError: `alpha` is not a chance, or `gamma` is negative.
    """
    if not 0 <= alpha <= 1 or gamma < 0:
        raise ValueError(
            f"alpha must be from 0 to 1 and gamma not negative, got {alpha} and {gamma}"
        )
    return sum(alpha**depth for depth in range(gamma + 1))


def speedup_of_totals(plain: Sequence[float], ours: Sequence[float]) -> float:
    """Summed time of plain decoding / summed time of ours, on the same samples.

    Raises:
        ValueError: no samples, not as many of both, or a time that is not positive.
    """
    _check_times(plain, ours)
    return sum(plain) / sum(ours)


def mean_of_ratios(plain: Sequence[float], ours: Sequence[float]) -> float:
    """Mean over samples of plain time / our time; raises like `speedup_of_totals`.

    Samples that were sped up a lot weigh more than they save time: report it beside
    `speedup_of_totals`, never instead.
    """
    _check_times(plain, ours)
    return fmean(p / o for p, o in zip(plain, ours, strict=True))


def _check_times(plain: Sequence[float], ours: Sequence[float]) -> None:
    if not plain or len(plain) != len(ours):
        raise ValueError(
            "a speedup needs times of the same samples, one or more, got "
            f"{len(plain)} of plain decoding and {len(ours)} of ours"
        )
    if min(*plain, *ours) <= 0:
        raise ValueError(f"times must be positive, got one of {min(*plain, *ours)}")
