"""Drop-in for transformers: ``model.generate(**inputs, custom_generate=hf.generate)``.

Greedy answers are those of plain `generate` outside near ties, sampled ones follow the same law
(with draws of our own: the same seed gives other tokens than transformers, and the same ones from
call to call). Drafts come from a memory of past answers of the same model object, from the prompt
and from the answer itself, unless a drafter is given; rows are verified where they pay.

Privacy: the memory keeps the token ids of what was generated, in this process, until the model is
gone or `forget` is called; it shows in nothing but speed. `xspec_memory=False` keeps nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.generation import (
    EosTokenCriteria,
    GenerateDecoderOnlyOutput,
    MaxLengthCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

from .batch import BatchDecoder, BatchPrompt
from .calibration import calibrate
from .config import SpecConfig
from .drafters.base import MAX_ROWS, Drafter, DraftTree
from .drafters.ngram import NgramDrafter, NgramMemory
from .engine import Generation, SpeculativeDecoder
from .policy import PricedDrafter
from .targets.attention import ATTENTION, use_tree_attention
from .targets.greedy import Verdict
from .targets.transformers import TransformersTarget

ROWS = 16
# Answers to unrelated prompts share phrases, not words: short contexts tell little.
LOW_SHARE = 0.3
_SLACK = 1.5  # a cache that is too short is replaced by one this much longer than needed
_LEAST = 256  # rows of a cache: verifies are timed in it
_UNUSED = ("use_cache", "logits_to_keep", "past_key_values", "cache_position", "tokenizer")


@dataclass
class _State:
    """What is kept for a model between calls."""

    memory: NgramMemory
    target: _ScoringTarget | None = None
    costs: dict[int, list[float]] = field(default_factory=dict)


_STATES: WeakKeyDictionary[PreTrainedModel, _State] = WeakKeyDictionary()


class _ScoringTarget(TransformersTarget):
    """Remembers the logits of emitted tokens while asked to."""

    def __init__(self, model: PreTrainedModel, capacity: int) -> None:
        self.scores: list[torch.Tensor] | None = None
        super().__init__(model, capacity)

    def accept(self, tree: DraftTree, logits: torch.Tensor, context: Sequence[int]) -> Verdict:
        verdict = super().accept(tree, logits, context)
        if self.scores is not None:
            path = [] if verdict.path is None else verdict.path[0, : verdict.accepted].tolist()
            self.scores += [logits[node : node + 1].float() for node in (0, *path)]
        return verdict


def enable(model: PreTrainedModel) -> PreTrainedModel:
    """Switch the model's text attention to the one that verifies trees; every other pass goes
    through SDPA. `generate` does so by itself for the length of a call.
    """
    use_tree_attention(model)
    return model


def memory_of(model: PreTrainedModel) -> NgramMemory:
    """The memory that calls on `model` share; it may be saved, and shared with other models of the
    same vocabulary (`set_memory`).
    """
    return _state(model).memory


def set_memory(model: PreTrainedModel, memory: NgramMemory | str | Path) -> None:
    """Let calls on `model` share this memory, or the one that `NgramMemory.save` wrote."""
    _state(model).memory = (
        memory if isinstance(memory, NgramMemory) else NgramMemory.load(Path(memory))
    )


def forget(model: PreTrainedModel) -> None:
    """Drop everything that is kept for `model`."""
    _STATES.pop(model, None)


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList | None = None,
    stopping_criteria: StoppingCriteriaList | None = None,
    generation_config: GenerationConfig | None = None,
    xspec_rows: int = ROWS,
    xspec_drafter: Drafter | None = None,
    xspec_memory: bool | NgramMemory = True,
    xspec_streamer: BaseStreamer | None = None,
    xspec_seed: int = 0,
    **model_kwargs: Any,
) -> torch.Tensor | GenerateDecoderOnlyOutput:
    """For `custom_generate`; the keywords starting with ``xspec_`` are given to `model.generate`.

    Args:
        xspec_rows: rows of a verify at most, root included; 1 is plain decoding.
        xspec_drafter: asked instead of the memory, for a single prompt.
        xspec_memory: False keeps nothing and drafts from the prompt and this answer alone; or a
            memory of your own.
        xspec_streamer: transformers does not hand `streamer` on to a callable.
        xspec_seed: of the draws where the call samples.

    Returns:
        What `generate` returns: ids ``[B, T]``, padded at the end, or with
        `return_dict_in_generate` an output with `sequences`, and `scores`, `logits` and the filled
        cache for a single prompt.

    Raises:
        ValueError: the call asks for something that is not supported; the message names it.
        RuntimeError: the target's logits are NaN.
    """
    config = generation_config or model.generation_config
    _check(model, input_ids, config, xspec_rows, xspec_drafter, model_kwargs)
    asked = _Asked.of(input_ids, logits_processor, stopping_criteria, config)
    wanted = asked.max_new_tokens
    state = _state(model)
    restore = model.config.get_text_config()._attn_implementation
    enable(model)
    try:
        target = _target(state, model, input_ids.shape[1] + wanted + xspec_rows)
        settings = SpecConfig(
            xspec_rows, wanted, asked.ends, temperature=asked.temperature, top_k=asked.top_k,
            top_p=asked.top_p, seed=xspec_seed,
        )  # fmt: skip
        rows = [_row(model, input_ids, model_kwargs, i) for i in range(len(input_ids))]
        make = _drafters(state, target, settings, xspec_drafter, xspec_memory)
        answers = _answer(target, settings, make, rows, asked, config, xspec_streamer)
        return _result(input_ids, answers, asked, target, config, model_kwargs)
    finally:
        if restore not in (ATTENTION, "sdpa"):
            nested = "text_config" in getattr(model.config, "sub_configs", {})
            model.set_attn_implementation({"text_config": restore} if nested else restore)


@dataclass
class _Asked:
    """A call's own conditions."""

    processor: LogitsProcessorList
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
        processor: LogitsProcessorList | None,
        criteria: StoppingCriteriaList | None,
        config: GenerationConfig,
    ) -> _Asked:
        """Length, end tokens and the warpers that the ops do are taken out of the lists."""
        rest = [
            c for c in criteria or () if not isinstance(c, (MaxLengthCriteria, EosTokenCriteria))
        ]
        ends = {
            int(e)
            for c in criteria or ()
            if isinstance(c, EosTokenCriteria)
            for e in c.eos_token_id
        }
        longest = [c.max_length for c in criteria or () if isinstance(c, MaxLengthCriteria)]
        length = min(longest, default=config.max_length)
        law: dict[str, float] = {}
        kept = []
        for one in processor or ():
            if isinstance(one, TemperatureLogitsWarper):
                law["temperature"] = one.temperature
            elif isinstance(one, TopKLogitsWarper):
                law["top_k"] = one.top_k
            elif isinstance(one, TopPLogitsWarper):
                law["top_p"] = one.top_p
            elif law:
                raise ValueError(f"{type(one).__name__} after temperature, top-k or top-p")
            else:
                kept.append(one)
        if config.do_sample:
            law = {"temperature": 1.0} | law
        return cls(
            LogitsProcessorList(kept),
            StoppingCriteriaList(rest),
            tuple(sorted(ends)),
            max(1, length - input_ids.shape[1]),
            **law,
        )


