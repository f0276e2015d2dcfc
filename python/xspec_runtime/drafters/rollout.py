"""Chains of an adapter that reads the verified prefix, with keys and values kept between rounds.

A round feeds the rows that were committed since the one before, in one pass, and then one row a
step. Rows of a chain are dropped when the next round begins, the accepted ones too: what stands in
them is predicted, and the target has said the true one meanwhile. Arithmetic differs from the
network's own in rounding only; the target decides every token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn

from ..adapters.eagle import EagleFusion
from ..adapters.hidden import READS_DRAFT, HiddenAdapter

TargetSource = Callable[[int], torch.Tensor]


class Rollout(Protocol):
    """Logits of one token after the other, from a verified prefix on."""

    def begin(self, draft: torch.Tensor | None) -> None:
        """A request starts, with the draft's states ``[L, De]``; zeros stand behind their end, and
        everywhere where there are none.
        """

    def after(self, context: Sequence[int]) -> torch.Tensor:
        """Logits ``[V]`` behind the answer so far, which extends that of the call before."""

    def then(self, token: torch.Tensor) -> torch.Tensor:
        """Logits ``[V]`` behind one token more, int64 ``[]``, that the target has not said."""


class CachedLayers:
    """Causal pre-norm layers, batch 1, that keep the keys and values of the rows they were fed.

    Args:
        layers: `nn.TransformerEncoderLayer` with `norm_first` and GELU, or blocks of L5.
        positions: rows at most; their memory is taken here, once.

    Attributes:
        length: rows kept. Set it back to drop the last ones.
    """

    def __init__(self, layers: Iterable[nn.Module], positions: int) -> None:
        self.length = 0
        self._layers = [_parts(layer) for layer in layers]
        self._rows, self._heads = [], []
        for _, attention, *_ in self._layers:
            rows = attention.in_proj_weight.new_empty(positions, 3 * attention.embed_dim)
            heads = rows.view(positions, 3, attention.num_heads, -1).permute(1, 2, 0, 3)
            self._rows.append(rows)
            self._heads.append(heads[:, None].unbind())

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Feed ``[n, W]`` behind the rows kept; what the last layer gives for the last, ``[1, W]``.

        Raises:
            ValueError: there is no room for so many.
        """
        start, end = self.length, self.length + len(x)
        if end > len(self._rows[0]):
            raise ValueError(f"at most {len(self._rows[0])} rows can be fed, got {end}")
        for i, (norm, attention, inner_norm, up, down) in enumerate(self._layers):
            queries, keys, values = self._heads[i]
            torch.addmm(attention.in_proj_bias, norm(x), attention.in_proj_weight.T,
                        out=self._rows[i][start:end])  # fmt: skip
            # Of the last layer, rows but the last are only looked at.
            first = end - 1 if i + 1 == len(self._layers) else start
            mask = None
            if end - first > 1:
                mask = torch.ones(end - first, end, dtype=torch.bool, device=x.device).tril(first)
            seen = F.scaled_dot_product_attention(
                queries[:, :, first:end], keys[:, :, :end], values[:, :, :end], attn_mask=mask
            )
            out = attention.out_proj
            mixed = seen[0].transpose(0, 1).reshape(end - first, -1)
            x = x[first - start :] + F.linear(mixed, out.weight, out.bias)
            x = x + down(F.gelu(up(inner_norm(x))))
        self.length = end
        return x


