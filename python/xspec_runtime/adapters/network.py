"""Adapters as `adapter_forward` takes them: the weights of a module, by name."""

from __future__ import annotations

import torch
from torch import nn

from xspec_kernels import (
    Bottleneck,
    EncoderLayer,
    LayerNorm,
    Linear,
    StateNetwork,
    TokenNetwork,
)

from .base import PAD
from .hidden import HiddenAdapter
from .token_adapter import TokenAdapter, TokenAdapterConfig

# Levels whose network is one of `adapter_forward`.
LEVELS = ("L1", "L2", "L3", "L4")


def takes(config: TokenAdapterConfig) -> bool:
    """Whether `adapter_forward` has kernels of these widths."""
    return config.width % 64 == config.intermediate % 64 == 0


@torch.no_grad()
def token_network(adapter: TokenAdapter) -> TokenNetwork:
    """Of the module's own weights; a bias a token is added to the head's."""
    config, head = adapter.config, adapter.head
    weight, bias = adapter.embed.weight, None
    if head is not None:
        weight, bias = head.weight, head.bias
    if config.token_bias:
        total = adapter.token_bias.float() + (0 if bias is None else bias.float())
        bias = total.to(weight.dtype)
    layers = [
        EncoderLayer(
            *_attention(layer.self_attn),
            _linear(layer.linear1),
            _linear(layer.linear2),
            (_norm(layer.norm1), _norm(layer.norm2)),
        )
        for layer in adapter.layers.layers
    ]
    return TokenNetwork(
        adapter.embed.weight.detach(),
        adapter.position.weight.detach(),
        layers,
        _norm(adapter.norm),
        Linear(weight.detach(), None if bias is None else bias.detach()),
        config.heads,
        PAD if config.token_bias else None,
    )


@torch.no_grad()
def state_network(adapter: HiddenAdapter, head: torch.Tensor) -> StateNetwork:
    """Of the module's own weights and the target's head ``[V, width]``.

    Raises:
        ValueError: the level has no such network, or the head does not fit.
    """
    config, body = adapter.config, adapter.body
    if config.level not in LEVELS:
        raise ValueError(f"{config.level} has no kernels, expected one of {', '.join(LEVELS)}")
    if head.dim() != 2 or head.shape[1] != config.width:
        raise ValueError(f"the head must be [V, {config.width}], got {list(head.shape)}")
    project = None if isinstance(adapter.project, nn.Identity) else _linear(adapter.project)
    head = head.detach().to(body.norm.weight).contiguous()
    if config.level == "L4":
        blocks = [
            EncoderLayer(
                *_attention(block.attention),
                _linear(block.inner[0]),
                _linear(block.inner[3]),
                (_norm(block.attention_norm), _norm(block.inner_norm)),
            )
            for block in body.blocks
        ]
        out = _linear(body.out)
        return StateNetwork(
            head, project, None, blocks, _norm(body.norm), out, float(body.alpha), config.heads
        )
    if config.level == "L3":
        blocks = [
            Bottleneck(None, _linear(b.net[0]), _norm(b.net[1]), _linear(b.net[4]), float(b.alpha))
            for b in body.blocks
        ]
        return StateNetwork(head, project, _norm(body.first), blocks, _norm(body.norm))
    blocks = [
        Bottleneck(_norm(b.norm), _linear(b.down), None, _linear(b.up), float(b.alpha))
        for b in body.blocks
    ]
    return StateNetwork(head, project, None, blocks, _norm(body.norm))


def _linear(module: nn.Linear) -> Linear:
    return Linear(module.weight.detach(), None if module.bias is None else module.bias.detach())


def _norm(module: nn.LayerNorm) -> LayerNorm:
    return LayerNorm(module.weight.detach(), module.bias.detach(), module.eps)


def _attention(module: nn.MultiheadAttention) -> tuple[Linear, Linear]:
    """(q, k, v together, out)."""
    qkv = Linear(module.in_proj_weight.detach(), module.in_proj_bias.detach())
    return qkv, _linear(module.out_proj)
