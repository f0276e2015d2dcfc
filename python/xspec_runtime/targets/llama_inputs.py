"""The embedded prompt of `LlamaTarget`: token rows, with media features in their places."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from xspec_kernels import embed, ranges


class Media(NamedTuple):
    """How a model turns one input into rows: its method, and where its configuration names the
    placeholder that they replace.
    """

    method: str
    token: str


MEDIA = {
    "pixel_values_videos": Media("get_video_features", "video_token_id"),
    "pixel_values": Media("get_image_features", "image_token_id"),
    "pixel_values_images": Media("get_image_features", "image_token_id"),
    "event_pixel_values": Media("get_event_features", "event_token_id"),
}
_IGNORED = {"input_ids", "token_type_ids", "mm_token_type_ids"}


def embed_prompt(
    inputs: Mapping[str, torch.Tensor],
    table: torch.Tensor,
    model: PreTrainedModel | None,
    backend: str = "auto",
) -> torch.Tensor:
    """Rows ``[L, D]`` of a prompt.

    Args:
        inputs: `input_ids` ``[1, L]`` and what `MEDIA` names.
        table: the embedding ``[V, D]``.
        model: whose towers and projector see the media; None takes text alone.

    Raises:
        ValueError: an id is outside the table, an input is not understood, rows are masked or have
            positions of their own, or features and placeholders differ in number.
    """
    ids = inputs["input_ids"][0]
    low, high = ids.aminmax() if len(ids) else (-1, -1)
    if low < 0 or high >= len(table):
        raise ValueError(f"input_ids must be in 0..{len(table) - 1}, got {int(low)}..{int(high)}")
    rows = embed(ids, table, backend=backend)
    for name, value in inputs.items():
        if value is None or name in _IGNORED:
            continue
        if name in MEDIA and model is not None:
            rows = _with_features(rows, ids, value, MEDIA[name], model)
        elif name == "attention_mask":
            if not value.bool().all():
                raise ValueError("attention_mask hides rows; give the prompt without padding")
        elif name == "position_ids":
            if not torch.equal(value.flatten(), torch.arange(len(ids), device=value.device)):
                raise ValueError(f"position_ids must be 0..{len(ids) - 1}")
        else:
            known = ", ".join(sorted({"attention_mask", "position_ids", *_IGNORED, *MEDIA}))
            raise ValueError(f"LlamaTarget has no use for {name}; it takes {known}")
    return rows


def _with_features(
    rows: torch.Tensor, ids: torch.Tensor, value: torch.Tensor, media: Media, model: PreTrainedModel
) -> torch.Tensor:
    """`rows` with the features of `value` in place of the placeholders."""
    method = getattr(model.base_model, media.method, None)
    placeholder = getattr(model.config, media.token, None)
    if method is None or placeholder is None:
        raise ValueError(f"{type(model).__name__} has no {media.method} with {media.token}")
    with ranges.range_("target.vision", value.shape[:-3].numel()):
        features = method(value)
    features = getattr(features, "pooler_output", features).reshape(-1, rows.shape[1])
    places = ids == placeholder
    if int(places.sum()) != len(features):
        raise ValueError(
            f"the prompt has {int(places.sum())} placeholders, the media give {len(features)} rows"
        )
    return rows.masked_scatter(places[:, None], features.to(rows.dtype))
