"""Settings of a speculative decoder."""

from __future__ import annotations

from dataclasses import dataclass

from .drafters.base import MAX_ROWS


@dataclass(frozen=True, slots=True)
class SpecConfig:
    """How one decoder runs.

    Attributes:
        rows: rows of a verify, root included; 1 is plain decoding. A chain of gamma drafts has
            gamma + 1.
        max_new_tokens: tokens emitted at most, end-of-sequence included.
        eos_token_ids: tokens that end the answer.
    """

    rows: int = 16
    max_new_tokens: int = 128
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.rows <= MAX_ROWS:
            raise ValueError(f"rows must be in 1..{MAX_ROWS}, got {self.rows}")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")

    @classmethod
    def chain(cls, gamma: int, **kwargs) -> SpecConfig:
        """A chain of `gamma` draft tokens a round."""
        if not 1 <= gamma < MAX_ROWS:
            raise ValueError(f"gamma must be in 1..{MAX_ROWS - 1}, got {gamma}")
        return cls(rows=gamma + 1, **kwargs)