class StateRollout:
    """B1 and L5F: the state predicted last stands for the one that the target has not computed.

    Args:
        head: the target's language-model head ``[V, D]``, of the adapter's type and device.
        target: the first states of the answer, see `TappedTarget.states`.
    """

    def __init__(self, adapter: HiddenAdapter, head: torch.Tensor, target: TargetSource) -> None:
        self._project, self._body = adapter.project, adapter.body
        self._layers = CachedLayers(adapter.body.blocks, adapter.config.positions)
        self._fused = adapter.config.level in READS_DRAFT
        self._head, self._target = head, target
        if self._fused:
            with torch.inference_mode():
                self._behind = self._besides(head.new_zeros(1, adapter.config.draft_width))
        self.begin(None)

    @torch.inference_mode()
    def begin(self, draft: torch.Tensor | None) -> None:
        """See `Rollout.begin`."""
        self._committed = 0
        if self._fused:
            self._beside = _ended(self._besides, draft, self._behind)

    def after(self, context: Sequence[int]) -> torch.Tensor:
        """See `Rollout.after`; raises what the target's source does."""
        states = self._target(len(context))
        start = self._layers.length = min(self._committed, len(context) - 1)
        logits = self._feed(states[start:].to(self._head))
        self._committed = len(context)
        return logits

    def then(self, token: torch.Tensor) -> torch.Tensor:
        """See `Rollout.then`; the state says more than the token, which is not read."""
        return self._feed(self._state)

    def _besides(self, draft: torch.Tensor) -> torch.Tensor:
        return self._body.beside(self._project(draft))

    def _feed(self, states: torch.Tensor) -> torch.Tensor:
        start, read = self._layers.length, states
        if self._fused:
            read = self._body.fuse(_held(self._beside, start, len(states)), states)
        x = self._layers(self._body.enter(read, start))
        self._state = self._body.leave(x, states[-1:])
        return torch.mv(self._head, self._state[0])


class TokenRollout:
    """EAGLE: the tokens of the chain stand for those that the target has not said."""

    def __init__(self, adapter: EagleFusion) -> None:
        self._adapter = adapter
        self._layers = CachedLayers(adapter.layers.layers, adapter.config.positions)
        weight = adapter.join.weight
        self._device = weight.device
        with torch.inference_mode():
            self._behind = adapter.beside(weight.new_zeros(1, adapter.config.draft_width))
        self.begin(None)

    @torch.inference_mode()
    def begin(self, draft: torch.Tensor | None) -> None:
        """See `Rollout.begin`."""
        self._committed = 0
        self._beside = _ended(self._adapter.beside, draft, self._behind)

    def after(self, context: Sequence[int]) -> torch.Tensor:
        """See `Rollout.after`."""
        start = self._layers.length = min(self._committed, len(context) - 1)
        logits = self._feed(torch.tensor(context[start:], device=self._device))
        self._committed = len(context)
        return logits

    def then(self, token: torch.Tensor) -> torch.Tensor:
        """See `Rollout.then`."""
        return self._feed(token[None])

    def _feed(self, tokens: torch.Tensor) -> torch.Tensor:
        adapter, start = self._adapter, self._layers.length
        x = self._layers(adapter.enter(tokens, _held(self._beside, start, len(tokens)), start))
        return adapter.head(adapter.norm(x))[0]


def _parts(layer: nn.Module) -> tuple[nn.Module, ...]:
    """Norm, attention, norm, and the two products of the feed-forward part."""
    if isinstance(layer, nn.TransformerEncoderLayer):
        return layer.norm1, layer.self_attn, layer.norm2, layer.linear1, layer.linear2
    return layer.attention_norm, layer.attention, layer.inner_norm, layer.inner[0], layer.inner[3]


def _ended(
    beside: Callable[[torch.Tensor], torch.Tensor],
    draft: torch.Tensor | None,
    behind: torch.Tensor,
) -> torch.Tensor:
    """What `beside` gives for the draft, and `behind`, which `_held` repeats for all after it."""
    return behind if draft is None else torch.cat([beside(draft), behind])


def _held(table: torch.Tensor, start: int, count: int) -> torch.Tensor:
    """Rows of `count` positions from `start` on; the last row of `table` stands for all behind."""
    last = len(table) - 1
    if start >= last:
        return table[last:].expand(count, -1)
    behind = max(start + count - len(table), 0)
    return torch.cat([table[start : start + count], table[last:].expand(behind, -1)])
