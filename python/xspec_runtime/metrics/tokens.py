"""Texts compared position by position. None of these figures is a speedup, or even an acceptance:
a verify stops at its first miss.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import takewhile


def without_bos(tokens: Sequence[int], bos: int = 1) -> Sequence[int]:
    """`tokens` less the beginning-of-sequence id in front, where there is one.

    Both models put it there, so it always matches and never is a prediction.
    """
    return tokens[1:] if tokens and tokens[0] == bos else tokens


def position_match(draft: Sequence[int], target: Sequence[int], start: int = 1) -> float | None:
    """Share of the target's positions from `start` at which the draft has the same token.

    A position that the draft does not reach is a miss; by default the given first token is left
    out, which a beginning-of-sequence id is too. None if the target has no such position.
    """
    positions = len(target) - start
    return sum(_matches(draft[start:], target[start:])) / positions if positions > 0 else None


def match_rate(draft: Sequence[int], target: Sequence[int], shift: int = 0) -> float | None:
    """Share of positions with ``draft[i] == target[i + shift]``, over the shorter of both texts.

    With `shift` 1 the draft is read as predictions of the next token. None where nothing overlaps.
    """
    same = _matches(draft, target[shift:])
    return sum(same) / len(same) if same else None


def consecutive_matches(draft: Sequence[int], target: Sequence[int], shift: int = 0) -> int:
    """Tokens from the first on with ``draft[i] == target[i + shift]``, up to the first miss."""
    return sum(takewhile(bool, _matches(draft, target[shift:])))


def first_token_accuracy(
    pairs: Iterable[tuple[Sequence[int], Sequence[int]]], shift: int = 0
) -> float | None:
    """Share of (draft, target) pairs with ``draft[0] == target[shift]``; an empty draft misses.
    Targets that have no such token do not count. None if none has.
    """
    hits = [draft[:1] == target[shift : shift + 1] for draft, target in pairs if target[shift:]]
    return sum(hits) / len(hits) if hits else None


def top_k_accuracy(
    ranked: Iterable[Sequence[int]], tokens: Iterable[int], k: int = 1
) -> float | None:
    """Share of positions at which the token is among the first `k` of those proposed there, best
    first. A position without proposals misses. None without positions.

    Raises:
        ValueError: `k` is not positive, or there are more positions of one kind than of the other.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    hits = [token in best[:k] for best, token in zip(ranked, tokens, strict=True)]
    return sum(hits) / len(hits) if hits else None


def _matches(draft: Sequence[int], target: Sequence[int]) -> list[bool]:
    return [d == t for d, t in zip(draft, target, strict=False)]
