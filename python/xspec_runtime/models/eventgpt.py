"""EventGPT: an event-camera language model, as a transformers model.

CLIP features of every event image -> projector -> feature adaptor, applied once -> spatio-temporal
pooling -> Llama. T images of P patch tokens give T + P event tokens: the mean of each image, then
the mean of each patch over time. Structure and layer names follow the published EventGPT-7B (CLIP
ViT-L/14-336 with the CLS token kept and no final layer norm, Vicuna-7B).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn
from transformers import (
    AutoModel,
    CLIPVisionConfig,
    GenerationMixin,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

MARKERS = ("text", "special")


class EventGPTConfig(PreTrainedConfig):
    """Configuration of `EventGPTForConditionalGeneration`.

    Args:
        vision_config: `CLIPVisionConfig` or its dictionary.
        text_config: `LlamaConfig` or its dictionary.
        event_token_id: placeholder id; one per event token in the prompt.
        num_frames: event images per request (the published model was trained with 5).
        adaptor_passes: times that the feature adaptor is applied. The published model is meant for
            1; the recordings published with it were made with 2, an error that 2 reproduces.
        event_markers: whether ``<ev_start>`` and ``<ev_end>`` are tokens of their own (`special`)
            or are spelled out (`text`).
    """

    model_type = "eventgpt"
    sub_configs: ClassVar = {"vision_config": CLIPVisionConfig, "text_config": LlamaConfig}

    def __init__(
        self,
        vision_config: CLIPVisionConfig | dict | None = None,
        text_config: LlamaConfig | dict | None = None,
        event_token_id: int = 32000,
        num_frames: int = 1,
        tie_word_embeddings: bool = False,
        adaptor_passes: int = 1,
        event_markers: str = "text",
        **kwargs,
    ) -> None:
        if adaptor_passes not in (1, 2):
            raise ValueError(f"adaptor_passes must be 1 or 2, got {adaptor_passes!r}")
        if event_markers not in MARKERS:
            raise ValueError(f"event_markers must be {' or '.join(MARKERS)}, got {event_markers!r}")
        self.vision_config = (
            vision_config
            if isinstance(vision_config, CLIPVisionConfig)
            else CLIPVisionConfig(**(vision_config or {}))
        )
        self.text_config = (
            text_config
            if isinstance(text_config, LlamaConfig)
            else LlamaConfig(**(text_config or {}))
        )
        self.event_token_id = event_token_id
        self.num_frames = num_frames
        self.adaptor_passes = adaptor_passes
        self.event_markers = event_markers
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)

    @property
    def event_tokens(self) -> int:
        """Event tokens of one request: T + P, P counting the CLS token."""
        side = self.vision_config.image_size // self.vision_config.patch_size
        return self.num_frames + side * side + 1


class EventGPTPreTrainedModel(PreTrainedModel):
    config_class = EventGPTConfig
    base_model_prefix = "model"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _skip_keys_device_placement: ClassVar = ["past_key_values"]


class EventGPTModel(EventGPTPreTrainedModel):
    """Tower, connector and language model without the head."""

    def __init__(self, config: EventGPTConfig) -> None:
        super().__init__(config)
        vision, text = config.vision_config.hidden_size, config.text_config.hidden_size
        self.visual_tower = AutoModel.from_config(config.vision_config)
        self.visual_projector = nn.Sequential(
            nn.Linear(vision, text), nn.GELU(), nn.Linear(text, text)
        )
        self.feature_adaptor = nn.Linear(text, text)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.embed_tokens

    def get_event_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Event images ``[B, T, 3, H, W]`` -> event tokens ``[B, T + P, D]``."""
        if pixel_values.dim() != 5:
            raise ValueError(
                f"event images must be [batch, frames, 3, height, width], got shape "
                f"{tuple(pixel_values.shape)}"
            )
        batch, frames = pixel_values.shape[:2]
        patches = self.visual_tower(pixel_values.flatten(0, 1)).last_hidden_state
        tokens = self.feature_adaptor(self.visual_projector(patches))
        tokens = tokens.unflatten(0, (batch, frames))
        pooled = torch.cat([tokens.mean(2), tokens.mean(1)], 1)
        return pooled if self.config.adaptor_passes == 1 else self.feature_adaptor(pooled)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        event_pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if event_pixel_values is not None:
            features = self.get_event_features(event_pixel_values).to(inputs_embeds.dtype)
            slots = input_ids == self.config.event_token_id
            if int(slots.sum()) != features.shape[0] * features.shape[1]:
                raise ValueError(
                    f"the prompt has {int(slots.sum())} event placeholders, the event images give "
                    f"{features.shape[0] * features.shape[1]} tokens"
                )
            inputs_embeds = inputs_embeds.masked_scatter(slots.unsqueeze(-1), features)
        return self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )


class EventGPTForConditionalGeneration(EventGPTPreTrainedModel, GenerationMixin):
    """EventGPT with its language-model head."""

    _tied_weights_keys: ClassVar = {"lm_head.weight": "model.language_model.embed_tokens.weight"}

    def __init__(self, config: EventGPTConfig) -> None:
        super().__init__(config)
        self.model = EventGPTModel(config)
        self.lm_head = nn.Linear(
            config.text_config.hidden_size, config.text_config.vocab_size, bias=False
        )
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        event_pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Logits ``[B, L, V]`` (the last `logits_to_keep` positions; 0 keeps all)."""
        outputs = self.model(
            input_ids=input_ids,
            event_pixel_values=event_pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.lm_head(outputs.last_hidden_state[:, -logits_to_keep:])
        return CausalLMOutputWithPast(logits=logits, past_key_values=outputs.past_key_values)

    def prepare_inputs_for_generation(
        self, input_ids, event_pixel_values=None, is_first_iteration=False, **kwargs
    ):
        inputs = super().prepare_inputs_for_generation(
            input_ids, is_first_iteration=is_first_iteration, **kwargs
        )
        if is_first_iteration or not kwargs.get("use_cache", True):
            inputs["event_pixel_values"] = event_pixel_values
        return inputs
