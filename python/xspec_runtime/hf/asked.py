"""What a call to `generate` asks for: its law, where it ends, and what is not supported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.generation import (
    EosTokenCriteria,
    MaxLengthCriteria,
    PrefixConstrainedLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ..drafters.base import MAX_ROWS
from ..drafters.ngram import NgramMemory

# Warpers that the sampling ops do, in the order in which they do them.
_LAW = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper)


@dataclass
class Asked:
    """A call's own conditions.

    Attributes:
        processors: applied to logits before the law.
        warpers: what the law below stands for, as transformers writes it.
        criteria: those that neither a length nor end tokens stand for.
    """

    processors: LogitsProcessorList
    warpers: LogitsProcessorList
    criteria: StoppingCriteriaList
    ends: tuple[int, ...]
    max_new_tokens: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    @classmethod
    def of(
        cls,
        input_ids: torch.Tensor,
        processors: LogitsProcessorList | None,
        criteria: StoppingCriteriaList | None,
        config: GenerationConfig,
    ) -> Asked:
        """Length, end tokens and the warpers that the ops do are taken out of the lists."""
        criteria = criteria or ()
        rest = [c for c in criteria if not isinstance(c, (MaxLengthCriteria, EosTokenCriteria))]
        found = [c.eos_token_id for c in criteria if isinstance(c, EosTokenCriteria)]
        ends = {int(end) for tokens in found for end in tokens}
        longest = [c.max_length for c in criteria if isinstance(c, MaxLengthCriteria)]
        length = min(longest, default=config.max_length)
        before, warpers = _split(list(processors or ())) if config.do_sample else (processors, ())
        law: dict[str, float] = {"temperature": 1.0} if config.do_sample else {}
        for one in warpers:
            if isinstance(one, TemperatureLogitsWarper):
                law["temperature"] = one.temperature
            elif isinstance(one, TopKLogitsWarper):
                law["top_k"] = one.top_k
            else:
                law["top_p"] = one.top_p
        return cls(
            LogitsProcessorList(before or ()),
            LogitsProcessorList(warpers),
            StoppingCriteriaList(rest),
            tuple(sorted(ends)),
            max(1, length - input_ids.shape[1]),
            **law,
        )

    def processors_of(self, index: int) -> LogitsProcessorList:
        """`processors` for one prompt, where they hold a number for each."""
        return LogitsProcessorList(_of_prompt(one, index) for one in self.processors)


class RowProcessor:
    """A call's processors for one of its prompts, whose padding they see as in `generate`.

    Args:
        padded: the prompt with its padding, ``[1, L]``.
        padding: how much of that is padding.
        kept: gets the scores of every emitted token.
    """

    def __init__(
        self,
        processors: LogitsProcessorList,
        padded: torch.Tensor,
        padding: int,
        kept: list[torch.Tensor] | None = None,
    ) -> None:
        self.processors, self.padding, self.kept = processors, padded[:, :padding], kept

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.padding.shape[1]:
            input_ids = torch.cat([self.padding, input_ids], 1)
        scores = self.processors(input_ids, scores)
        if self.kept is not None:
            self.kept.append(scores.clone())
        return scores


def check(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    config: GenerationConfig,
    processors: Sequence[LogitsProcessor],
    model_kwargs: Mapping[str, Any],
    own: Mapping[str, Any],
) -> None:
    """Raise `ValueError` naming the first thing that is not supported; `own` are the ``xspec_``
    keywords.
    """
    many, text = len(input_ids) > 1, model.config.get_text_config()
    cache = model_kwargs.get("past_key_values")
    kinds = {type(one) for one in processors}
    scored = config.return_dict_in_generate and (config.output_scores or config.output_logits)
    refusals = (
        (model.config.is_encoder_decoder, "an encoder-decoder model"),
        (getattr(model, "_is_stateful", False), f"{type(model).__name__}: it keeps a state"),
        (
            not getattr(model, "_supports_sdpa", True),
            f"{type(model).__name__}: its attention is not SDPA",
        ),
        (bool(getattr(text, "alibi", False)), f"{type(model).__name__}: it has no positions"),
        (
            getattr(text, "kv_lora_rank", None) is not None,
            f"{type(model).__name__}: its keys and values differ in width",
        ),
        ((config.num_beams or 1) > 1, f"num_beams={config.num_beams}"),
        (bool(config.output_attentions), "output_attentions"),
        (bool(config.output_hidden_states), "output_hidden_states"),
        (config.prefill_chunk_size is not None, "prefill_chunk_size"),
        (model_kwargs.get("inputs_embeds") is not None, "inputs_embeds"),
        (
            cache is not None and int(cache.get_seq_length()) > 0,
            "past_key_values that hold tokens: give the whole text instead",
        ),
        (many and bool(scored), "scores or logits of several prompts"),
        (many and own["xspec_drafter"] is not None, "xspec_drafter with several prompts"),
        (many and own["xspec_streamer"] is not None, "xspec_streamer with several prompts"),
        (
            many and PrefixConstrainedLogitsProcessor in kinds,
            "prefix_allowed_tokens_fn with several prompts",
        ),
    )
    for wrong, what in refusals:
        if wrong:
            raise ValueError(f"xspec_runtime.hf.generate does not support {what}")
    rows = own["xspec_rows"]
    if not 1 <= rows <= MAX_ROWS:
        raise ValueError(f"xspec_rows must be in 1..{MAX_ROWS}, got {rows}")
    memory = own["xspec_memory"]
    if not isinstance(memory, bool | NgramMemory):
        raise ValueError(
            f"xspec_memory must be True, False or an NgramMemory, got {type(memory).__name__}"
        )


def _of_prompt(processor: LogitsProcessor, index: int) -> LogitsProcessor:
    """A penalty that ignores the padding of every prompt, for one of them."""
    ignored = getattr(processor, "prompt_ignore_length", None)
    if not torch.is_tensor(ignored):
        return processor
    alone = copy(processor)
    alone.prompt_ignore_length = ignored[index : index + 1]
    return alone


def _split(
    processors: list[LogitsProcessor],
) -> tuple[list[LogitsProcessor], list[LogitsProcessor]]:
    """Processors, and the warpers at their end that the ops can do; none of those if others stand
    among or behind them: then they work as processors, and what they leave is sampled from.
    """
    places = [_LAW.index(type(one)) if type(one) in _LAW else -1 for one in processors]
    first = next((i for i, place in enumerate(places) if place >= 0), len(places))
    law = places[first:]
    plain = all(
        type(one) is not TopPLogitsWarper or one.min_tokens_to_keep == 1
        for one in processors[first:]
    )
    if plain and -1 not in law and sorted(set(law)) == law:
        return processors[:first], processors[first:]
    return processors, []
