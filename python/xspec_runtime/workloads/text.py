"""An end-to-end comparison on a causal language model in a local folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..adapters.training.draft_folder import load_float
from ..arms import Arm, DecoderArm, HfArm, Task
from ..calibration import calibrate
from ..config import SpecConfig
from ..drafters.base import Drafter, Request
from ..drafters.merge import MergedDrafter
from ..drafters.ngram import NgramDrafter, NgramMemory
from ..engine import SpeculativeDecoder
from ..nf4_checkpoint import is_nf4, load_nf4
from ..packing import pack_linears
from ..policy import PricedDrafter
from ..targets.base import Target
from ..targets.checkpoint import read_config
from ..targets.heights import CONTEXT
from .base import MAX_MATCHING_NGRAM, PLAIN, Settings, Workload, build_target, in_nf4
from .modes import Parts, mode_arms
from .spoken import Spoken, SpokenDraft, draft_of, longest_prompt, spoken_by

# Answers to unrelated prompts share phrases, not words: short contexts tell little.
TEXT_LOW_SHARE = 0.3


def text_workload(
    settings: Settings,
    target: Path,
    prompts: Sequence[str],
    draft: Path | None = None,
    middle: Path | None = None,
) -> Workload:
    """A causal language model in a local folder, its chat template applied to `prompts`.

    Args:
        draft: folder of a draft model; where its tokenizer is another, drafts are translated.
        middle: folder of the cascade's middle model, of the target's vocabulary.

    Raises:
        FileNotFoundError: a folder does not exist.
        ValueError: a checkpoint lacks weights, the draft's tokens cannot become the target's, the
            middle model has another vocabulary, or a prompt is too long for a model.
    """
    for folder in filter(None, (target, draft, middle)):
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{folder} holds no model: config.json is missing")
    load = _loader(settings)
    tokenizer = AutoTokenizer.from_pretrained(target)
    model = load(target)
    size = model.config.get_text_config().vocab_size
    if middle:
        _check_middle(middle, tokenizer, model)
    speaking = draft_model = None
    if draft:
        draft_model = load(draft, settings.drafting_device)
        speaking = spoken_by(
            draft, tokenizer, (draft_model.config.get_text_config().vocab_size, size), prompts
        )
    tasks = [_task(i, text, tokenizer, speaking, settings) for i, text in enumerate(prompts)]
    lengths = [t.inputs["input_ids"].shape[1] for t in tasks]
    longest = longest_prompt(lengths, settings.max_new_tokens, model, "model")
    capacity = max(CONTEXT, longest) + settings.max_new_tokens + settings.rows + settings.gamma + 1
    drafted = None
    if draft_model:
        own = [t.request.draft_inputs["input_ids"].shape[1] for t in tasks]
        room = settings.gamma, settings.max_new_tokens, capacity
        drafted = draft_of(draft_model, speaking, own, *room)
    packed = pack_linears(model) if settings.engine == "transformers" else 0
    runner = build_target(model, settings, capacity)
    costs = calibrate(runner, settings.rows).costs()
    record = {
        "pair": str(target),
        "packed_linears": packed,
        "row_costs": [round(cost, 3) for cost in costs],
        **(speaking.facts() if speaking else {}),
    }
    ends = _ends(model)
    arms = _text_arms(settings, runner, costs, drafted, ends)
    arms |= _hf_arms(settings, load, target, draft, tokenizer, speaking, model if packed else None)

    def again(folder: Path) -> PreTrainedModel:
        return load(folder, settings.drafting_device)

    parts = Parts(
        runner,
        lambda: again(target),
        SpecConfig(settings.rows, settings.max_new_tokens, ends, settings.prefill_fused),
        model.config.get_text_config().num_hidden_layers,
        settings.gamma,
        capacity,
        quantized=None if settings.weights == "nf4" else in_nf4,
        middle=(lambda: again(middle)) if middle else None,
    )
    arms |= mode_arms(_drafting(parts, drafted) if drafted else parts)
    return Workload(
        tasks, arms, lambda ids: tokenizer.decode(ids, skip_special_tokens=True), None, record,
        notes=[speaking.describe()] if speaking and speaking.describe() else [],
    )  # fmt: skip


def _drafting(parts: Parts, draft: SpokenDraft) -> Parts:
    """`parts` with a draft model."""
    ends, own_ends = parts.config.eos_token_ids, _ends(draft.model)
    return replace(
        parts,
        draft=lambda: draft.own(parts.gamma),
        translated=lambda drafter: draft.spoken.wrap(drafter, draft.limit),
        heard=lambda ids: draft.spoken.heard(ids, own_ends, ends),
        draft_ends=own_ends,
    )


def _loader(settings: Settings) -> Callable[..., PreTrainedModel]:
    """Loads a folder, in NF4 where `settings` or the folder say so."""

    def load(folder: Path, device: str = settings.device) -> PreTrainedModel:
        if is_nf4(folder):
            if settings.weights != "nf4":
                raise ValueError(f"{folder} is in NF4 already: add --weights nf4")
            return in_nf4(load_nf4(folder, device, settings.dtype))
        model = load_float(folder, settings.dtype).to(device)
        return in_nf4(model) if settings.weights == "nf4" else model

    return load


def _task(
    i: int,
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    speaking: Spoken | None,
    settings: Settings,
) -> Task:
    ids = chat_ids(tokenizer, text).to(settings.device)
    inputs = own = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if speaking and not speaking.direct:
        read = chat_ids(speaking.draft, text)
        own = {"input_ids": read, "attention_mask": torch.ones_like(read)}
    return Task(f"prompt {i}", inputs, Request(ids[0].tolist(), own))


def _check_middle(middle: Path, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Raise `ValueError` unless the tokens of the model in `middle` are the target's."""
    size = model.config.get_text_config().vocab_size
    found = read_config(middle).get_text_config().vocab_size
    if found != size or not spoken_by(middle, tokenizer, (found, size), ("",)).direct:
        raise ValueError(
            f"the middle model in {middle} must have the target's vocabulary; see `xspec vocab`"
        )


