"""Where rows stand and what they see: positions after media, windows that slide along."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers import PreTrainedConfig, PreTrainedModel

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True, slots=True)
class Windows:
    """Masks of one model.

    Attributes:
        window: rows that a sliding layer sees, its own included; None: no layer slides.
        kinds: of layers, where the model takes a mask for each; else empty.
    """

    window: int | None
    kinds: tuple[str, ...]

    @classmethod
    def of(cls, model: PreTrainedModel) -> Windows:
        """Those of `model`.

        Raises:
            ValueError: layers are of another kind, or attention is capped, which SDPA cannot do.
        """
        text: PreTrainedConfig = model.config.get_text_config()
        kinds = tuple(sorted({*(getattr(text, "layer_types", None) or [])}))
        name = type(model).__name__
        if others := set(kinds) - {FULL, SLIDING}:
            raise ValueError(f"{name} uses {sorted(others)}, expected full or sliding attention")
        if getattr(text, "attn_logit_softcapping", None):
            raise ValueError(f"{name} caps its attention logits, expected plain attention")
        window = getattr(text, "sliding_window", None)
        if kinds and SLIDING not in kinds:
            window = None
        return cls(window, kinds if window else ())

    def masks(
        self, mask: torch.Tensor, rows: torch.Tensor, keys: torch.Tensor
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        """`mask` as the model takes it.

        Args:
            mask: additive ``[B, 1, N, S]`` of full attention.
            rows, keys: positions ``[B, N]`` of the rows and ``[B, S]`` of what they see.
        """
        if self.window is None:
            return mask
        far = rows[:, None, :, None] - keys[:, None, None, :] >= self.window
        near = mask.masked_fill(far, float("-inf"))
        if not self.kinds:
            return near
        return {kind: near if kind == SLIDING else mask for kind in self.kinds}


class Turn(NamedTuple):
    """How rows after a prompt are placed: media may take fewer positions than rows.

    Attributes:
        shifts: of the rotary axes' positions after the prompt against the number of its rows; none:
            there is one axis, counted by rows.
    """

    shifts: tuple[int, ...] = ()

    @classmethod
    def of(cls, inputs: Mapping[str, torch.Tensor]) -> Turn:
        """That of a prompt whose `position_ids`, if given with several axes, are ``[A, 1, L]``: of
        three that turn, where text goes on behind the farthest, or of the text's rows before them.
        """
        given = inputs.get("position_ids")
        if given is None or given.dim() < 3:
            return cls()
        behind = (given.amax((1, 2)) + 1 - given.shape[2]).tolist()
        return cls((*behind[:-3], *[max(behind[-3:])] * min(3, len(behind))))

    def positions(self, rows: torch.Tensor) -> torch.Tensor:
        """Row numbers ``[1, N]`` as the model takes them."""
        return torch.stack([rows + shift for shift in self.shifts]) if self.shifts else rows
