"""The embedded pair: a tiny EventGPT that drafts for a tiny Video-LLaVA, trained on procedural
scenes.

Same classes as the full-size pair, small enough to ship: transformers' own
`VideoLlavaForConditionalGeneration` (8 frames of 64x64, head size 64) and
`EventGPTForConditionalGeneration` (one event image), one byte-level BPE tokenizer, a text-only
Llama for transformers' assisted generation, and the target's answers on training scenes. ``python
-m xspec_runtime.models.mini train`` regenerates all of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
)

from .eventgpt import EventGPTConfig, EventGPTForConditionalGeneration

CHECKPOINTS = Path(__file__).parent / "checkpoints"
PAD, BOS, EOS, IMAGE, VIDEO, EVENT = range(6)
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<image>", "<video>", "<event>")
VOCAB = 640
IMAGE_SIZE, PATCH, FRAMES = 64, 16, 8
PATCH_TOKENS = (IMAGE_SIZE // PATCH) ** 2 + 1
TEST_SEED = 1_000_000  # scenes below are for training, from here on for tests
MAX_NEW_TOKENS = 128


def target_config() -> VideoLlavaConfig:
    """Tiny Video-LLaVA; features come from the tower's last layer but one, as in the 7B model."""
    return VideoLlavaConfig(
        vision_config=_clip(layers=4),
        text_config=_llama(hidden=192, layers=4, intermediate=512),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        vision_feature_layer=-2,
        image_seq_length=PATCH_TOKENS - 1,
        video_seq_length=FRAMES * PATCH_TOKENS,
        tie_word_embeddings=True,
    )


def draft_config() -> EventGPTConfig:
    """Tiny EventGPT on one event image."""
    return EventGPTConfig(
        vision_config=_clip(layers=3),
        text_config=_llama(hidden=128, layers=2, intermediate=384),
        event_token_id=EVENT,
        num_frames=1,
        tie_word_embeddings=True,
    )


def assistant_config() -> LlamaConfig:
    """Text-only Llama for transformers' assisted generation."""
    return _llama(hidden=128, layers=2, intermediate=384)


def _clip(layers: int) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=layers,
        num_attention_heads=2,
        image_size=IMAGE_SIZE,
        patch_size=PATCH,
        projection_dim=128,
    )


def _llama(hidden: int, layers: int, intermediate: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        head_dim=64,
        intermediate_size=intermediate,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )


MODELS: dict[str, tuple[type[PreTrainedModel], object]] = {
    "target": (VideoLlavaForConditionalGeneration, target_config),
    "draft": (EventGPTForConditionalGeneration, draft_config),
    "draft_raw": (EventGPTForConditionalGeneration, draft_config),
    "assistant": (LlamaForCausalLM, assistant_config),
}


def build(name: str) -> PreTrainedModel:
    """An untrained model: target, draft (tuned on the target's answers), draft_raw or assistant."""
    cls, config = MODELS[name]
    return cls(config())


def load(
    name: str,
    directory: Path | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """A shipped model in `dtype` on `device`, ready for inference.

    Raises:
        FileNotFoundError: a file of the checkpoint is missing.
        RuntimeError: the file is damaged or holds other tensors than the model.
    """
    path = _existing(Path(directory or CHECKPOINTS) / name / "model.safetensors")
    model = build(name)
    try:
        state = {key: value.to(dtype) for key, value in load_file(path).items()}
    except Exception as error:
        raise RuntimeError(f"{path} is not a readable safetensors file: {error}") from None
    if name == "target":
        state |= {k.replace("video_tower", "image_tower"): v for k, v in state.items()}
    missing, unexpected = model.to(dtype).load_state_dict(state, strict=False)
    missing = [key for key in missing if key != "lm_head.weight"]
    if missing or unexpected:
        raise RuntimeError(f"{path} does not fit {name}: missing {missing}, extra {unexpected}")
    model.tie_weights()
    return model.eval().to(device).requires_grad_(False)


@lru_cache(maxsize=2)
def load_tokenizer(directory: Path | None = None) -> PreTrainedTokenizerFast:
    """The tokenizer both models share."""
    path = _existing(Path(directory or CHECKPOINTS) / "tokenizer.json")
    return PreTrainedTokenizerFast(
        tokenizer_file=str(path),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<image>", "<video>", "<event>"],
        clean_up_tokenization_spaces=False,
    )


def load_answers(directory: Path | None = None) -> list[list[int]]:
    """The target's greedy answers on training scenes, end-of-sequence included."""
    path = _existing(Path(directory or CHECKPOINTS) / "answers.safetensors")
    data = load_file(path)
    return [a.tolist() for a in data["tokens"].long().split(data["lengths"].tolist())]


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing; `python -m xspec_runtime.models.mini train` regenerates the pair"
        )
    return path


@dataclass(frozen=True)
class Prompt:
    """Token ids around the media placeholders: ``<s>USER: <media>\\n{question} ASSISTANT:``."""

    before: list[int]
    after: list[int]

    @classmethod
    def of(cls, question: str, tokenizer: PreTrainedTokenizerFast) -> Prompt:
        def encode(text: str) -> list[int]:
            return tokenizer.encode(text, add_special_tokens=False)

        return cls([BOS, *encode("USER: ")], encode(f"\n{question} ASSISTANT:"))

    def ids(self, placeholder: int, count: int) -> list[int]:
        """The whole prompt with `count` placeholders."""
        return [*self.before, *[placeholder] * count, *self.after]


def encode_answer(text: str, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Answer ids, end-of-sequence included."""
    return [*tokenizer.encode(" " + text, add_special_tokens=False), EOS]


def decode_answer(ids: list[int], tokenizer: PreTrainedTokenizerFast) -> str:
    """Text of an answer, special tokens dropped."""
    return tokenizer.decode(ids, skip_special_tokens=True).strip()


def pixels(images: np.ndarray) -> torch.Tensor:
    """uint8 ``[..., 64, 64, 3]`` -> float32 ``[..., 3, 64, 64]`` in -1..1."""
    if images.dtype != np.uint8 or images.shape[-3:] != (IMAGE_SIZE, IMAGE_SIZE, 3):
        raise ValueError(
            f"images must be uint8 [..., {IMAGE_SIZE}, {IMAGE_SIZE}, 3], got {images.dtype} "
            f"{tuple(images.shape)}"
        )
    return torch.from_numpy(images).movedim(-1, -3).float().div_(127.5).sub_(1.0)


def target_inputs(
    question: str, video: np.ndarray, tokenizer: PreTrainedTokenizerFast
) -> dict[str, torch.Tensor]:
    """`generate` arguments of the target: 8 frames uint8 ``[8, 64, 64, 3]`` and a question."""
    ids = Prompt.of(question, tokenizer).ids(VIDEO, video.shape[0] * PATCH_TOKENS)
    input_ids = torch.tensor([ids])
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "pixel_values_videos": pixels(video)[None],
    }


def draft_inputs(
    question: str, events: np.ndarray, tokenizer: PreTrainedTokenizerFast
) -> dict[str, torch.Tensor]:
    """Arguments of the draft: event image uint8 ``[64, 64, 3]`` or ``[T, 64, 64, 3]``."""
    images = events[None] if events.ndim == 3 else events
    ids = Prompt.of(question, tokenizer).ids(EVENT, images.shape[0] + PATCH_TOKENS)
    return {"input_ids": torch.tensor([ids]), "event_pixel_values": pixels(images)[None]}


if __name__ == "__main__":
    from .mini_train import main

    main()
