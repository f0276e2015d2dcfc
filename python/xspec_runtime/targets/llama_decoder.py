"""The Llama family's arithmetic on our own ops.

A layer of a verify is seven launches:

    skinny_linear (q, k, v)  rope_append  tree_attention (2)  skinny_linear (o, + x)
    skinny_linear (gate, up)  skinny_linear (down, + x)

The two norms of a layer are parts of the products around them: what makes x leaves the sums of its
squares, what takes it normalizes it, rounding where transformers does (`RowNorm`). Outside the
layers a verify is five launches: embed, the squares of its rows, the last norm, lm_head_argmax (2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from xspec_kernels import (
    NF4Weight,
    RowNorm,
    Workspace,
    embed,
    lm_head_argmax,
    nf4_linear,
    norm_act,
    prefill_linear,
    rope_append,
    rope_table,
    skinny_linear,
    tree_attention,
)

from .llama_rounds import Round
from .llama_weights import Layer, LlamaWeights, Matrix, inverse_frequencies

Caches = Sequence[tuple[torch.Tensor, torch.Tensor]]
"""(K, V) of every layer, each ``[B, H_kv, S, D]``."""


class Scored(NamedTuple):
    """What a forward pass found out about its B * N rows.

    Attributes:
        hidden: ``[B * N, D]``, the input of the language-model head.
        ids: int64 ``[B, N]``, the token after each row; None where logits are wanted.
        flags: int32 ``[B, N]``: 1 where the two best logits lie within 2 ulp, 2 for NaN; or None.
    """

    hidden: torch.Tensor
    ids: torch.Tensor | None
    flags: torch.Tensor | None


class LlamaDecoder:
    """The arithmetic: rows in, hidden rows out, K and V into caches. It knows of no request.

    Args:
        positions: rows of the rotary table, at least those of any cache.
    """

    def __init__(self, weights: LlamaWeights, positions: int, backend: str) -> None:
        self.weights, self.backend = weights, backend
        device, dtype = weights.embed.device, weights.embed.dtype
        frequencies = inverse_frequencies(weights.config, weights.shape.head_dim).to(device)
        self._turn = rope_table(frequencies, positions, dtype)
        self._workspace = Workspace(device)
        self._eps = weights.shape.eps
        half = device.type == "cuda" and dtype != torch.float32
        self._flash = flash_attention() if half else None

    def step(self, at: Round, caches: Caches) -> torch.Tensor:
        """Hidden rows ``[B * N, D]`` of draft trees; their K and V lie behind the committed ones
        of `caches`.
        """
        x = embed(at.tokens.view(-1), self.weights.embed, backend=self.backend)
        squares = None
        for layer, (k, v) in zip(self.weights.layers, caches, strict=True):
            x, squares = self._layer(layer, x, squares, at, k, v)
        return self._norm(x, self.weights.norm)

    def prefill(self, x: torch.Tensor, caches: Caches) -> torch.Tensor:
        """Hidden rows ``[R, D]`` of embedded ones; K and V go to slots 0 .. R - 1.

        Cut off the rows that count and `norm` them.
        """
        rows = x.shape[0]
        depth = torch.arange(rows, dtype=torch.int32, device=x.device)[None]
        start = depth.new_zeros(1)
        for layer, (k, v) in zip(self.weights.layers, caches, strict=True):
            qkv = self._many(self._norm(x, layer.input_norm), layer.qkv, layer.qkv_bias)
            q = self._rotate(layer, qkv, depth, start, k, v)
            x = x + self._many(self._causal(q, k, v), layer.o, layer.o_bias)
            gate_up = self._many(self._norm(x, layer.mlp_norm), layer.gate_up)
            gate, up = gate_up.unflatten(1, (-1, 2)).unbind(2)
            x = x + self._many(F.silu(gate) * up, layer.down)
        return x

    def norm(self, x: torch.Tensor) -> torch.Tensor:
        """The last norm, for what `prefill` gave."""
        return self._norm(x, self.weights.norm)

    def score(self, hidden: torch.Tensor, at: Round) -> Scored:
        """The token after each row; logits are compared as transformers rounds them."""
        found = lm_head_argmax(
            hidden, self.weights.head, at.linear_rows, round_to=hidden.dtype,
            workspace=self._workspace, backend=self.backend,
        )  # fmt: skip
        shape = at.tokens.shape
        return Scored(hidden, found.ids.view(shape), found.flags.view(shape))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[M, V]`` of hidden rows."""
        return self._linear(hidden, self.weights.head, None)

    def _layer(
        self,
        layer: Layer,
        x: torch.Tensor,
        squares: torch.Tensor | None,
        at: Round,
        k: torch.Tensor,
        v: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x behind the layer and its squares, as `RowNorm` wants them."""
        rows = at.linear_rows
        norm = RowNorm(layer.input_norm, self._eps, squares)
        qkv = self._linear(x, layer.qkv, rows, bias=layer.qkv_bias, norm=norm)
        q = self._rotate(layer, qkv, at.depth, at.cache_seqlens, k, v, at.num_rows)
        mixed = tree_attention(
            q, k, v, at.depth, at.path_slot, at.cache_seqlens, at.num_rows,
            workspace=self._workspace, backend=self.backend,
        )  # fmt: skip
        mixed = mixed.view(x.shape[0], -1)
        x, squares = self._linear(
            mixed, layer.o, rows, bias=layer.o_bias, residual=x, with_squares=True
        )
        norm = RowNorm(layer.mlp_norm, self._eps, squares)
        inner = self._linear(x, layer.gate_up, rows, gate=True, norm=norm)
        return self._linear(inner, layer.down, rows, residual=x, with_squares=True)

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return norm_act(x, weight, self._eps, backend=self.backend)

    def _linear(self, x: torch.Tensor, w: Matrix, num_rows: torch.Tensor | None, **options):
        options |= {"workspace": self._workspace, "backend": self.backend}
        product = nf4_linear if isinstance(w, NF4Weight) else skinny_linear
        return product(x, w, num_rows, **options)

    def _many(self, x: torch.Tensor, w: Matrix, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x W^T of a prompt's rows."""
        if isinstance(w, NF4Weight):
            return prefill_linear(x, w, bias, workspace=self._workspace, backend=self.backend)
        return F.linear(x, w, bias)

    def _rotate(
        self,
        layer: Layer,
        qkv: torch.Tensor,
        depth: torch.Tensor,
        cache_seqlens: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        num_rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Queries ``[B, N, H, D]`` with their positions; K and V go into the cache."""
        return rope_append(
            qkv, *self._turn, depth, cache_seqlens, k, v, num_rows, q_norm=layer.q_norm,
            k_norm=layer.k_norm, eps=self._eps, backend=self.backend,
        )  # fmt: skip

    def _causal(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Attention of a prompt over itself, ``[R, H * D]``: flash-attn where it is, else SDPA."""
        rows = q.shape[1]
        k, v = k[:, :, :rows], v[:, :, :rows]
        if self._flash:
            out = self._flash(q, k.transpose(1, 2), v.transpose(1, 2), causal=True)
        else:
            grouped = q.shape[2] != k.shape[1]
            out = F.scaled_dot_product_attention(
                q.transpose(1, 2), k, v, is_causal=True, enable_gqa=grouped
            ).transpose(1, 2)
        return out.reshape(rows, -1)


def flash_attention() -> Callable[..., torch.Tensor] | None:
    """flash-attn's `flash_attn_func`, or None where it cannot be imported."""
    try:
        from flash_attn import flash_attn_func
    except ImportError:
        return None
    return flash_attn_func
