"""EAGLE fusion: the draft's states and the target's own last tokens, to the target's next token.

The published network (https://github.com/xifan-zhang/EventGPT, `feasible/token_alignment`) with the
two faults that kept it from running removed: layers after the first read what the one before
wrote, and a state is told its place. Idea: EAGLE, https://arxiv.org/abs/2401.15077.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from .base import AdapterConfig, encoder_layer


@dataclass(frozen=True)
class EagleConfig(AdapterConfig):
    """Sizes; the defaults are the published ones.

    Attributes:
        width: inside; `token_width` of token embeddings, `draft_width` of the draft's states.
        layers: any number.
        positions: tokens of an answer that are told apart.
    """

    vocab_size: int = 32000
    width: int = 1024
    token_width: int = 4096
    draft_width: int = 4096
    layers: int = 2
    heads: int = 8
    positions: int = 512
    dropout: float = 0.1


class EagleFusion(nn.Module):
    """Logits of the target's token at `alignment.target_position` of every position read."""

    kind = "eagle"

    def __init__(self, config: EagleConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.token_width)
        self.join = nn.Linear(config.token_width + config.draft_width, config.width)
        self.position = nn.Embedding(config.positions, config.width)
        layer = encoder_layer(config, 4 * config.width, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, config.layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocab_size)
        self.feature = nn.Linear(config.width, config.token_width)
        nn.init.normal_(self.embed.weight, std=config.token_width**-0.5)
        nn.init.normal_(self.position.weight, std=0.02)
        for parameter in self.layers.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(self, tokens: torch.Tensor, draft: torch.Tensor) -> torch.Tensor:
        """Logits ``[B, S, V]``.

        Args:
            tokens: the target's ids ``[B, S]``.
            draft: draft states ``[B, S, draft_width]``, zeros where the draft is hidden or over.

        Raises:
            ValueError: the shapes differ, or there are more positions than are told apart.
        """
        return self.head(self.norm(self.fused(tokens, draft)))

    def fused(self, tokens: torch.Tensor, draft: torch.Tensor) -> torch.Tensor:
        """What the layers give, ``[B, S, width]``; `feature` of it is a target state."""
        length = tokens.shape[1]
        if draft.shape != (*tokens.shape, self.config.draft_width):
            raise ValueError(
                f"draft states must be {[*tokens.shape, self.config.draft_width]}, "
                f"got {list(draft.shape)}"
            )
        if length > self.config.positions:
            raise ValueError(f"at most {self.config.positions} tokens, got {length}")
        x = self.join(torch.cat([self.embed(tokens), draft.to(self.embed.weight.dtype)], -1))
        future = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        return self.layers(x + self.position.weight[:length], mask=future, is_causal=True)

    def beside(self, draft: torch.Tensor) -> torch.Tensor:
        """The share of draft states ``[S, draft_width]`` in what the layers read, once for all
        steps.
        """
        share = self.join.weight[:, self.config.token_width :]
        return nn.functional.linear(draft, share, self.join.bias)

    def enter(self, tokens: torch.Tensor, beside: torch.Tensor, start: int) -> torch.Tensor:
        """What the layers read ``[S, width]`` of ids ``[S]``, positions `start` and on, and of what
        `beside` gave for these.
        """
        share = self.join.weight[:, : self.config.token_width]
        x = torch.addmm(beside, self.embed(tokens), share.T)
        return x + self.position.weight[start : start + len(tokens)]