def _text_arms(
    settings: Settings,
    runner: Target,
    costs: Sequence[float],
    draft: SpokenDraft | None,
    ends: tuple[int, ...],
) -> dict[str, Callable[[], Arm]]:
    """Our arms on a text model; all but plain decoding verify as many rows as pay."""

    def ours(name: str, rows: int, make: Callable[[], Drafter | None]) -> Callable[[], Arm]:
        config = SpecConfig(rows, settings.max_new_tokens, ends, settings.prefill_fused)
        return lambda: DecoderArm(name, SpeculativeDecoder(runner, make(), config))

    def priced(name: str, make: Callable[[], Drafter]) -> Callable[[], Arm]:
        return ours(name, settings.rows, lambda: PricedDrafter(make(), costs))

    def ngram(online: bool) -> Drafter:
        return NgramDrafter(NgramMemory(recency=0, low_share=TEXT_LOW_SHARE), online)

    arms = {
        PLAIN: ours(PLAIN, 1, lambda: None),
        # Without what earlier answers taught: what prompt lookup sees, and no more.
        "ngram_prompt": priced("ngram_prompt", lambda: ngram(False)),
        "ngram_tree": priced("ngram_tree", lambda: ngram(True)),
    }
    if draft:
        arms["draft"] = ours("draft", settings.gamma + 1, lambda: draft.drafter(settings.gamma))
        arms["tree"] = ours(
            "tree",
            settings.rows,
            lambda: MergedDrafter([ngram(True), draft.drafter(settings.gamma, 2)]),
        )
    return arms


def _hf_arms(
    settings: Settings,
    load: Callable[..., PreTrainedModel],
    target: Path,
    draft: Path | None,
    tokenizer: PreTrainedTokenizerBase,
    speaking: Spoken | None,
    packed: PreTrainedModel | None,
) -> dict[str, Callable[[], Arm]]:
    """transformers' own arms; `packed` is the target with packed weights, if it has them."""
    common = {
        "max_new_tokens": settings.max_new_tokens,
        "pad_token_id": tokenizer.pad_token_id or 0,
    }

    @cache
    def plain() -> PreTrainedModel:
        # A model of its own: transformers' arms run on transformers' own attention and weights.
        return load(target)

    def hf(name: str, on: Callable[[], PreTrainedModel], **options) -> Callable[[], Arm]:
        return lambda: HfArm(name, on(), not options, **options, **common)

    lookup = {
        "prompt_lookup_num_tokens": settings.gamma,
        "max_matching_ngram_size": MAX_MATCHING_NGRAM,
    }
    arms = {
        "hf_generate": hf("hf_generate", plain),
        "hf_prompt_lookup": hf("hf_prompt_lookup", plain, **lookup),
    }
    if packed is not None:
        arms["hf_lookup_packed"] = hf("hf_lookup_packed", lambda: packed, **lookup)
    if draft:
        both = {}
        if not speaking.direct:
            both = {"tokenizer": tokenizer, "assistant_tokenizer": speaking.draft}
        arms["hf_assisted"] = lambda: hf(
            "hf_assisted", plain, assistant_model=load(draft), **both
        )()
    return arms


def _ends(model: PreTrainedModel) -> tuple[int, ...]:
    ends = model.generation_config.eos_token_id
    return tuple(ends) if isinstance(ends, list) else () if ends is None else (ends,)


def chat_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> torch.Tensor:
    """Ids ``[1, L]`` of a prompt, in the tokenizer's chat template where it has one."""
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    return tokenizer(prompt, return_tensors="pt")["input_ids"]
