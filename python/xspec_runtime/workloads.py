"""What an end-to-end comparison runs on: a pair of models, its tasks and the arms that fit them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from transformers import PreTrainedModel

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
