"""An end-to-end comparison on a causal language model in a local folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from .arms import Arm, DecoderArm, HfArm, Task
from .calibration import calibrate
from .config import SpecConfig
from .drafters.base import Drafter, Request
from .drafters.draft_model import ModelDrafter
from .drafters.merge import MergedDrafter
from .drafters.ngram import NgramDrafter, NgramMemory
from .engine import SpeculativeDecoder
from .nf4_checkpoint import is_nf4, load_nf4
from .packing import pack_linears
from .policy import PricedDrafter
from .targets.base import Target
from .targets.heights import CONTEXT
from .workloads import MAX_MATCHING_NGRAM, PLAIN, Settings, Workload, build_target, in_nf4

# Answers to unrelated prompts share phrases, not words: short contexts tell little.
TEXT_LOW_SHARE = 0.3


def text_workload(
    settings: Settings, target: Path, prompts: Sequence[str], draft: Path | None = None
) -> Workload:
    """A causal language model in a local folder, its chat template applied to `prompts`.

    Raises:
        FileNotFoundError: a folder does not exist.
        ValueError: a checkpoint lacks weights, the draft's vocabulary has another size than the
            target's, or a prompt is too long for the model.
    """
    for folder in filter(None, (target, draft)):
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{folder} holds no model: config.json is missing")

    def load(folder: Path, device: str = settings.device):
        if is_nf4(folder):
            if settings.weights != "nf4":
                raise ValueError(f"{folder} is in NF4 already: add --weights nf4")
            return in_nf4(load_nf4(folder, device, settings.dtype))
        model, found = AutoModelForCausalLM.from_pretrained(
            folder, dtype=settings.dtype, output_loading_info=True, trust_remote_code=False
        )
        # transformers fills what a checkpoint lacks with random weights.
        if found["missing_keys"]:
            missing = sorted(found["missing_keys"])
            raise ValueError(f"{folder} lacks {len(missing)} weights, {missing[0]} among them")
        model = model.eval().to(device).requires_grad_(False)
        return in_nf4(model) if settings.weights == "nf4" else model

    tokenizer = AutoTokenizer.from_pretrained(target)
    model = load(target)
    draft_model = load(draft, settings.drafting_device) if draft else None
    sizes = [m.config.get_text_config().vocab_size for m in (model, draft_model) if m]
    if len(set(sizes)) > 1:
        raise ValueError(f"target and draft must share a vocabulary, got sizes {sizes}")
    tasks = []
    for i, prompt in enumerate(prompts):
        ids = _chat_ids(tokenizer, prompt).to(settings.device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        tasks.append(Task(f"prompt {i}", inputs, Request(ids[0].tolist(), inputs)))
    limit = model.config.get_text_config().max_position_embeddings
    for task in tasks:
        length = task.inputs["input_ids"].shape[1]
        if length + settings.max_new_tokens > limit:
            raise ValueError(
                f"{task.name} has {length} tokens; with {settings.max_new_tokens} new ones that is "
                f"more than the model's {limit} positions"
            )
    longest = max(CONTEXT, *(t.inputs["input_ids"].shape[1] for t in tasks))
    capacity = longest + settings.max_new_tokens + settings.rows + settings.gamma + 1
    packed = pack_linears(model) if settings.engine == "transformers" else 0
    runner = build_target(model, settings, capacity)
    costs = calibrate(runner, settings.rows).costs()
    record = {
        "pair": str(target),
        "packed_linears": packed,
        "row_costs": [round(cost, 3) for cost in costs],
    }
    arms = _text_arms(settings, runner, costs, draft_model, _ends(model), capacity)
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
    arms["hf_generate"] = hf("hf_generate", plain)
    arms["hf_prompt_lookup"] = hf("hf_prompt_lookup", plain, **lookup)
    if packed:
        arms["hf_lookup_packed"] = hf("hf_lookup_packed", lambda: model, **lookup)
    if draft:
        arms["hf_assisted"] = lambda: hf("hf_assisted", plain, assistant_model=load(draft))()
    return Workload(
        tasks, arms, lambda ids: tokenizer.decode(ids, skip_special_tokens=True), None, record
    )


def _text_arms(
    settings: Settings,
    runner: Target,
    costs: Sequence[float],
    draft_model: PreTrainedModel | None,
    ends: tuple[int, ...],
    capacity: int,
) -> dict[str, Callable[[], Arm]]:
    """Our arms on a text model; all but plain decoding verify as many rows as pay."""

    def ours(name: str, rows: int, make: Callable[[], Drafter | None]) -> Callable[[], Arm]:
        config = SpecConfig(rows, settings.max_new_tokens, ends, settings.prefill_fused)
        return lambda: DecoderArm(name, SpeculativeDecoder(runner, make(), config))

    def priced(name: str, make: Callable[[], Drafter]) -> Callable[[], Arm]:
        return ours(name, settings.rows, lambda: PricedDrafter(make(), costs))

    def ngram(online: bool) -> Drafter:
        return NgramDrafter(NgramMemory(recency=0, low_share=TEXT_LOW_SHARE), online)

    def drafted(siblings: int = 0) -> Drafter:
        return ModelDrafter(draft_model, settings.gamma, siblings, capacity=capacity)

    arms = {
        PLAIN: ours(PLAIN, 1, lambda: None),
        # Without what earlier answers taught: what prompt lookup sees, and no more.
        "ngram_prompt": priced("ngram_prompt", lambda: ngram(False)),
        "ngram_tree": priced("ngram_tree", lambda: ngram(True)),
    }
    if draft_model:
        arms["draft"] = ours("draft", settings.gamma + 1, drafted)
        arms["tree"] = ours("tree", settings.rows, lambda: MergedDrafter([ngram(True), drafted(2)]))
    return arms


def _ends(model: PreTrainedModel) -> tuple[int, ...]:
    ends = model.generation_config.eos_token_id
    return tuple(ends) if isinstance(ends, list) else () if ends is None else (ends,)


def _chat_ids(tokenizer, prompt: str) -> torch.Tensor:
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    return tokenizer(prompt, return_tensors="pt")["input_ids"]
