"""Verify kernels for speculative decoding: the public operations on one screen.

The round
    tree_mask       parents of a draft tree -> ancestor bits, depth, path slots
    verify_greedy   draft tree and the target's tokens -> longest accepted path, tokens to emit
    verify_sampling the same where the target samples: lossless, its law is sample_tokens'
    kv_commit       accepted rows into place in every KV cache
    verify_tail     verify_greedy and kv_commit in two launches, published to the host as one record

The forward pass, each row's bits independent of how many rows there are
    embed           token ids -> rows
    norm_act        RMSNorm, with the residual added before
    skinny_linear   y = x W^T for few rows; bias, residual, SiLU gate; an RMSNorm of x (`RowNorm`)
    nf4_linear      the same with NF4 weights, exact (`nf4` is the format)
    prefill_linear  NF4 weights and the many rows of a prompt
    rope_append     rotate q and k, write K and V behind the committed rows
    tree_attention  rows of a tree over the committed keys and their own paths
    lm_head_argmax  hidden rows -> greedy tokens, near ties and NaNs flagged
    sample_tokens   logits -> tokens by temperature, top-k and top-p, given the uniforms

Drafts from small networks
    adapter_forward draft tokens or hidden states -> the target's tokens, by a `TokenNetwork` or a
                    `StateNetwork`; made of
    layer_linear    a product with LayerNorms and GELUs around it, residual and scale
    row_attention   a few rows over each other, no cache
    layer_norm      LayerNorm of what no product takes
    adapter_tail    behind verify_tail: the adapter's drafts of the next round, on the device

Beside them
    info, require_backend   what is installed, what runs where
    Workspace               scratch of one decoder on one stream
    interleave_gate, rope_table, read_record, await_record   the ops' data formats

Every op takes `backend="auto" | "torch" | "triton"`; tree_mask, verify_greedy and kv_commit "cuda"
too. `torch` is the reference.
"""

from __future__ import annotations

try:
    import torch as _torch  # noqa: F401
except ImportError as error:
    raise ImportError(
        "xspec_kernels needs PyTorch and does not install it, so as not to replace a CUDA build; "
        "install torch>=2.11 first, for instance `pip install torch==2.13.0`"
    ) from error

from xspec_kernels import nf4, nf4_prefill
from xspec_kernels._dispatch import BACKENDS, MAX_NODES, exact, info, require_backend
from xspec_kernels.kernels._layer_norm import LayerNorm
from xspec_kernels.kernels._row_norm import RowNorm
from xspec_kernels.kernels.adapter_forward import (
    Bottleneck,
    EncoderLayer,
    Linear,
    Network,
    StateNetwork,
    TokenNetwork,
    adapter_forward,
)
from xspec_kernels.kernels.adapter_tail import AdapterFeed, adapter_tail, pick_drafts
from xspec_kernels.kernels.embed import embed
from xspec_kernels.kernels.kv_commit import kv_commit
from xspec_kernels.kernels.layer_linear import layer_linear
from xspec_kernels.kernels.layer_norm import layer_norm
from xspec_kernels.kernels.lm_head_argmax import ArgmaxResult, lm_head_argmax
from xspec_kernels.kernels.nf4_linear import nf4_linear
from xspec_kernels.kernels.norm_act import norm_act
from xspec_kernels.kernels.rope_append import rope_append, rope_table
from xspec_kernels.kernels.row_attention import row_attention
from xspec_kernels.kernels.sample_tokens import sample_tokens
from xspec_kernels.kernels.skinny_linear import interleave_gate, skinny_linear
from xspec_kernels.kernels.tree_attention import tree_attention
from xspec_kernels.kernels.tree_mask import TreeMask, tree_mask
from xspec_kernels.kernels.verify_greedy import VerifyResult, verify_greedy
from xspec_kernels.kernels.verify_sampling import verify_sampling
from xspec_kernels.kernels.verify_tail import (
    CACHE_FULL,
    INVALID,
    SEQUENCE,
    TOKENS,
    TailRecord,
    TailResult,
    await_record,
    read_record,
    verify_tail,
)
from xspec_kernels.nf4 import NF4Weight
from xspec_kernels.nf4_prefill import prefill_linear
from xspec_kernels.workspace import Workspace

__version__ = "0.1.0"

__all__ = [
    "BACKENDS",
    "CACHE_FULL",
    "INVALID",
    "MAX_NODES",
    "SEQUENCE",
    "TOKENS",
    "AdapterFeed",
    "ArgmaxResult",
    "Bottleneck",
    "EncoderLayer",
    "LayerNorm",
    "Linear",
    "NF4Weight",
    "Network",
    "RowNorm",
    "StateNetwork",
    "TailRecord",
    "TailResult",
    "TokenNetwork",
    "TreeMask",
    "VerifyResult",
    "Workspace",
    "adapter_forward",
    "adapter_tail",
    "await_record",
    "embed",
    "exact",
    "info",
    "interleave_gate",
    "kv_commit",
    "layer_linear",
    "layer_norm",
    "lm_head_argmax",
    "nf4",
    "nf4_linear",
    "nf4_prefill",
    "norm_act",
    "pick_drafts",
    "prefill_linear",
    "read_record",
    "require_backend",
    "rope_append",
    "rope_table",
    "row_attention",
    "sample_tokens",
    "skinny_linear",
    "tree_attention",
    "tree_mask",
    "verify_greedy",
    "verify_sampling",
    "verify_tail",
]