def _state(model: PreTrainedModel) -> _State:
    if model not in _STATES:
        _STATES[model] = _State(NgramMemory(recency=0, low_share=LOW_SHARE))
    return _STATES[model]


def _target(state: _State, model: PreTrainedModel, rows: int) -> _ScoringTarget:
    """The model's target, its cache long enough."""
    if state.target is None or state.target.cache.capacity < rows:
        state.target = _ScoringTarget(model, max(_LEAST, int(_SLACK * rows)))
    state.target.scores = None
    return state.target


def _drafters(
    state: _State,
    target: TransformersTarget,
    config: SpecConfig,
    drafter: Drafter | None,
    memory: bool | NgramMemory,
):
    """What makes the drafter of a request."""
    if config.rows < 2:
        return lambda: None
    if drafter is not None:
        return lambda: drafter
    if config.rows not in state.costs:
        state.costs[config.rows] = calibrate(target, config.rows).costs()
    costs = state.costs[config.rows]
    fresh = memory is False
    shared = NgramMemory(recency=0, low_share=LOW_SHARE) if fresh else state.memory
    if isinstance(memory, NgramMemory):
        shared = memory
    return lambda: PricedDrafter(NgramDrafter(shared, online=not fresh), costs)


def _answer(
    target: _ScoringTarget,
    settings: SpecConfig,
    make,
    rows: list[dict[str, torch.Tensor]],
    asked: _Asked,
    config: GenerationConfig,
    streamer: BaseStreamer | None,
) -> list[list[int]]:
    """Tokens of every row."""
    watches = [_Watch(row["input_ids"], asked.criteria) for row in rows]

    def tell(index: int, tokens: list[int]) -> None:
        new = watches[index].see(tokens)
        if streamer and new:
            streamer.put(torch.tensor(new))

    processor = asked.processor or None
    if len(rows) == 1:
        if config.return_dict_in_generate and (config.output_scores or config.output_logits):
            target.scores = []
        decoder = SpeculativeDecoder(target, make(), settings)
        found = [
            decoder.generate(
                rows[0], None, processor, lambda tokens: tell(0, tokens), stop=watches[0].stop
            )
        ]
    else:
        decoder = BatchDecoder(target, make, settings, batch=len(rows))
        prompts = [
            BatchPrompt(row, None, processor, stop=watch.stop)
            for row, watch in zip(rows, watches, strict=True)
        ]
        found = decoder.generate(prompts, tell)
    if streamer:
        streamer.end()
    return [_final(answer, watch) for answer, watch in zip(found, watches, strict=True)]


