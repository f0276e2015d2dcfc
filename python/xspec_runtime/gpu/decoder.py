"""A LLaMA-shaped decoder of random weights in plain torch: what a verify of M rows costs elsewhere.

One forward pass is M rows at positions start .. start + M - 1 over a KV cache of `start` committed
rows: embedding, layers, final norm, logits and argmax of every row. Every layer has weights and
caches of its own, so that no cache of the card holds them from one layer to the next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a decoder; as given, those of Vicuna-7B under Video-LLaVA's padded vocabulary."""

    layers: int = 32
    width: int = 4096
    heads: int = 32
    inner: int = 11008
    vocab: int = 32064
    eps: float = 1e-5
    theta: float = 10000.0

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
    """One layer: weights and its K and V caches, each [1, heads, capacity, head_dim].

    Args:
        weights: q, k, v in one matrix [3 W, W]; output [W, W]; gate, up in one [2 I, W]; down
            [W, I].
        make: weight -> Linear.
        separate: q, k, v, gate and up each by itself, as transformers runs them.
    """

    def __init__(
        self,
        weights: Sequence[torch.Tensor],
        caches: tuple[torch.Tensor, torch.Tensor],
        norms: tuple[torch.Tensor, torch.Tensor],
        make: Callable[[torch.Tensor], Linear],
        separate: bool,
    ) -> None:
        qkv, out, gate_up, down = weights
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
        position = torch.arange(start, start + max_rows, device=device)
        half = torch.arange(0, shape.head_dim, 2, device=device) / shape.head_dim
        angle = position[:, None].float() / shape.theta**half
        self._cos = torch.cat([angle.cos(), angle.cos()], 1)[:, None].to(dtype)
        self._sin = torch.cat([-angle.sin(), angle.sin()], 1)[:, None].to(dtype)

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

    def forward(self, rows: int, mask: object) -> tuple[torch.Tensor, torch.Tensor]:
        """One pass over the first `rows` rows: token ids [rows] and logits [rows, vocab]."""
        s = self.shape
        x = F.embedding(self.ids[:rows], self.embedding)
        for layer in self.layers:
            h = F.rms_norm(x, (s.width,), layer.attention_norm, s.eps)
            layer.out.add_to(x, self._attend(layer, h, rows, mask))
            h = F.rms_norm(x, (s.width,), layer.mlp_norm, s.eps)
            gate, up = _outputs(layer.gate_up, h, 2)
            layer.down.add_to(x, F.silu(gate).mul_(up))
        logits = self.head(F.rms_norm(x, (s.width,), self.norm, s.eps))
        return logits.argmax(-1), logits

    def _attend(self, layer: Layer, h: torch.Tensor, rows: int, mask: object) -> torch.Tensor:
        s, end = self.shape, self.start + rows
        if len(layer.qkv) == 1:
            qkv = layer.qkv[0](h).view(rows, 3 * s.heads, s.head_dim)
            q, k = self._rotate(qkv[:, : 2 * s.heads]).chunk(2, 1)
            v = qkv[:, 2 * s.heads :]
        else:
            q, k, v = (linear(h).view(rows, s.heads, s.head_dim) for linear in layer.qkv)
            q, k = self._rotate(q), self._rotate(k)
        layer.keys[0, :, self.start : end] = k.transpose(0, 1)
        layer.values[0, :, self.start : end] = v.transpose(0, 1)
        out = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None], layer.keys[:, :, :end], layer.values[:, :, :end], mask
        )
        return out.transpose(1, 2).reshape(rows, s.width)

    def _rotate(self, x: torch.Tensor) -> torch.Tensor:
        """RoPE of x [M, heads, head_dim]; the sine carries the sign of the half it multiplies."""
        rows = len(x)
        swapped = x.roll(self.shape.head_dim // 2, -1)
        return torch.addcmul(x * self._cos[:rows], swapped, self._sin[:rows])


def _outputs(linears: Sequence[Linear], x: torch.Tensor, parts: int) -> Sequence[torch.Tensor]:
    if len(linears) == 1:
        return linears[0](x).chunk(parts, -1)
    return [linear(x) for linear in linears]
