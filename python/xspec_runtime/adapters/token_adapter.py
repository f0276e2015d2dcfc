"""TokenAdapter: the draft's text, position by position, to the target's tokens.

The published network (https://github.com/xifan-zhang/EventGPT, `feasible/token_alignment`): token
and position embeddings, post-norm transformer layers under a causal mask, layer norm, linear head.
Its defaults here are the published sizes; a second published variant (`CONFIGURABLE`) has fewer
positions, a bias a token, and does not attend to padding. It never sees what the target has said,
so it can learn little beyond how answers usually run: read its figures beside those with the draft
hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from . import alignment
from .base import PAD, AdapterConfig, encoder_layer, path_chain

CONFIGURABLE = {"vocab_size": 32000, "positions": 64, "token_bias": True}


@dataclass(frozen=True)
class TokenAdapterConfig(AdapterConfig):
    """Sizes of a TokenAdapter.

    Attributes:
        positions: draft positions read, and with them the target positions predicted.
        tied: the head shares the embedding's weights and has no bias.
        token_bias: the logits get one more bias, and no position attends to padding.
    """

    vocab_size: int = 32010
    width: int = 512
    layers: int = 4
    heads: int = 8
    intermediate: int = 2048
    positions: int = 128
    dropout: float = 0.1
    tied: bool = False
    token_bias: bool = False


class TokenAdapter(nn.Module):
    """Logits of the target's token at `alignment.target_position` of every draft position."""

    kind = "token"

    def __init__(self, config: TokenAdapterConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.position = nn.Embedding(config.positions, config.width)
        layer = encoder_layer(config, config.intermediate)
        self.layers = nn.TransformerEncoder(layer, config.layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(config.width)
        self.head = None if config.tied else nn.Linear(config.width, config.vocab_size)
        self.token_bias = nn.Parameter(torch.zeros(config.vocab_size)) if config.token_bias else 0
        # Embeddings of unit variance would drown a tied head at the start.
        nn.init.normal_(self.embed.weight, std=config.width**-0.5)
        nn.init.normal_(self.position.weight, std=config.width**-0.5)
        for parameter in self.layers.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(self, draft: torch.Tensor) -> torch.Tensor:
        """Draft ids ``[B, L]``, L <= positions -> logits ``[B, L, V]``."""
        length = draft.shape[1]
        if length > self.config.positions:
            raise ValueError(f"draft must have at most {self.config.positions} ids, got {length}")
        x = self.embed(draft) + self.position.weight[:length]
        future = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        x = self.norm(self.layers(x, future, self._unread(draft), is_causal=True))
        logits = F.linear(x, self.embed.weight) if self.head is None else self.head(x)
        return logits + self.token_bias

    def _unread(self, draft: torch.Tensor) -> torch.Tensor | None:
        """What is not attended to, bool ``[B, L]``: padding, the first position never."""
        if not self.config.token_bias:
            return None
        padding = draft == PAD
        padding[:, 0] = False
        return padding

    def proposer(self) -> PositionProposer:
        """Runtime use, see `PositionProposer`."""
        return PositionProposer(self)


class PositionProposer:
    """Maps the draft's text once a request; then proposes what stands at the next positions.

    Positions are counted in the answer, whatever it says: one extra word there puts every later
    proposal in the wrong place, which is how the map was published.
    """

    def __init__(self, adapter: TokenAdapter) -> None:
        self._adapter = adapter
        self._tokens: list[int] = []
        self._probabilities: list[float] = []

    @torch.inference_mode()
    def begin(self, draft: Sequence[int]) -> None:
        """Map `draft`, cut or padded to all positions."""
        adapter, size = self._adapter, self._adapter.config.positions
        ids = [*draft[:size], *[PAD] * (size - len(draft))]
        device = adapter.embed.weight.device
        best = adapter(torch.tensor([ids], device=device))[0].float().softmax(-1).max(-1)
        self._tokens, self._probabilities = best.indices.tolist(), best.values.tolist()

    def chain(
        self, context: Sequence[int], count: int, floor: float
    ) -> tuple[list[int], list[float]]:
        """See `Proposer.chain`; empty behind the last position."""
        known = len(context)
        tokens = alignment.continuation(self._tokens, known, count)
        return path_chain(tokens, alignment.continuation(self._probabilities, known, count), floor)
