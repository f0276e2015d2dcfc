"""A draft that sees events and a target that sees video, behind one face: embedded or full size."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from transformers import (
    LlavaForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    VideoLlavaForConditionalGeneration,
)

from ..data.events import event_images, load_events
from ..data.images import clip_preprocess, resize
from ..data.video import load_video
from ..errors import out_of_memory
from ..files import read_json
from ..nf4_dense import keep_dense
from ..nf4_model import quantize_model
from ..prefill import placeholder_ids
from ..vocab import compare, load_tokenizer
from . import mini
from .eventgpt import EventGPTForConditionalGeneration
from .eventgpt_prompt import eventgpt_inputs

Inputs = dict[str, torch.Tensor]
FRAMES = 8


class VlmPair(Protocol):
    """Both models and what turns files into their inputs, in the steps that are timed apart.

    Attributes:
        draft, target: the models; `modules_of` names the parts of each that see.
        stop_ids: tokens that end an answer.
    """

    draft: PreTrainedModel
    target: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    stop_ids: tuple[int, ...]

    def read_events(self, path: Path) -> object:
        """Load an event stream."""

    def draft_inputs(self, events: object, question: str) -> Inputs:
        """Rasterize, resize and tokenize."""

    def read_video(self, path: Path, mode: str) -> np.ndarray:
        """Decode frames uint8 ``[8, H, W, 3]``; `mode` as in `data.video.frame_indices`."""

    def target_inputs(self, frames: np.ndarray, question: str) -> Inputs:
        """Resize, normalize and tokenize."""


def vision_modules(model: PreTrainedModel) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The first and the last module that media pass through.

    Raises:
        ValueError: the model is none of a pair.
    """
    body = model.base_model
    for first, last in (
        ("visual_tower", "feature_adaptor"),
        ("video_tower", "multi_modal_projector"),
        ("vision_tower", "multi_modal_projector"),
    ):
        if hasattr(body, first) and hasattr(body, last):
            return getattr(body, first), getattr(body, last)
    raise ValueError(f"{type(model).__name__} has no vision tower that is known here")