def _final(answer: Generation, watch: _Watch) -> list[int]:
    return answer.tokens if watch.cut is None else answer.tokens[: watch.cut]


class _Watch:
    """Stopping criteria after every token of one answer; the first that says so cuts it."""

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


def _result(
    input_ids: torch.Tensor,
    answers: list[list[int]],
    asked: _Asked,
    target: _ScoringTarget,
    config: GenerationConfig,
    model_kwargs: Mapping[str, Any],
) -> torch.Tensor | GenerateDecoderOnlyOutput:
    pad = getattr(config, "_pad_token_tensor", None)
    pad = 0 if pad is None else int(pad)
    longest = max(map(len, answers))
    padded = [answer + [pad] * (longest - len(answer)) for answer in answers]
    sequences = torch.cat([input_ids, input_ids.new_tensor(padded)], 1)
    if not config.return_dict_in_generate:
        return sequences
    scores = logits = None
    if target.scores is not None:
        kept = target.scores[:longest]
        logits = tuple(kept) if config.output_logits else None
        if config.output_scores:
            length = input_ids.shape[1]
            scores = tuple(
                asked.processor(sequences[:, : length + i], row.clone())
                for i, row in enumerate(kept)
            )
    cache = model_kwargs.get("past_key_values")
    if len(answers) == 1 and isinstance(cache, DynamicCache):
        # An answer's last token is never fed, here as in transformers.
        keep = sequences.shape[1] - 1
        for number, layer in enumerate(target.cache.layers):
            cache.update(layer.keys[:, :, :keep].clone(), layer.values[:, :, :keep].clone(), number)
    return GenerateDecoderOnlyOutput(
        sequences=sequences, scores=scores, logits=logits, past_key_values=cache
    )


