"""What is measured: a model of random weights and one request's KV cache, filled."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel

from ..drafters.base import MAX_ROWS, DraftTree
from ..gpu.cases import chain, random_tree
from ..kv_cache import KVCache
from ..models import mini
from ..targets.checkpoint import read_config
from ..targets.llama_weights import LlamaShape, LlamaWeights

SHAPES = ("chain", "tree")
MAX_DEPTH = 32
CONFIGS = {
    # Vicuna-7B under Video-LLaVA's padded vocabulary.
    "llama-7b": {
        "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "intermediate_size": 11008, "vocab_size": 32064,
        "rms_norm_eps": 1e-5,
    },
    "llama-3-8b": {
        "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256,
        "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    },
    "smollm2": {
        "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "intermediate_size": 1536, "vocab_size": 49152,
        "rms_norm_eps": 1e-5, "rope_theta": 100000.0, "tie_word_embeddings": True,
    },
    # For tests: no model that exists.
    "tiny": {
        "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 256, "vocab_size": 512,
        "rms_norm_eps": 1e-5,
    },
}  # fmt: skip


def find_config(name: str) -> PreTrainedConfig:
    """The text configuration of `CONFIGS`, of the embedded pair's target, or of a folder.

    Raises:
        ValueError: the name is neither, or a feature of the model is not supported.
        FileNotFoundError: the folder has no config.json.
    """
    if name == "mini":
        return mini.target_config().get_text_config()
    if name in CONFIGS:
        return LlamaConfig(**CONFIGS[name])
    if not Path(name).is_dir():
        known = ", ".join((*CONFIGS, "mini"))
        raise ValueError(f"--config must be {known} or a model's folder, got {name!r}")
    config = read_config(Path(name)).get_text_config()
    LlamaShape.of(config)
    return config


def random_model(
    config: PreTrainedConfig, device: str, dtype: torch.dtype, seed: int
) -> PreTrainedModel:
    """A model of random weights, as transformers initializes it.

    Raises:
        RuntimeError: it does not fit the memory that is free.
    """
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config, dtype=dtype)
    need, free = sum(p.numel() for p in empty.parameters()) * dtype.itemsize, free_bytes(device)
    if free is not None and need > free:
        raise RuntimeError(
            f"the weights take {need / 2**30:.1f} GiB in {str(dtype)[6:]}, {device} has "
            f"{free / 2**30:.1f} GiB free; take a smaller --config or --dtype bfloat16"
        )
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval().requires_grad_(False)


def free_bytes(device: str) -> int | None:
    """Memory that can be had there; None where the system does not say."""
    if device != "cpu":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")]
    return found[0] if found else None


@dataclass(frozen=True, slots=True)
class Subject:
    """A model.

    Attributes:
        model: None where nothing needs transformers' modules.
        weights: the same weights for our ops.
        seed: of keys, values and tokens.
    """

    model: PreTrainedModel | None
    weights: LlamaWeights
    seed: int

    @classmethod
    def of(cls, model: PreTrainedModel, seed: int = 0, keep_model: bool = True) -> Subject:
        """Without the model its weights are held once, fused; with it, twice."""
        weights = LlamaWeights.of(model, share=not keep_model)
        return cls(model if keep_model else None, weights, seed)

    def stage(self, prompt_tokens: int) -> Stage:
        """A cache with random K and V of a prompt, and room for one verify."""
        w, shape = self.weights, self.weights.shape
        draw = torch.Generator(w.embed.device).manual_seed(self.seed)
        cache = KVCache(shape.layers, prompt_tokens + MAX_ROWS)
        like = w.embed.new_empty(1, shape.kv_heads, 0, shape.head_dim)
        for layer in cache.layers:
            layer.lazy_initialization(like, like)
            for stored in (layer.keys, layer.values):
                stored[:, :, :prompt_tokens].normal_(generator=draw)
        cache.advance(prompt_tokens)
        tokens = torch.randint(
            shape.vocab, (MAX_ROWS,), generator=torch.Generator().manual_seed(self.seed)
        )
        return Stage(self.model, w, cache, tokens.tolist())


@dataclass(frozen=True, slots=True)
class Stage:
    """What every engine of one measurement works on.

    Attributes:
        cache: one request's K and V.
        tokens: ids that trees take in order.
    """

    model: PreTrainedModel | None
    weights: LlamaWeights
    cache: KVCache
    tokens: list[int]

    def tree(self, shape: str, rows: int, seed: int = 0) -> DraftTree:
        """A chain, or a random tree less than `MAX_DEPTH` deep that leans towards depth."""
        parents = chain(rows)
        if shape == "tree":
            parents = random_tree(random.Random(f"{seed} {rows}"), rows, MAX_DEPTH)
        return DraftTree(self.tokens[:rows], parents, [1.0] * rows)

    def nbytes(self, rows: int) -> int:
        """The fewest bytes that a pass of `rows` rows reads: weights, head, K and V."""
        w, s = self.weights, self.weights.shape
        parts = [t for layer in w.layers for t in layer if t is not None]
        cached = 2 * s.layers * s.kv_heads * s.head_dim * (self.cache.length + rows)
        return sum(t.nbytes for t in (*parts, w.norm, w.head)) + cached * w.embed.itemsize