class EmbeddedPair:
    """The pair in the package."""

    def __init__(self, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self.device, self.dtype = device, dtype
        self.tokenizer = mini.load_tokenizer()
        self.draft = mini.load("draft", device=device, dtype=dtype)
        self.target = mini.load("target", device=device, dtype=dtype)
        self.stop_ids = (mini.EOS,)

    def read_events(self, path: Path) -> object:
        return load_events(path)

    def draft_inputs(self, events: object, question: str) -> Inputs:
        image = resize(event_images(events, 1), mini.IMAGE_SIZE, "squash")[0]
        return _moved(mini.draft_inputs(question, image, self.tokenizer), self.device, self.dtype)

    def read_video(self, path: Path, mode: str) -> np.ndarray:
        return load_video(path, mini.FRAMES, mode)

    def target_inputs(self, frames: np.ndarray, question: str) -> Inputs:
        small = resize(frames, mini.IMAGE_SIZE, "squash")
        return _moved(mini.target_inputs(question, small, self.tokenizer), self.device, self.dtype)


class FolderPair:
    """A converted EventGPT (`xspec convert`) and Video-LLaVA or LLaVA-1.5 in transformers' layout.

    LLaVA-1.5 sees one image: the middle one of the frames.

    Args:
        draft_device: of the draft, if another than the target's.
        nf4: the linear layers of both are quantized to NF4.

    Raises:
        FileNotFoundError: a folder or its configuration is missing.
        ValueError: a model is of another kind, lacks weights or is damaged, or the draft's ids mean
            other tokens than the target's.
    """

    def __init__(
        self,
        draft: Path,
        target: Path,
        device: str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        draft_device: str = "",
        nf4: bool = False,
    ) -> None:
        self.device, self.dtype, self.nf4 = device, dtype, nf4
        self.draft_device, self.target_folder = draft_device or device, target
        self.tokenizer = load_tokenizer(str(target))
        spoken = compare(load_tokenizer(str(draft)), self.tokenizer)
        if not spoken.identical:
            raise ValueError(
                f"{draft} and {target} differ in {spoken.left_size - spoken.same_id} of "
                f"{spoken.left_size} tokens; see `xspec vocab`"
            )
        events = {"eventgpt": EventGPTForConditionalGeneration}
        self.draft = self._quantized(_load(draft, events, dtype, self.draft_device))
        self.target = self.another_target()
        ends = self.target.generation_config.eos_token_id
        self.stop_ids = tuple(ends if isinstance(ends, list) else [ends])

    def another_target(self, device: str = "") -> PreTrainedModel:
        """The target's model, loaded once more."""
        kinds = {
            "video_llava": VideoLlavaForConditionalGeneration,
            "llava": LlavaForConditionalGeneration,
        }
        return self._quantized(_load(self.target_folder, kinds, self.dtype, device or self.device))

    def _quantized(self, model: PreTrainedModel) -> PreTrainedModel:
        if self.nf4:
            quantize_model(model)
            keep_dense(model)
        return model

    @property
    def placeholders(self) -> tuple[int, ...]:
        """Tokens of the target that stand for media."""
        return tuple(placeholder_ids(self.target.config))

    def read_events(self, path: Path) -> object:
        return load_events(path)

    def draft_inputs(self, events: object, question: str) -> Inputs:
        config = self.draft.config
        inputs = eventgpt_inputs(
            question, event_images(events, config.num_frames), self.tokenizer, config
        )
        return _moved(inputs, self.draft_device, self.dtype)

    def read_video(self, path: Path, mode: str) -> np.ndarray:
        return load_video(path, FRAMES, mode)

    def target_inputs(self, frames: np.ndarray, question: str) -> Inputs:
        config = self.target.config
        size, patch = config.vision_config.image_size, config.vision_config.patch_size
        rows = (size // patch) ** 2
        if config.model_type == "llava":
            frames = frames[len(frames) // 2][None]
            media, name, placeholder = "<image>", "pixel_values", config.image_token_id
            rows += config.vision_feature_select_strategy != "default"
        else:
            media, name, placeholder = "<video>", "pixel_values_videos", config.video_token_id
            rows += 1
        pixels = clip_preprocess(frames, size)
        ids = target_prompt_ids(question, self.tokenizer, media, placeholder, rows * len(frames))
        inputs = {
            "input_ids": torch.tensor([ids]),
            "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
            name: pixels[None] if name == "pixel_values_videos" else pixels,
        }
        return _moved(inputs, self.device, self.dtype)


def target_prompt_ids(
    question: str,
    tokenizer: PreTrainedTokenizerBase,
    media: str,
    placeholder: int,
    count: int,
) -> list[int]:
    """``USER: <media>\\n{question} ASSISTANT:`` with `count` placeholders for `media`.

    Raises:
        ValueError: the question is empty or holds the media token.
    """
    if not question.strip() or media in question:
        raise ValueError(f"the question is empty or holds {media}: {question[:40]!a}")
    ids = tokenizer.encode(f"USER: {media}\n{question} ASSISTANT:")
    if ids.count(placeholder) != 1:
        raise ValueError(f"the tokenizer does not know {media} as token {placeholder}")
    at = ids.index(placeholder)
    return [*ids[:at], *[placeholder] * count, *ids[at + 1 :]]


def _load(folder: Path, kinds: dict[str, type], dtype: torch.dtype, device: str) -> PreTrainedModel:
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no model: config.json is missing")
    values = read_json(folder / "config.json")
    kind = values.get("model_type") if isinstance(values, dict) else None
    if kind not in kinds:
        raise ValueError(f"{folder} is of model type {kind!r}, expected {' or '.join(kinds)}")
    try:
        model, found = kinds[kind].from_pretrained(
            folder, dtype=dtype, output_loading_info=True, use_safetensors=True
        )
    except Exception as error:
        if out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"the model in {folder} cannot be used: {reason}") from error
    # transformers fills what a checkpoint lacks with random weights.
    if missing := sorted(found["missing_keys"]):
        raise ValueError(f"{folder} lacks {len(missing)} weights, {missing[0]} among them")
    return model.eval().to(device).requires_grad_(False)


def _moved(inputs: Inputs, device: str, dtype: torch.dtype) -> Inputs:
    return {
        key: value.to(device, dtype if value.is_floating_point() else None)
        for key, value in inputs.items()
    }