def _row(
    model: PreTrainedModel, input_ids: torch.Tensor, model_kwargs: Mapping[str, Any], index: int
) -> dict[str, torch.Tensor]:
    """The inputs of one prompt, without its padding."""
    mask = model_kwargs.get("attention_mask")
    start = 0 if mask is None else int(mask[index].argmax())
    if mask is not None and not bool(mask[index, start:].all()):
        raise ValueError(f"attention_mask hides tokens within prompt {index}; pad at its left")
    ids = input_ids[index : index + 1, start:]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for name, value in model_kwargs.items():
        if value is None or name in _UNUSED or name == "attention_mask":
            continue
        if name == "position_ids":
            if value.dim() == 3:
                inputs[name] = value[:, index : index + 1, start:]
        elif name == "mm_encoder_outputs":
            parts = _media_of(model, input_ids, value, index)
            if parts:
                inputs[name] = parts
        elif len(input_ids) == 1 or not torch.is_tensor(value):
            inputs[name] = value
        elif value.shape[:2] == input_ids.shape:
            inputs[name] = value[index : index + 1, start:]
        elif value.shape[0] == len(input_ids):
            inputs[name] = value[index : index + 1]
        else:
            raise ValueError(
                f"{name} of shape {list(value.shape)} cannot be dealt to {len(input_ids)} prompts; "
                "generate one by one"
            )
    return inputs


def _media_of(
    model: PreTrainedModel, input_ids: torch.Tensor, encoded: Mapping[str, Any], index: int
) -> dict[str, Any]:
    """Encoded media of one prompt: features fill placeholders in order, row after row."""
    if len(input_ids) == 1:
        return dict(encoded)
    out = {}
    for kind, output in encoded.items():
        if output is None:
            continue
        others = [k for k, v in output.items() if v is not None and k not in _ENCODER_FIELDS]
        if others:
            raise ValueError(
                f"{kind} features with {others[0]} cannot be dealt to several prompts; generate "
                "one by one"
            )
        counts = (input_ids == getattr(model.config, f"{kind}_token_id")).sum(1).tolist()
        first = sum(counts[:index])
        if not counts[index]:
            continue
        features = output.pooler_output
        listed = isinstance(features, (list, tuple))
        flat = torch.cat(list(features)) if listed else features.flatten(0, -2)
        part = flat[first : first + counts[index]]
        whole = [part] if listed else part.reshape(*[1] * (features.dim() - 2), *part.shape)
        out[kind] = type(output)(pooler_output=whole)
    return out


_ENCODER_FIELDS = {"pooler_output", "last_hidden_state", "hidden_states", "attentions"}


def _check(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    config: GenerationConfig,
    rows: int,
    drafter: Drafter | None,
    model_kwargs: Mapping[str, Any],
) -> None:
    """Raise `ValueError` naming the first thing that is not supported."""
    batch = len(input_ids)
    cache = model_kwargs.get("past_key_values")
    refusals = (
        (model.config.is_encoder_decoder, "an encoder-decoder model"),
        ((config.num_beams or 1) > 1, f"num_beams={config.num_beams}"),
        (bool(config.output_attentions), "output_attentions"),
        (bool(config.output_hidden_states), "output_hidden_states"),
        (config.prefill_chunk_size is not None, "prefill_chunk_size"),
        (model_kwargs.get("inputs_embeds") is not None, "inputs_embeds"),
        (
            cache is not None and int(cache.get_seq_length()) > 0,
            "past_key_values that hold tokens: give the whole text instead",
        ),
        (
            batch > 1
            and bool(config.return_dict_in_generate)
            and bool(config.output_scores or config.output_logits),
            "scores or logits of several prompts",
        ),
        (batch > 1 and drafter is not None, "xspec_drafter with several prompts"),
    )
    for wrong, what in refusals:
        if wrong:
            raise ValueError(f"xspec_runtime.hf.generate does not support {what}")
    if not 1 <= rows <= MAX_ROWS:
        raise ValueError(f"xspec_rows must be in 1..{MAX_ROWS}, got {rows}")
