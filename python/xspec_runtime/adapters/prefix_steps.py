"""Decoding steps of a PrefixAdapter, batch 1, with little between the matrix products.

One layer makes short work: only the last row's attention is ever wanted, earlier rows are keys and
values; mixing and positions are one sum of table rows; norms' weights are in the matrices behind
them; the draft's keys and values are multiplied once a request with what would meet them each step.
Arithmetic differs from the module's own in rounding only; the target decides every token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from .base import PAD, path_chain

if TYPE_CHECKING:
    from .prefix_adapter import PrefixAdapter


class PrefixProposer:
    """Continues the verified prefix greedily; rows of rejected tokens are overwritten."""

    @torch.inference_mode()
    def __init__(self, adapter: PrefixAdapter) -> None:
        config, a = adapter.config, adapter
        self._adapter, self._config = adapter, config
        self._shape = (config.width,)
        embed = a.embed.weight
        # A token's row for every place it can hold in the window, then the positions.
        self._table = torch.cat([*(embed * weight for weight in a.mix), a.position.weight])
        self._places = [k * config.vocab_size for k in range(config.window)]
        self._qkv = _behind_norm(a.self_norm, a.self_in.weight, a.self_in.bias)
        self._out = a.self_out.weight.T, a.self_out.bias
        query, shift = _behind_norm(a.cross_norm, a.cross_query.weight, a.cross_query.bias)
        self._cross_query = query.T.view(config.heads, -1, config.width)
        self._cross_shift = shift.view(config.heads, -1, 1)
        self._up = _behind_norm(a.mlp_norm, a.up.weight, a.up.bias)
        self._down = a.down.weight.T, a.down.bias
        self._head = _behind_norm(a.norm, embed, embed.new_zeros(len(embed)))
        self._rows = embed.new_zeros(config.positions, 3 * config.width)
        heads = self._rows.view(config.positions, 3, config.heads, -1).permute(1, 2, 0, 3)
        self._queries, self._keys, self._values = heads[:, None]
        self._fed: list[int] = []

    @torch.inference_mode()
    def begin(self, draft: Sequence[int]) -> None:
        """Encode `draft`, cut to the positions there are; a hidden one is one padding id."""
        a, config = self._adapter, self._config
        ids = list(draft[: config.draft_positions]) or [PAD]
        memory, _ = a.encode(torch.tensor([ids], device=self._rows.device))
        key, value = a.cross_in(memory[0]).view(len(ids), 2, config.heads, -1).permute(1, 2, 0, 3)
        key = key * key.shape[-1] ** -0.5
        self._cross = (
            (key @ self._cross_query).flatten(0, 1),
            (key @ self._cross_shift).flatten(),
        )
        out = a.cross_out.weight.T.view(config.heads, -1, config.width)
        # Each head's probabilities add up to one, so its share of the bias can ride on its values.
        self._read = (value @ out + a.cross_out.bias / config.heads).flatten(0, 1)
        self._fed = []

    @torch.inference_mode()
    def chain(
        self, context: Sequence[int], count: int, floor: float
    ) -> tuple[list[int], list[float]]:
        """See `Proposer.chain`; empty where the answer has outgrown the positions."""
        count = min(count, self._config.positions - len(context) + 1)
        if count < 1:
            return [], []
        pending = self._rewind(context)
        tokens: list[int] = []
        probabilities: list[float] = []
        score = 1.0
        while len(tokens) < count and score >= floor:
            best = self._step(pending).softmax(-1).max(-1)
            tokens.append(best.indices.item())
            probabilities.append(best.values.item())
            score *= probabilities[-1]
            pending = tokens[-1:]
        return path_chain(tokens, probabilities, floor)

    def _rewind(self, context: Sequence[int]) -> list[int]:
        """Forget fed tokens that `context` contradicts; returns its tokens not yet fed, at least
        one."""
        fed, same = self._fed, 0
        limit = min(len(fed), len(context) - 1)
        while same < limit and fed[same] == context[same]:
            same += 1
        del fed[same:]
        return list(context[same:])

    def _step(self, tokens: Sequence[int]) -> torch.Tensor:
        """Feed `tokens` behind those fed; logits ``[V]`` after the last."""
        start = len(self._fed)
        self._fed += tokens
        end, shape = len(self._fed), self._shape
        rows = torch.tensor([self._table_rows(i) for i in range(start, end)])
        x = F.embedding_bag(rows.to(self._table.device), self._table, mode="sum")
        weight, bias = self._qkv
        torch.addmm(bias, F.layer_norm(x, shape), weight, out=self._rows[start:end])
        seen = F.scaled_dot_product_attention(
            self._queries.narrow(2, end - 1, 1),
            self._keys.narrow(2, 0, end),
            self._values.narrow(2, 0, end),
        )
        weight, bias = self._out
        x = torch.addmm(x[-1:] + bias, seen.view(1, -1), weight)
        weight, bias = self._cross
        scores = torch.addmv(bias, weight, F.layer_norm(x[0], shape))
        shares = scores.view(self._config.heads, -1).softmax(-1)
        x = torch.addmm(x, shares.view(1, -1), self._read)
        weight, bias = self._up
        inner = F.gelu(torch.addmm(bias, F.layer_norm(x, shape), weight))
        weight, bias = self._down
        x = torch.addmm(x + bias, inner, weight)
        weight, bias = self._head
        return torch.addmm(bias, F.layer_norm(x, shape), weight)[0]

    def _table_rows(self, position: int) -> list[int]:
        """Rows of the table that add up to the input of the layer at `position`."""
        fed, window = self._fed, self._config.window
        if position + 1 >= window:
            recent = fed[position - window + 1 : position + 1]
        else:
            recent = [PAD] * (window - 1 - position) + fed[: position + 1]
        rows = [place + token for place, token in zip(self._places, reversed(recent), strict=True)]
        rows.append(window * self._config.vocab_size + position)
        return rows


def _behind_norm(
    norm: nn.LayerNorm, weight: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Matrix ``[in, out]`` and bias of a linear map with the scale and shift of the norm before."""
    return (weight * norm.weight).T.contiguous(), bias + weight @ norm.bias
