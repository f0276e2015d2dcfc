"""Settings of a speculative decoder."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from itertools import pairwise
from numbers import Integral
from typing import Any

from .drafters.base import MAX_ROWS

PREFILL_FUSED = ("off", "exact", "fast")


@dataclass(frozen=True, slots=True)
class SpecConfig:
    """How one decoder runs.

    Attributes:
        rows: rows of a verify, root included; 1 is plain decoding. A chain of gamma drafts has
            gamma + 1.
        max_new_tokens: tokens emitted at most, end-of-sequence included.
        eos_token_ids: tokens that end the answer.
        prefill_fused: what becomes of drafts that exist when the target prefills. "exact": the
            prefill is as without them, they seed the trees of the rounds after it. "fast": they
            ride in the prefill as extra rows and are verified there; equal tokens outside near
            ties. "off": they are not used.
        pad_rows: heights that trees are filled up to with inert rows, ascending, so that few
            shapes occur; a taller tree and a plain step stay as they are. `(16, 32, 64)` gives a
            compiled model three shapes, `targets.heights.cheap_heights` measures ones that cost no
            time.
        temperature: 0 is greedy decoding; else tokens are sampled, see
            `xspec_kernels.sample_tokens`.
        top_k, top_p: tokens sampled from; 0 and 1.0 are all.
        seed: of the draws. The same seed and prompt give the same answer, so vary it; prompts of a
            batch draw different numbers.
    """

    rows: int = 16
    max_new_tokens: int = 128
    eos_token_ids: tuple[int, ...] = ()
    prefill_fused: str = "exact"
    pad_rows: tuple[int, ...] = ()
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises `ValueError` naming the first field that is wrong."""
        for name in ("rows", "max_new_tokens", "top_k", "seed"):
            if not isinstance(getattr(self, name), Integral):
                raise ValueError(f"{name} must be an integer, got {getattr(self, name)!r}")
        ends = self.eos_token_ids
        if not isinstance(ends, Collection) or not all(isinstance(end, Integral) for end in ends):
            raise ValueError(f"eos_token_ids must be token ids as in (2,), got {ends!r}")
        if not 1 <= self.rows <= MAX_ROWS:
            raise ValueError(f"rows must be in 1..{MAX_ROWS}, got {self.rows}")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if self.prefill_fused not in PREFILL_FUSED:
            raise ValueError(
                f"prefill_fused must be one of {', '.join(PREFILL_FUSED)}, "
                f"got {self.prefill_fused!r}"
            )
        heights = (1, *self.pad_rows, MAX_ROWS + 1)
        if any(low >= high for low, high in pairwise(heights)):
            raise ValueError(f"pad_rows must ascend within 2..{MAX_ROWS}, got {self.pad_rows}")
        if self.temperature != 0 and not 1e-6 <= self.temperature <= 1e6:
            raise ValueError(f"temperature must be 0 or in 1e-6..1e6, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (all) or more, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")

    @classmethod
    def chain(cls, gamma: int, **kwargs: Any) -> SpecConfig:
        """A chain of `gamma` draft tokens a round."""
        if not 1 <= gamma < MAX_ROWS:
            raise ValueError(f"gamma must be in 1..{MAX_ROWS - 1}, got {gamma}")
        return cls(rows=gamma + 1, **kwargs)

    def height(self, rows: int) -> int:
        """Rows of the forward pass that verifies a tree of `rows`."""
        if rows > 1:
            for height in self.pad_rows:
                if height >= rows:
                    return height
        return rows

    def cut(self, tokens: list[int], emitted: int) -> list[int]:
        """`tokens` without what follows an end-of-sequence token or exceeds the budget, of which
        `emitted` are used.
        """
        tokens = tokens[: self.max_new_tokens - emitted]
        for i, token in enumerate(tokens):
            if token in self.eos_token_ids:
                return tokens[: i + 1]
        return tokens

    def done(self, tokens: list[int]) -> bool:
        """Whether the answer `tokens` is complete."""
        return len(tokens) >= self.max_new_tokens or tokens[-1] in self.eos_token_ids
