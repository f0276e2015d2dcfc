"""What the figures mean: one definition each.

`tokens` compares texts position by position, `decoding` counts what verification gave, `similarity`
says how alike vectors are (which is no acceptance), `published` reproduces the figures and keys of
the public research repository.
"""

from __future__ import annotations

from .decoding import (
    OPENING_TOKENS,
    accept_histogram,
    acceptance_by_depth,
    acceptance_rate,
    accepted_prefix,
    expected_tokens,
    gain,
    mean_of_ratios,
    speedup_of_totals,
    tokens_per_verify,
)
from .published import VerifyCost, published_acceptance, published_run, verify_cost
from .similarity import accept_at, consecutive_similar, cosine, published_similarity
from .tokens import (
    consecutive_matches,
    first_token_accuracy,
    match_rate,
    position_match,
    top_k_accuracy,
    without_bos,
)

__all__ = [
    "OPENING_TOKENS",
    "VerifyCost",
    "accept_at",
    "accept_histogram",
    "acceptance_by_depth",
    "acceptance_rate",
    "accepted_prefix",
    "consecutive_matches",
    "consecutive_similar",
    "cosine",
    "expected_tokens",
    "first_token_accuracy",
    "gain",
    "match_rate",
    "mean_of_ratios",
    "position_match",
    "published_acceptance",
    "published_run",
    "published_similarity",
    "speedup_of_totals",
    "tokens_per_verify",
    "top_k_accuracy",
    "verify_cost",
    "without_bos",
]
