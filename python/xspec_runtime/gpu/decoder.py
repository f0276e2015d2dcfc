"""A LLaMA-shaped decoder of random weights in plain torch: what a verify of M rows costs elsewhere.

One forward pass is M rows at positions start .. start + M - 1 over a KV cache of `start` committed
rows: embedding, layers, final norm, logits and argmax of every row. Every layer has weights and
caches of its own, so that no cache of the card holds them from one layer to the next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right

if TYPE_CHECKING:
    from ..targets.llama_weights import LlamaWeights


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a decoder; as given, those of Vicuna-7B under Video-LLaVA's padded vocabulary.

    `kv_heads` None means as many as `heads`.
    """

    layers: int = 32
    width: int = 4096
    heads: int = 32
    inner: int = 11008
    vocab: int = 32064
    eps: float = 1e-5
    theta: float = 10000.0
    kv_heads: int | None = None

    @property
    def groups(self) -> tuple[int, int]:
        """Heads of q and of k."""
        return self.heads, self.kv_heads or self.heads

    @property
    def head_dim(self) -> int:
        """Columns of a head."""
        return self.width // self.heads


class Linear(Protocol):
    """y = x W^T for x [M, K]."""

    nbytes: int

    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> None:
        """residual += x W^T."""


class Dense:
    """A weight [N, K] as it is, through cuBLAS."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight
        self.nbytes = weight.numel() * weight.element_size()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight)

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> None:
        """residual += x W^T, the sum inside the matrix product."""
        residual.addmm_(x, self.weight.t())


class Layer:
    """One layer: weights and its K and V caches, each [1, kv_heads, capacity, head_dim].

    Args:
        weights: q, k, v in one matrix; output [W, W]; gate, up in one [2 I, W]; down [W, I].
        make: weight -> Linear.
        separate: q, k, v, gate and up each by itself, as transformers runs them (as many heads of
            k as of q).
        interleaved: rows of gate and up alternate.
    """

    def __init__(
        self,
        weights: Sequence[torch.Tensor],
        caches: tuple[torch.Tensor, torch.Tensor],
        norms: tuple[torch.Tensor, torch.Tensor],
        make: Callable[[torch.Tensor], Linear],
        separate: bool,
        interleaved: bool = False,
    ) -> None:
        qkv, out, gate_up, down = weights
        self.interleaved = interleaved
        self.qkv = [make(w) for w in (qkv.chunk(3) if separate else [qkv])]
        self.gate_up = [make(w) for w in (gate_up.chunk(2) if separate else [gate_up])]
        self.out, self.down = make(out), make(down)
        self.keys, self.values = caches
        self.attention_norm, self.mlp_norm = norms

    @property
    def nbytes(self) -> int:
        """Bytes of the weights."""
        return sum(linear.nbytes for linear in (*self.qkv, *self.gate_up, self.out, self.down))


class Decoder:
    """The decoder; `forward(M)` runs M rows.

    Args:
        start: committed rows in the KV cache.
        max_rows: largest M.
    """

    def __init__(
        self,
        shape: Shape,
        start: int,
        max_rows: int,
        device: str,
        dtype: torch.dtype = torch.bfloat16,
        seed: int = 0,
    ) -> None:
        self.shape, self.start, self.max_rows = shape, start, max_rows
        self._draw = torch.Generator(device).manual_seed(seed)
        self._like = {"device": device, "dtype": dtype}
        self.layers: list[Layer] = []
        self.embedding = self._random(shape.vocab, shape.width)
        self.head = Dense(self._random(shape.vocab, shape.width, scale=shape.width**-0.5))
        self.norm = 1 + self._random(shape.width, scale=0.1)
        self.ids = torch.randint(shape.vocab, (max_rows,), device=device, generator=self._draw)
        half = torch.arange(0, shape.head_dim, 2, device=device) / shape.head_dim
        self._turn(shape.theta**-half, start + max_rows)

    @classmethod
    def of(
        cls,
        weights: LlamaWeights,
        caches: Sequence[tuple[torch.Tensor, torch.Tensor]],
        tokens: Sequence[int],
        start: int = 0,
    ) -> Decoder:
        """The model that holds `weights`, which are used as they lie; `start` can be set.

        Args:
            caches: K and V of every layer, each [1, kv_heads, capacity, head_dim].
            tokens: of the rows.

        Raises:
            ValueError: the model has biases, norms of heads, or heads of a width of their own.
        """
        from ..targets.llama_weights import inverse_frequencies

        s, first = weights.shape, weights.layers[0]
        extras = (first.qkv_bias, first.o_bias, first.q_norm)
        if any(extra is not None for extra in extras) or s.head_dim * s.heads != s.hidden:
            raise ValueError("the plain torch decoder has no biases, head norms or wider heads")
        self = object.__new__(cls)
        self.shape = Shape(s.layers, s.hidden, s.heads, s.intermediate, s.vocab, s.eps,
                           kv_heads=s.kv_heads)  # fmt: skip
        self.start, self.max_rows = start, len(tokens)
        self._like = {"device": weights.embed.device, "dtype": weights.embed.dtype}
        self.layers = [
            Layer((w.qkv, w.o, w.gate_up, w.down), pair, (w.input_norm, w.mlp_norm), Dense, False,
                  interleaved=True)
            for w, pair in zip(weights.layers, caches, strict=True)
        ]  # fmt: skip
        self.embedding, self.head, self.norm = weights.embed, Dense(weights.head), weights.norm
        self.ids = torch.tensor(tokens, device=weights.embed.device)
        frequencies = inverse_frequencies(weights.config, s.head_dim)
        self._turn(frequencies.to(weights.embed.device), caches[0][0].shape[2])
        return self

    def _turn(self, frequencies: torch.Tensor, positions: int) -> None:
        """Tables of the rotation; the sine carries the sign of the half it multiplies."""
        angle = torch.arange(positions, device=frequencies.device)[:, None].float() * frequencies
        self._cos = torch.cat([angle.cos(), angle.cos()], 1)[:, None].to(self._like["dtype"])
        self._sin = torch.cat([-angle.sin(), angle.sin()], 1)[:, None].to(self._like["dtype"])

    def _random(self, *size: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(*size, generator=self._draw, **self._like).mul_(scale)

    def random_layer(
        self, make: Callable[[torch.Tensor], Linear] = Dense, separate: bool = False
    ) -> Layer:
        """A layer of fresh weights, its cache filled up to `start`."""
        s = self.shape
        sizes = ((3 * s.width, s.width), (s.width, s.width), (2 * s.inner, s.width),
                 (s.width, s.inner))  # fmt: skip
        weights = [self._random(n, k, scale=k**-0.5) for n, k in sizes]
        slots = (1, s.heads, self.start + self.max_rows, s.head_dim)
        norms = [1 + self._random(s.width, scale=0.1) for _ in range(2)]
        return Layer(weights, (self._random(*slots), self._random(*slots)), norms, make, separate)

    def split(self) -> Decoder:
        """The same weights and caches with q, k, v, gate and up each by itself; shares memory."""
        other = object.__new__(Decoder)
        other.__dict__.update(self.__dict__)
        other.layers = []
        for layer in self.layers:
            weights = [part.weight for part in (layer.qkv[0], layer.out, layer.gate_up[0],
                                                layer.down)]  # fmt: skip
            norms = (layer.attention_norm, layer.mlp_norm)
            other.layers.append(Layer(weights, (layer.keys, layer.values), norms, Dense, True))
        return other

    def nbytes(self, rows: int) -> int:
        """The fewest bytes that a forward pass of `rows` rows reads: weights, head, K and V."""
        one = self.layers[0].keys
        cached = 2 * one.shape[1] * one.shape[3] * (self.start + rows) * one.element_size()
        return self.head.nbytes + sum(layer.nbytes + cached for layer in self.layers)

    def mask(self, rows: int, dense: bool) -> object:
        """Attention mask of a chain of `rows` rows: None, torch's causal bias, or [rows, keys]."""
        keys = self.start + rows
        if dense:
            visible = torch.ones(rows, keys, dtype=torch.bool, device=self._like["device"])
            return visible.tril(self.start)
        return causal_lower_right(rows, keys) if rows > 1 else None

    def tree(self, parents: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention mask [rows, keys] and depths [rows] of a tree, for `forward`."""
        rows = len(parents)
        visible = torch.zeros(rows, self.start + rows, dtype=torch.bool)
        visible[:, : self.start] = True
        depth = torch.zeros(rows, dtype=torch.int64)
        for row, parent in enumerate(parents):
            if parent >= 0:
                visible[row] = visible[parent]
                depth[row] = depth[parent] + 1
            visible[row, self.start + row] = True
        device = self._like["device"]
        return visible.to(device), depth.to(device)

    def forward(
        self, rows: int, mask: object, depth: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One pass over the first `rows` rows: token ids [rows] and logits [rows, vocab].

        `depth` is None for a chain.
        """
        s = self.shape
        x = F.embedding(self.ids[:rows], self.embedding)
        at = slice(self.start, self.start + rows) if depth is None else self.start + depth
        turn = self._cos[at], self._sin[at]
        for layer in self.layers:
            h = F.rms_norm(x, (s.width,), layer.attention_norm, s.eps)
            layer.out.add_to(x, self._attend(layer, h, rows, mask, turn))
            h = F.rms_norm(x, (s.width,), layer.mlp_norm, s.eps)
            gate, up = _gate_up(layer, h)
            layer.down.add_to(x, F.silu(gate).mul_(up))
        logits = self.head(F.rms_norm(x, (s.width,), self.norm, s.eps))
        return logits.argmax(-1), logits

    def _attend(
        self,
        layer: Layer,
        h: torch.Tensor,
        rows: int,
        mask: object,
        turn: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        s, end = self.shape, self.start + rows
        heads, kv_heads = s.groups
        if len(layer.qkv) == 1:
            qkv = layer.qkv[0](h).view(rows, heads + 2 * kv_heads, s.head_dim)
            q, k = _rotate(qkv[:, : heads + kv_heads], turn).split((heads, kv_heads), 1)
            v = qkv[:, heads + kv_heads :]
        else:
            q, k, v = (linear(h).view(rows, heads, s.head_dim) for linear in layer.qkv)
            q, k = _rotate(q, turn), _rotate(k, turn)
        layer.keys[0, :, self.start : end] = k.transpose(0, 1)
        layer.values[0, :, self.start : end] = v.transpose(0, 1)
        out = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None], layer.keys[:, :, :end], layer.values[:, :, :end], mask,
            enable_gqa=heads != kv_heads,
        )  # fmt: skip
        return out.transpose(1, 2).reshape(rows, s.width)


def _rotate(x: torch.Tensor, turn: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """RoPE of x [M, heads, head_dim]; the sine carries the sign of the half it multiplies."""
    cos, sin = turn
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def _gate_up(layer: Layer, x: torch.Tensor) -> Sequence[torch.Tensor]:
    if len(layer.gate_up) == 2:
        return [linear(x) for linear in layer.gate_up]
    both = layer.gate_up[0](x)
    return both.unflatten(-1, (-1, 2)).unbind(-1) if layer.interleaved else both.chunk(2, -1)
