"""What an end-to-end comparison runs on: a pair of models, its tasks and the arms that fit them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from .adapters import mini_pair
from .arms import Arm, DecoderArm, HfArm, Task
from .config import SpecConfig
from .data.captions import QUESTIONS
from .data.scenes import make_sample
from .drafters.base import Drafter, Request
from .drafters.draft_model import ModelDrafter
from .drafters.merge import MergedDrafter
from .drafters.ngram import NgramDrafter, NgramMemory
from .engine import SpeculativeDecoder
from .models import mini
from .packing import pack_linears
from .policy import CONTEXT, PricedDrafter, row_costs
from .targets.base import Target
from .targets.llama import LlamaTarget
from .targets.transformers import TransformersTarget

PLAIN = "target"
ENGINES = ("transformers", "llama")
# Transformers' lookup of the longest repeated n-gram; 3 was its best setting on grounded prompts.
MAX_MATCHING_NGRAM = 3
OURS = ("draft", *mini_pair.ARMS, "ngram", "ngram_tree", "ngram_cold", "tree")
# The draft model is asked where the memory expects fewer accepted tokens than this, and stops where
# its own path is less likely than that. A compromise: in a sweep on 16 training scenes more asking
# accepted more tokens and took more time, and the memory alone was the fastest.
MEMORY_ENOUGH = 2.5
DRAFT_FLOOR = 0.3
# Answers to unrelated prompts share phrases, not words: short contexts tell little.
TEXT_LOW_SHARE = 0.3


@dataclass(frozen=True)
class Settings:
    """What the arms of one run share.

    Attributes:
        gamma: draft tokens of a chain.
        rows: rows of the merged tree.
        prefill_fused: of every arm that drafts, see `SpecConfig`.
        engine: of the target, one of `ENGINES`.
    """

    gamma: int = 5
    rows: int = 16
    max_new_tokens: int = mini.MAX_NEW_TOKENS
    prefill_fused: str = "exact"
    engine: str = "transformers"
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    backend: str = "auto"


@dataclass
class Workload:
    """Tasks and arms.

    Attributes:
        decode: ids to text.
        seen: answers known verbatim before the run (None: not applicable).
    """

    tasks: list[Task]
    arms: dict[str, Callable[[], Arm]]
    decode: Callable[[Sequence[int]], str]
    seen: set[tuple[int, ...]] | None = None
    facts: dict[str, object] = field(default_factory=dict)


def build_target(model: PreTrainedModel, settings: Settings, capacity: int = 1024) -> Target:
    """The target on its own kernels, or on ours."""
    if settings.engine == "llama":
        max_depth = 32 if settings.rows <= 32 and settings.gamma < 32 else 64
        return LlamaTarget(model, capacity, settings.backend, max_depth=max_depth)
    return TransformersTarget(model, capacity, settings.backend)


def unrelated_memory() -> NgramMemory:
    """An empty memory for requests that have nothing to do with the ones before them."""
    return NgramMemory(recency=0)


class MiniPair:
    """The embedded pair, loaded once; builds tasks and arms."""

    def __init__(self, settings: Settings, draft: str = "draft") -> None:
        self.settings = settings
        self.tokenizer = mini.load_tokenizer()
        self.answers = mini.load_answers()
        self.target_model = self._load("target")
        self.target = build_target(self.target_model, settings)
        self.draft_model = self._load(draft)

    @cached_property
    def _raw_draft(self):
        return self._load("draft_raw")

    def _load(self, name: str):
        return mini.load(name, device=self.settings.device, dtype=self.settings.dtype)

    def task(
        self, name: str, question: str, video: np.ndarray, events: np.ndarray | None = None
    ) -> Task:
        """One request; `video` uint8 ``[8, 64, 64, 3]``, `events` uint8 ``[64, 64, 3]``."""
        move = self._move
        prompt = mini.Prompt.of(question, self.tokenizer)
        draft = {} if events is None else move(mini.draft_inputs(question, events, self.tokenizer))
        request = Request([*prompt.before, *prompt.after], draft)
        return Task(name, move(mini.target_inputs(question, video, self.tokenizer)), request)

    def scene_tasks(
        self, count: int, seed: int = 0, questions: Sequence[str] = QUESTIONS
    ) -> list[Task]:
        """Unseen scenes, questions in turn."""
        tasks = []
        for i in range(count):
            sample = make_sample(mini.TEST_SEED + 100_000 * seed + i)
            question = questions[i % len(questions)]
            tasks.append(self.task(f"scene {i}", question, sample.video, sample.event_image))
        return tasks

    def memory(self) -> NgramMemory:
        """The target's answers on training scenes."""
        memory = unrelated_memory()
        memory.extend(self.answers)
        return memory

    def drafter(self, name: str) -> Drafter | None:
        """A fresh drafter of one of `OURS`; None: plain decoding."""
        gamma = self.settings.gamma
        if name == PLAIN:
            return None
        if name == "draft":
            return ModelDrafter(self.draft_model, gamma)
        if name in mini_pair.ARMS:
            hidden = name.endswith(mini_pair.HIDDEN)
            return mini_pair.adapter_drafter(name, gamma, None if hidden else self._raw_draft)
        if name == "ngram_cold":
            return NgramDrafter(unrelated_memory(), online=True, name=name)
        if name in ("ngram", "ngram_tree"):
            return NgramDrafter(self.memory(), online=True, name=name)
        memory = NgramDrafter(self.memory(), online=True)
        draft = ModelDrafter(self.draft_model, gamma, siblings=2, floor=DRAFT_FLOOR)
        return MergedDrafter([memory, draft], enough=MEMORY_ENOUGH)

    def decoder(self, name: str) -> SpeculativeDecoder:
        """A decoder with the named drafter on the shared target."""
        s = self.settings
        rows = {PLAIN: 1, "tree": s.rows, "ngram_tree": s.rows}.get(name, s.gamma + 1)
        config = SpecConfig(rows, s.max_new_tokens, (mini.EOS,), s.prefill_fused)
        return SpeculativeDecoder(self.target, self.drafter(name), config)

    def workload(self, tasks: list[Task]) -> Workload:
        """All arms over `tasks`."""
        s = self.settings
        common = {
            "max_new_tokens": s.max_new_tokens,
            "eos_token_id": mini.EOS,
            "pad_token_id": mini.PAD,
        }

        # Prompt lookup copies from the prompt; with a copied placeholder the first verify fails,
        # as transformers takes it for a video token. The target never says one.
        spoken = {"suppress_tokens": [mini.IMAGE, mini.VIDEO, mini.EVENT], **common}

        def hf(name: str, plain: bool, **options) -> Callable[[], Arm]:
            # A model of its own: transformers' arms run on transformers' own attention.
            return lambda: HfArm(name, self._load("target"), plain, **options)

        def ours(name: str) -> Callable[[], Arm]:
            return lambda: DecoderArm(name, self.decoder(name))

        def assisted() -> Arm:
            assistant = self._load("assistant")
            assistant.generation_config.num_assistant_tokens = s.gamma
            assistant.generation_config.num_assistant_tokens_schedule = "constant"
            assistant.generation_config.assistant_confidence_threshold = 0.0
            return HfArm(
                "hf_assisted", self._load("target"), False, assistant_model=assistant, **spoken
            )

        arms = {
            PLAIN: ours(PLAIN),
            "hf_generate": hf("hf_generate", True, **common),
            "hf_prompt_lookup": hf(
                "hf_prompt_lookup",
                False,
                prompt_lookup_num_tokens=s.gamma,
                max_matching_ngram_size=MAX_MATCHING_NGRAM,
                **spoken,
            ),
            "hf_assisted": assisted,
            **{name: ours(name) for name in OURS},
        }
        seen = {tuple(a) for a in self.answers}
        record = {"pair": "embedded", "training_scenes_in_memory": len(self.answers)}
        return Workload(
            tasks, arms, lambda ids: mini.decode_answer(list(ids), self.tokenizer), seen, record
        )

    def _move(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        s = self.settings
        return {
            key: value.to(s.device, s.dtype if value.is_floating_point() else None)
            for key, value in inputs.items()
        }


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

    def load(folder: Path):
        model, found = AutoModelForCausalLM.from_pretrained(
            folder, dtype=settings.dtype, output_loading_info=True, trust_remote_code=False
        )
        # transformers fills what a checkpoint lacks with random weights.
        if found["missing_keys"]:
            missing = sorted(found["missing_keys"])
            raise ValueError(f"{folder} lacks {len(missing)} weights, {missing[0]} among them")
        return model.eval().to(settings.device).requires_grad_(False)

    tokenizer = AutoTokenizer.from_pretrained(target)
    model = load(target)
    draft_model = load(draft) if draft else None
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
    costs = row_costs(runner, settings.rows)
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
