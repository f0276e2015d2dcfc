"""What EventGPT reads: the published prompt around its event tokens, and event images."""

from __future__ import annotations

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ..data.images import clip_preprocess
from .eventgpt import EventGPTConfig

# The Vicuna conversation that EventGPT was tuned with.
SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the human's questions."
)
MARKER_TOKENS = ("<ev_start>", "<ev_end>")
CONTEXT = 2048  # rows that the published model was trained with


def prompt_ids(
    question: str, tokenizer: PreTrainedTokenizerBase, config: EventGPTConfig, frames: int = 0
) -> list[int]:
    """Ids of a request, begin-of-sequence first, with a placeholder for every event token.

    Text before and after the event tokens is tokenized apart, as in training.

    Args:
        frames: event images; 0: `config.num_frames`.

    Raises:
        ValueError: the question is empty or holds a placeholder, the marker tokens that the model
            was trained with are not in the vocabulary, or the prompt is too long.
    """
    if not question.strip():
        raise ValueError("the question is empty")
    if config.event_markers == "special":
        ids = tokenizer.convert_tokens_to_ids(list(MARKER_TOKENS))
        if None in ids or tokenizer.unk_token_id in ids:
            raise ValueError(
                f"the tokenizer lacks {' and '.join(MARKER_TOKENS)}, which the model was tuned with"
            )
    start, end = MARKER_TOKENS
    before, after = (
        tokenizer.encode(text, add_special_tokens=False)
        for text in (f"{SYSTEM} USER: {start}", f"{end}\n{question} ASSISTANT:")
    )
    if config.event_token_id in (*before, *after):
        raise ValueError(f"the question spells the event placeholder: {question[:40]!a}")
    events = (frames or config.num_frames) + config.event_tokens - config.num_frames
    whole = [tokenizer.bos_token_id, *before, *[config.event_token_id] * events, *after]
    if len(whole) > CONTEXT:
        raise ValueError(f"the prompt takes {len(whole)} rows, EventGPT reads {CONTEXT} at most")
    return whole


def eventgpt_inputs(
    question: str,
    images: np.ndarray,
    tokenizer: PreTrainedTokenizerBase,
    config: EventGPTConfig,
) -> dict[str, torch.Tensor]:
    """Arguments of `EventGPTForConditionalGeneration` for event images uint8 ``[T, H, W, 3]``."""
    ids = torch.tensor([prompt_ids(question, tokenizer, config, len(images))])
    pixels = clip_preprocess(images, config.vision_config.image_size)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "event_pixel_values": pixels[None],
    }
