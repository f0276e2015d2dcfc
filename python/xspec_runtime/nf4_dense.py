"""Dequantized copies beside NF4 weights, for a CPU.

torch looks 4-bit weights up at every product, which takes a CPU three to nine times as long as a
single row's product with float weights. With the dequantized weights kept beside the packed ones it
takes as long as those, with the same bits. What that costs in memory is bounded.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from xspec_kernels import NF4Weight, nf4

from .nf4_model import NF4Linear
from .targets.llama_weights import LlamaWeights

# Bytes of a model's copies: all of a model of 250 million weights in float32. Matrices that come
# after the limit is reached are dequantized at every product.
DENSE_BYTES = 1 << 30


class _Budget:
    """Gives copies while they fit."""

    def __init__(self, limit: int, dtype: torch.dtype) -> None:
        self.left, self.dtype, self.kept = limit, dtype, 0

    def of(self, w: NF4Weight) -> NF4Weight:
        nbytes = w.shape.numel() * self.dtype.itemsize
        if w.dense is not None or nbytes > self.left:
            return w
        self.left -= nbytes
        self.kept += nbytes
        return w.with_dense(self.dtype)


def keep_dense(model: nn.Module, limit: int = DENSE_BYTES) -> int:
    """Let the NF4 layers of a CPU model keep dequantized weights in the dtype they multiply in,
    `limit` bytes of them; returns how many bytes they are. 0 elsewhere than on a CPU.
    """
    kept = 0
    for module in model.modules():
        if isinstance(module, NF4Linear) and module.weight.device.type == "cpu":
            budget = _Budget(limit - kept, module.compute_dtype or model.dtype)
            module.weight = budget.of(module.weight)
            kept += budget.kept
    return kept


def plain_weight(linear: nn.Linear | NF4Linear) -> torch.Tensor:
    """The matrix of a layer; of an NF4 one the dequantized copy, made here unless it is kept."""
    if not isinstance(linear, NF4Linear):
        return linear.weight
    w, dtype = linear.weight, linear.compute_dtype or linear.weight.dtype
    kept = w.dense is not None and w.dense.dtype == dtype
    return w.dense if kept else nf4.dequantize(w, dtype)


def with_dense(weights: LlamaWeights, limit: int = DENSE_BYTES) -> LlamaWeights:
    """As `keep_dense`, for the fused matrices of our own decoder."""
    if weights.embed.device.type != "cpu":
        return weights
    budget = _Budget(limit, weights.embed.dtype)
    layers = [
        layer._replace(**{
            name: budget.of(matrix)
            for name, matrix in layer._asdict().items()
            if isinstance(matrix, NF4Weight)
        })
        for layer in weights.layers
    ]  # fmt: skip
    return replace(weights, layers=layers)
