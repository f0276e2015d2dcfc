"""Decoding steps of a small Llama with little between the matrix products.

A draft is only as good as its step is cheap, and at draft sizes most of a step through a general
model class is overhead: here q, k, v and gate, up are one product each, the rotation is a table,
and K/V go straight into the cache's rows. Arithmetic differs from the model's own in rounding only,
which a drafter may do: the target decides every token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from transformers import LlamaModel, PreTrainedModel

from ..kv_cache import KVCache
from ..nf4_dense import plain_weight
from ..nf4_model import NF4Linear


class LlamaSteps:
    """Steps over `model`'s Llama decoder, continuing what its own prefill left in `cache`."""

    def __init__(self, model: PreTrainedModel, cache: KVCache) -> None:
        decoder: LlamaModel = model.get_decoder()
        config = decoder.config
        self.cache = cache
        self.heads = config.num_attention_heads
        self.kv_heads = config.num_key_value_heads
        self.width = decoder.layers[0].self_attn.head_dim
        self.eps = config.rms_norm_eps
        self.embed = decoder.embed_tokens.weight
        self.norm = decoder.norm.weight
        self.head = model.get_output_embeddings().weight
        self.layers = [
            (
                layer.input_layernorm.weight,
                torch.cat([plain_weight(p) for p in _projections(layer.self_attn)]),
                plain_weight(layer.self_attn.o_proj).T,
                layer.post_attention_layernorm.weight,
                torch.cat([plain_weight(layer.mlp.gate_proj), plain_weight(layer.mlp.up_proj)]),
                plain_weight(layer.mlp.down_proj).T,
            )
            for layer in decoder.layers
        ]
        positions = torch.arange(cache.capacity, device=self.embed.device)[None]
        cos, sin = decoder.rotary_emb(self.embed, positions)
        half = self.width // 2
        self.cos = cos[0, :, None]
        self.sin = torch.cat([-sin[0, :, :half], sin[0, :, half:]], -1)[:, None]

    @staticmethod
    def fits(model: PreTrainedModel) -> bool:
        """Whether the text part is a Llama without biases, of a plain rotation; on a GPU, one whose
        weights are not in NF4, which would be dequantized here.
        """
        decoder = model.get_decoder()
        packed = any(isinstance(module, NF4Linear) for module in decoder.modules())
        return (
            type(decoder) is LlamaModel
            and (model.device.type == "cpu" or not packed)
            and not decoder.config.attention_bias
            and not decoder.config.mlp_bias
            and decoder.config.hidden_act == "silu"
            and decoder.rotary_emb.rope_type == "default"
        )

    def __call__(self, tokens: Sequence[int]) -> torch.Tensor:
        """Feed `tokens` behind the cache's rows; logits ``[V]`` after the last one."""
        return F.linear(self.hidden(tokens), self.head)

    def hidden(self, tokens: Sequence[int]) -> torch.Tensor:
        """Feed `tokens`; what the language-model head reads after the last one, ``[D]``."""
        rows = len(tokens)
        start = self.cache.length
        end = start + rows
        self.cache.check_room(rows)
        x = self.embed[torch.tensor(tokens, device=self.embed.device)]
        cos, sin = self.cos[start:end], self.sin[start:end]
        mask = None
        if rows > 1:
            mask = torch.ones(rows, end, dtype=torch.bool, device=x.device).tril(start)
        for weights, kv in zip(self.layers, self.cache.layers, strict=True):
            x = self._layer(x, weights, kv, cos, sin, mask, start, end)
        self.cache.advance(rows)
        return F.rms_norm(x[-1], (x.shape[1],), self.norm, self.eps)

    def _layer(self, x, weights, kv, cos, sin, mask, start: int, end: int) -> torch.Tensor:
        norm, qkv, out, mlp_norm, gate_up, down = weights
        shape = (x.shape[1],)
        mixed = F.linear(F.rms_norm(x, shape, norm, self.eps), qkv)
        mixed = mixed.view(end - start, -1, self.width)
        turned = mixed[:, : self.heads + self.kv_heads]
        swapped = turned.roll(self.width // 2, -1)
        turned = torch.addcmul(turned * cos, swapped, sin).transpose(0, 1)
        kv.keys[0, :, start:end] = turned[self.heads :]
        kv.values[0, :, start:end] = mixed[:, self.heads + self.kv_heads :].transpose(0, 1)
        attended = F.scaled_dot_product_attention(
            turned[None, : self.heads],
            kv.keys[:, :, :end],
            kv.values[:, :, :end],
            attn_mask=mask,
            enable_gqa=self.heads != self.kv_heads,
        )
        x = torch.addmm(x, attended[0].transpose(0, 1).reshape(end - start, -1), out)
        gate, up = F.linear(F.rms_norm(x, shape, mlp_norm, self.eps), gate_up).chunk(2, -1)
        return torch.addmm(x, F.silu(gate) * up, down)


def _projections(attention) -> tuple:
    return attention.q_proj, attention.k_proj, attention.v_proj
