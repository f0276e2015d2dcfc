"""The inputs of `generate` dealt to its prompts: each gets its own rows, without padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedConfig

_UNUSED = (
    "attention_mask", "cache_position", "logits_to_keep", "past_key_values", "tokenizer",
    "use_cache",
)  # fmt: skip
_ENCODER_FIELDS = {"pooler_output", "last_hidden_state", "hidden_states", "attentions"}
# What holds the media of all prompts one after the other.
_MEDIA = {
    "image": ("pixel_values", "image_grid_thw"),
    "video": ("pixel_values_videos", "video_grid_thw", "second_per_grid_ts"),
}


def deal(
    config: PreTrainedConfig, input_ids: torch.Tensor, model_kwargs: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The inputs of every prompt.

    Args:
        config: the model's.
        input_ids: ``[B, L]``, padded at the left where `attention_mask` is 0.
        model_kwargs: what `generate` hands to its decoding method.

    Raises:
        ValueError: a mask hides tokens within a prompt, or an input cannot be dealt.
    """
    given = {n: v for n, v in model_kwargs.items() if v is not None and n not in _UNUSED}
    mask = model_kwargs.get("attention_mask")
    encoded = given.pop("mm_encoder_outputs", None)
    places = [_start(mask, index) for index in range(len(input_ids))]
    rows = []
    for index, start in enumerate(places):
        ids = input_ids[index : index + 1, start:]
        rows.append({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    if len(rows) == 1:
        # Text positions count from the padding on, which is gone.
        if "position_ids" in given:
            given["position_ids"] = given["position_ids"][..., places[0] :]
        rows[0] |= {n: v for n, v in given.items() if n != "position_ids" or v.dim() == 3}
        if encoded:
            rows[0]["mm_encoder_outputs"] = encoded
        return rows
    for kind, names in _MEDIA.items():
        media = {name: given.pop(name) for name in names if name in given}
        if media:
            _deal_media(rows, kind, media, _counts(config, kind, input_ids), config)
    for name, value in given.items():
        for index, start in enumerate(places):
            part = _part(name, value, input_ids, index, start)
            if part is not None:
                rows[index][name] = part
    for kind, output in (encoded or {}).items():
        if output is not None:
            _deal_encoded(rows, kind, output, _counts(config, kind, input_ids))
    return rows


def padding(model_kwargs: Mapping[str, Any], index: int) -> int:
    """Tokens of padding before a prompt."""
    mask = model_kwargs.get("attention_mask")
    return 0 if mask is None else int(mask[index].argmax())


def _start(mask: torch.Tensor | None, index: int) -> int:
    start = padding({"attention_mask": mask}, index)
    if mask is not None and not bool(mask[index, start:].all()):
        raise ValueError(f"attention_mask hides tokens within prompt {index}; pad at its left")
    return start


def _part(name: str, value: Any, input_ids: torch.Tensor, index: int, start: int) -> Any:
    """One prompt's part of an input; None: it needs none."""
    if name == "position_ids":
        return value[:, index : index + 1, start:] if value.dim() == 3 else None
    if not torch.is_tensor(value):
        return value
    if value.shape[:2] == input_ids.shape:
        return value[index : index + 1, start:]
    if value.dim() and value.shape[0] == len(input_ids):
        return value[index : index + 1]
    raise _undealt(f"{name} of shape {list(value.shape)}")


def _undealt(what: str) -> ValueError:
    return ValueError(f"{what} cannot be dealt to several prompts; generate one by one")


def _counts(config: PreTrainedConfig, kind: str, input_ids: torch.Tensor) -> list[int]:
    """Placeholders of every prompt."""
    token = getattr(config, f"{kind}_token_id", None)
    token = getattr(config, f"{kind}_token_index", None) if token is None else token
    if token is None:
        raise _undealt(f"{kind}s of a {config.model_type} model")
    return (input_ids == token).sum(1).tolist()


def _deal_media(
    rows: Sequence[dict[str, Any]],
    kind: str,
    media: Mapping[str, torch.Tensor],
    counts: Sequence[int],
    config: PreTrainedConfig,
) -> None:
    """Pixels and their grids: media fill placeholders in order, prompt after prompt."""
    grid = media.get(f"{kind}_grid_thw")
    if grid is None:
        pixels = next(iter(media.values()))
        each, left = divmod(sum(counts), max(1, len(pixels)))
        if left or not each:
            raise _undealt(f"{len(pixels)} {kind}s with {sum(counts)} placeholders")
        sizes, patches = [each] * len(pixels), [1] * len(pixels)
    else:
        patches = grid.prod(1).tolist()
        sizes = [rows_ // config.vision_config.spatial_merge_size**2 for rows_ in patches]
    item = 0
    for row, count in zip(rows, counts, strict=True):
        first = item
        while count > 0 and item < len(sizes):
            count -= sizes[item]
            item += 1
        if count:
            raise _undealt(f"{kind}s whose placeholders end within a prompt")
        low, high = sum(patches[:first]), sum(patches[:item])
        for name, value in media.items():
            part = value[low:high] if name.startswith("pixel") else value[first:item]
            if item > first:
                row[name] = part


def _deal_encoded(
    rows: Sequence[dict[str, Any]], kind: str, output: Any, counts: Sequence[int]
) -> None:
    """Features that exist already fill placeholders in the same order."""
    others = [k for k, v in output.items() if v is not None and k not in _ENCODER_FIELDS]
    if others:
        raise _undealt(f"{kind} features with {others[0]}")
    features = output.pooler_output
    listed = isinstance(features, (list, tuple))
    flat = torch.cat(list(features)) if listed else features.flatten(0, -2)
    first = 0
    for row, count in zip(rows, counts, strict=True):
        if count:
            part = flat[first : first + count]
            whole = [part] if listed else part.reshape(*[1] * (features.dim() - 2), *part.shape)
            row.setdefault("mm_encoder_outputs", {})[kind] = type(output)(pooler_output=whole)
        first += count
