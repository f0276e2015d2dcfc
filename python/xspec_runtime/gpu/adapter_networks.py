"""Networks of `adapter_forward` in the published sizes, out of whatever tensors one has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from xspec_kernels import (
    Bottleneck,
    EncoderLayer,
    LayerNorm,
    Linear,
    Network,
    StateNetwork,
    TokenNetwork,
)

NETWORKS = ("TokenAdapter", "L1", "L2", "L3", "L4")


class Sizes(NamedTuple):
    """Of all networks; the published ones."""

    vocab: int = 32010
    width: int = 512
    inner: int = 2048
    layers: int = 4
    positions: int = 128
    target_vocab: int = 32000
    state_width: int = 4096
    bottleneck: int = 256
    wide: int = 1024
    blocks: int = 3
    heads: int = 8


TINY = Sizes(96, 64, 128, 2, 64, 80, 64, 64, 128, 2, 2)
# The first layer or block differs from the others, which are alike.
SHORT = Sizes(layers=2, blocks=2)


@dataclass(frozen=True, slots=True)
class Builder:
    """Makes networks.

    Attributes:
        matrix: [N, K] -> a weight; vector: [N] -> a bias or a shift; scale: [N] -> one of a norm.
    """

    sizes: Sizes
    matrix: Callable[[int, int], torch.Tensor]
    vector: Callable[[int], torch.Tensor]
    scale: Callable[[int], torch.Tensor]

    def network(self, name: str) -> Network:
        """One of `NETWORKS`."""
        s, width = self.sizes, self.sizes.state_width
        if name == "TokenAdapter":
            return TokenNetwork(
                self.matrix(s.vocab, s.width), self.matrix(s.positions, s.width),
                [self._layer(s.width) for _ in range(s.layers)], self._norm(s.width),
                self._linear(s.vocab, s.width), s.heads,
            )  # fmt: skip
        head = self.matrix(s.target_vocab, width)
        if name == "L4":
            layer, out = self._layer(width), self._linear(width, width)
            return StateNetwork(head, None, None, [layer], self._norm(width), out, 0.1, s.heads)
        blocks = [self._bottleneck(name == "L3") for _ in range(1 if name == "L1" else s.blocks)]
        first = self._norm(width) if name == "L3" else None
        return StateNetwork(head, None, first, blocks, self._norm(width))

    def _bottleneck(self, wide: bool) -> Bottleneck:
        width, inner = self.sizes.state_width, self.sizes.wide if wide else self.sizes.bottleneck
        down, up = Linear(self.matrix(inner, width)), Linear(self.matrix(width, inner))
        if wide:
            return Bottleneck(None, down, self._norm(inner), up, 0.1)
        return Bottleneck(self._norm(width), down, None, up, 0.1)

    def _layer(self, width: int) -> EncoderLayer:
        inner = self.sizes.inner
        return EncoderLayer(
            self._linear(3 * width, width), self._linear(width, width), self._linear(inner, width),
            self._linear(width, inner), (self._norm(width), self._norm(width)),
        )  # fmt: skip

    def _linear(self, out: int, width: int) -> Linear:
        return Linear(self.matrix(out, width), self.vector(out))

    def _norm(self, width: int) -> LayerNorm:
        return LayerNorm(self.scale(width), self.vector(width))


def tensors_of(value: object) -> list[torch.Tensor]:
    """Every tensor in a network, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value if isinstance(value, (tuple, list)) else ()
    return [tensor for part in parts for tensor in tensors_of(part)]


def nbytes_read(network: Network) -> int:
    """Bytes of the weights that one forward pass reads; of tables of rows it reads next to none."""
    tables = 0
    if isinstance(network, TokenNetwork):
        tables = network.embed.nbytes + network.position.nbytes
    return sum(tensor.nbytes for tensor in tensors_of(network)) - tables
