"""Answers on their way out: stopping criteria after every token, streaming, `generate`'s output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from threading import Event
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig, StaticCache, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput

from ..kv_cache import KVCache
from .asked import Asked


class Watch:
    """Stopping criteria after every token of one answer; the first that says so cuts it.

    Args:
        prompt: ids ``[1, L]`` with their padding, which criteria see too.
    """

    def __init__(self, prompt: torch.Tensor, criteria: StoppingCriteriaList) -> None:
        self.ids, self.criteria = prompt, criteria
        self.stop = Event()
        self.cut: int | None = None
        self._known = 0

    def see(self, tokens: Sequence[int]) -> list[int]:
        """`tokens` as far as they belong to the answer."""
        if self.cut is not None:
            return []
        if not self.criteria:
            return list(tokens)
        for count, token in enumerate(tokens, 1):
            self.ids = torch.cat([self.ids, self.ids.new_tensor([[token]])], 1)
            self._known += 1
            if bool(self.criteria(self.ids, None).all()):
                self.cut = self._known
                self.stop.set()
                return list(tokens[:count])
        return list(tokens)

    def final(self, tokens: list[int]) -> list[int]:
        """The answer of all `tokens`."""
        return tokens if self.cut is None else tokens[: self.cut]


def output(
    input_ids: torch.Tensor,
    answers: Sequence[Sequence[int]],
    asked: Asked,
    config: GenerationConfig,
    logits: list[torch.Tensor] | None,
    scores: list[torch.Tensor] | None,
    rows: KVCache,
    model_kwargs: Mapping[str, Any],
) -> torch.Tensor | GenerateDecoderOnlyOutput:
    """What `generate` returns.

    Args:
        logits, scores: ``[1, V]`` after every token of a single answer or more, where asked for;
            `scores` without the warpers.
        rows: keys and values of a single prompt and its answer.
    """
    pad = getattr(config, "_pad_token_tensor", None)
    pad = 0 if pad is None else int(pad)
    longest = max(map(len, answers))
    padded = [[*answer, *[pad] * (longest - len(answer))] for answer in answers]
    sequences = torch.cat([input_ids, input_ids.new_tensor(padded)], 1)
    if not config.return_dict_in_generate:
        return sequences
    found: dict[str, Any] = {}
    if logits is not None and config.output_logits:
        found["logits"] = tuple(logits[:longest])
    if scores is not None and config.output_scores:
        length = input_ids.shape[1]
        found["scores"] = tuple(
            asked.warpers(sequences[:, : length + i], row.clone())
            for i, row in enumerate(scores[:longest])
        )
    cache = model_kwargs.get("past_key_values")
    if len(answers) == 1 and isinstance(cache, (DynamicCache, StaticCache)):
        # An answer's last token is never fed, here as in transformers.
        keep = sequences.shape[1] - 1
        for number, layer in enumerate(rows.layers):
            cache.update(layer.keys[:, :, :keep].clone(), layer.values[:, :, :keep].clone(), number)
    return GenerateDecoderOnlyOutput(sequences=sequences, past_key_values=cache, **found)
