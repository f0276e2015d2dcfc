"""Attention of a draft tree through transformers' public seams: no module is patched."""

from __future__ import annotations

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

ATTENTION = "xspec_tree"


def tree_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    *,
    xspec_tree: bool = False,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Attention of N tree rows ``[B, H, N, D]`` over KV ``[B, H_kv, S, D]``; anything else goes to
    SDPA.

    The heads of a KV group are packed into rows, so K and V are read once and never repeated in
    memory.
    """
    if not xspec_tree:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    batch, heads, rows, width = query.shape
    groups = heads // key.shape[1]
    if groups > 1:
        query = query.reshape(batch, key.shape[1], groups * rows, width)
        attention_mask = attention_mask.repeat(1, 1, groups, 1)
    out = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, scale=scaling
    )
    out = out.reshape(batch, heads, rows, width)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, tree_attention_forward)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def use_tree_attention(model: PreTrainedModel) -> None:
    """Switch the model's text attention to `ATTENTION`; towers keep theirs."""
    if model.config.get_text_config()._attn_implementation == ATTENTION:
        return
    nested = "text_config" in getattr(model.config, "sub_configs", {})
    model.set_attn_implementation({"text_config": ATTENTION} if nested else ATTENTION)
