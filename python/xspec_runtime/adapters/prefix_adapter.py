"""PrefixAdapter: the draft's text and the target's verified prefix to the target's next tokens.

A bidirectional encoder reads the draft's text once a request; one decoder layer continues the
target's answer, attending to its own prefix and to that text. Before the layer every token is mixed
with the few before it, so that one layer can tell phrases apart.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from .base import PAD, AdapterConfig, encoder_layer
from .prefix_steps import PrefixProposer


@dataclass(frozen=True)
class PrefixAdapterConfig(AdapterConfig):
    """Sizes of a PrefixAdapter; the head shares the embedding's weights.

    Attributes:
        encoder_layers: over the draft's text.
        draft_positions: ids of the draft's text that are read.
        positions: tokens of the target's answer that can be continued.
        window: tokens mixed before the decoder layer, the current one included.
    """

    vocab_size: int
    width: int = 128
    heads: int = 2
    intermediate: int = 256
    encoder_layers: int = 1
    draft_positions: int = 128
    positions: int = 128
    window: int = 4
    dropout: float = 0.1


class PrefixAdapter(nn.Module):
    """Logits of the target's token at `alignment.target_position` of every prefix position."""

    kind = "prefix"

    def __init__(self, config: PrefixAdapterConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.embed = nn.Embedding(config.vocab_size, width)
        self.draft_position = nn.Embedding(config.draft_positions, width)
        self.position = nn.Embedding(config.positions, width)
        layer = encoder_layer(config, config.intermediate, norm_first=True)
        self.encoder = nn.TransformerEncoder(
            layer, config.encoder_layers, nn.LayerNorm(width), enable_nested_tensor=False
        )
        # Row k weighs the token k places back.
        self.mix = nn.Parameter(torch.full((config.window, width), 0.5 / config.window))
        self.self_norm, self.cross_norm, self.mlp_norm, self.norm = (
            nn.LayerNorm(width) for _ in range(4)
        )
        self.self_in = nn.Linear(width, 3 * width)
        self.self_out = nn.Linear(width, width)
        self.cross_query = nn.Linear(width, width)
        self.cross_in = nn.Linear(width, 2 * width)
        self.cross_out = nn.Linear(width, width)
        self.up = nn.Linear(width, config.intermediate)
        self.down = nn.Linear(config.intermediate, width)
        self.dropout = nn.Dropout(config.dropout)
        with torch.no_grad():
            self.mix[0] = 1.0
        for table in (self.embed, self.draft_position, self.position):
            nn.init.normal_(table.weight, std=width**-0.5)

    def encode(self, draft: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Draft ids ``[B, L]``, padded behind -> memory ``[B, L, width]`` and bool ``[B, L]``:
        what may be attended to.

        The first position always may, so a hidden draft (nothing but padding) is one padding id.
        """
        length = draft.shape[1]
        if not 1 <= length <= self.config.draft_positions:
            raise ValueError(
                f"draft must have from 1 to {self.config.draft_positions} ids, got {length}"
            )
        keep = draft != PAD
        keep[:, 0] = True
        x = self.embed(draft) + self.draft_position.weight[:length]
        return self.encoder(x, src_key_padding_mask=~keep), keep

    def forward(self, draft: torch.Tensor, prefix: torch.Tensor) -> torch.Tensor:
        """Draft ids ``[B, L]`` and target ids ``[B, T]`` -> logits ``[B, T, V]``.

        Row i sees the whole draft and the target's tokens up to i.
        """
        length = prefix.shape[1]
        if not 1 <= length <= self.config.positions:
            raise ValueError(
                f"prefix must have from 1 to {self.config.positions} ids, got {length}"
            )
        memory, keep = self.encode(draft)
        x = self.mixed(F.pad(prefix, (self.config.window - 1, 0), value=PAD))
        x = self.dropout(x + self.position.weight[:length])
        query, key, value = map(self._heads, self.self_in(self.self_norm(x)).chunk(3, -1))
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.dropout(self.self_out(seen.transpose(1, 2).flatten(2)))
        key, value = map(self._heads, self.cross_in(memory).chunk(2, -1))
        query = self._heads(self.cross_query(self.cross_norm(x)))
        seen = F.scaled_dot_product_attention(query, key, value, attn_mask=keep[:, None, None])
        x = x + self.dropout(self.cross_out(seen.transpose(1, 2).flatten(2)))
        x = x + self.dropout(self.down(F.gelu(self.up(self.mlp_norm(x)))))
        return F.linear(self.norm(x), self.embed.weight)

    def mixed(self, ids: torch.Tensor) -> torch.Tensor:
        """Ids ``[..., window - 1 + T]`` -> the weighted sum of every token and those before it,
        ``[..., T, width]``."""
        window = self.config.window
        length = ids.shape[-1] - window + 1
        x = self.embed(ids)
        return sum(
            x[..., window - 1 - k : window - 1 - k + length, :] * self.mix[k] for k in range(window)
        )

    def proposer(self) -> PrefixProposer:
        """Runtime use, see `PrefixProposer`."""
        return PrefixProposer(self)

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.config.heads, -1)).transpose(1, 2)
