"""Random-weight models and an oracle drafter for engine tests."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
)

from xspec_runtime.drafters.base import DraftTree, Request

VOCAB = 128
IMAGE, VIDEO = 126, 127
# Large initial weights keep top-2 gaps wide.
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.25, "bos_token_id": 1, "eos_token_id": None,
    "pad_token_id": 0,
}  # fmt: skip


def tiny_llama(seed: int, kv_heads: int = 2) -> LlamaForCausalLM:
    """Three layers."""
    torch.manual_seed(seed)
    sizes = SIZES | {"num_hidden_layers": 3, "num_key_value_heads": kv_heads}
    return LlamaForCausalLM(LlamaConfig(**sizes)).eval().requires_grad_(False)


def tiny_video_llava(
    new_tokens: int,
) -> tuple[VideoLlavaForConditionalGeneration, dict[str, torch.Tensor], list[int]]:
    """A model with placeholders `IMAGE` and `VIDEO`, a request of four frames, and transformers'
    greedy answer.
    """
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
        image_size=28, patch_size=14,
    )  # fmt: skip
    config = VideoLlavaConfig(
        vision_config=vision, text_config=LlamaConfig(**SIZES, num_hidden_layers=2),
        image_token_index=IMAGE, video_token_index=VIDEO,
    )  # fmt: skip
    model = VideoLlavaForConditionalGeneration(config).eval().requires_grad_(False)
    ids = torch.tensor([[1, 4, *[VIDEO] * 20, 6, 5]])
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values_videos": torch.randn(1, 4, 3, 28, 28),
    }
    out = model.generate(
        **inputs, max_new_tokens=new_tokens, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return model, inputs, out[0, ids.shape[1] :].tolist()


def prompt(seed: int, length: int = 20) -> torch.Tensor:
    """Random ids ``[1, length]``."""
    return torch.randint(3, VOCAB, (1, length), generator=torch.Generator().manual_seed(seed))


def reference(model: LlamaForCausalLM, ids: torch.Tensor, new_tokens: int) -> list[int]:
    """transformers' own greedy answer."""
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False
    )
    return out[0, ids.shape[1] :].tolist()


class OracleDrafter:
    """Random trees that often hold the right continuation; siblings never share a token."""

    name = "oracle"

    def __init__(self, answer: Sequence[int], seed: int, hit: float = 0.8) -> None:
        self.answer = list(answer)
        self.rng = random.Random(seed)
        self.hit = hit
        self.ended: list[int] | None = None

    def begin(self, request: Request) -> None:
        self.ended = None

    def propose(self, context: Sequence[int], rows: int) -> DraftTree:
        tree = DraftTree.root(context[-1])
        spine, known = 0, len(context)
        while len(tree) < rows:
            parent = spine if self.rng.random() < 0.6 else self.rng.randrange(len(tree))
            right = parent == spine and known < len(self.answer) and self.rng.random() < self.hit
            token = self.answer[known] if right else self.rng.randrange(VOCAB)
            siblings = [tree.tokens[i] for i, p in enumerate(tree.parent_idx) if p == parent]
            if token in siblings:
                continue
            node = tree.add(parent, token, 0.0)
            if right:
                spine, known = node, known + 1
        return tree

    def end(self, answer: Sequence[int]) -> None:
        self.ended = list(answer)
