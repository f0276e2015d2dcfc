"""The embedded pair as a workload: its models, drafters and arms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from threading import Event
from typing import Any

import numpy as np
import torch

from ..adapters.mini import hidden as mini_hidden
from ..adapters.mini import pair as mini_pair
from ..adapters.mini import text as mini_text
from ..adapters.training.draft_folder import load_pair_draft
from ..arms import Arm, DecoderArm, HfArm, Task
from ..config import SpecConfig
from ..data.captions import QUESTIONS
from ..data.scenes import make_sample
from ..data.staging import Uploads
from ..drafters.base import Drafter, Request
from ..drafters.draft_model import ModelDrafter
from ..drafters.graph_draft import GraphDrafter
from ..drafters.merge import MergedDrafter
from ..drafters.ngram import NgramDrafter, NgramMemory
from ..engine import SpeculativeDecoder
from ..models import mini
from ..targets.base import Target
from ..targets.llama import LlamaTarget
from ..targets.tapped import TappedTarget
from .base import (
    DRAFT_FLOOR,
    MAX_MATCHING_NGRAM,
    MEMORY_ENOUGH,
    PLAIN,
    Settings,
    Workload,
    build_target,
    in_nf4,
    unrelated_memory,
)
from .modes import Parts, mode_arms

OURS = ("draft", *mini_pair.ARMS, "ngram", "ngram_tree", "ngram_cold", "tree")
# The draft model is asked where the memory expects fewer accepted tokens than this; adapters of
# states: on 10 scenes of seed 1 as many accepted as if always asked.
HEAD_ENOUGH = 4.0


class MiniPair:
    """The embedded pair, loaded once; builds tasks and arms."""

    def __init__(self, settings: Settings, draft: str = "draft") -> None:
        self.settings = settings
        self._uploads = {
            device: Uploads(device) for device in (settings.device, settings.drafting_device)
        }
        self.tokenizer = mini.load_tokenizer()
        self.answers = mini.load_answers()
        self.target_model = self._load("target")
        self.target = build_target(self.target_model, settings)
        self.draft_model = self._load(draft)
        tails = isinstance(self.target, LlamaTarget) and (
            self.target.graphs is not None or self.target.device.type == "cpu"
        )
        self.tail_arms = list(mini_pair.TAIL_ARMS) if tails else []
        self._tails: dict[str, Drafter] = {}
        self.state_arms, self.text_arms = mini_text.trained_arms(
            settings.adapters, settings.adapter_levels, settings.adapter,
            settings.engine == "transformers", tails,
        )  # fmt: skip

    @cached_property
    def _tapped(self) -> TappedTarget:
        """The target's model in a target that keeps its states."""
        if self.settings.engine != "transformers":
            raise ValueError("adapters of the target's states need --engine transformers")
        return TappedTarget(self.target_model, 1024, self.settings.backend)

    @cached_property
    def _tail_target(self) -> LlamaTarget:
        """The target whose verifies a drafter can end; on a CPU, one with the same launches as
        plain calls.
        """
        if not isinstance(self.target, LlamaTarget) or self.target.graphs:
            return self.target
        return build_target(self.target_model, self.settings, graphs=True)

    @cached_property
    def _raw_draft(self):
        return self._load("draft_raw")

    def _load(self, name: str):
        s = self.settings
        # Transformers' assistant stays beside its target.
        device = s.device if name in ("target", "assistant") else s.drafting_device
        load = mini.load if name in mini.MODELS else load_pair_draft
        model = load(name, device=device, dtype=s.dtype)
        return in_nf4(model) if s.weights == "nf4" else model

    def task(
        self,
        name: str,
        question: str,
        video: np.ndarray,
        events: np.ndarray | None = None,
        read: Callable[[Event], np.ndarray] | None = None,
    ) -> Task:
        """One request; `video` uint8 ``[8, 64, 64, 3]``, `events` uint8 ``[64, 64, 3]``. With
        `read`, which returns that video, reading it is part of the request.
        """
        s, draft = self.settings, {}
        prompt = mini.Prompt.of(question, self.tokenizer)
        if events is not None:
            draft = mini.draft_inputs(question, events, self.tokenizer)
            draft = self._move(draft, s.drafting_device)
        request = Request([*prompt.before, *prompt.after], draft)

        def inputs(frames: np.ndarray) -> dict[str, torch.Tensor]:
            return self._move(mini.target_inputs(question, frames, self.tokenizer), s.device)

        prepare = (lambda stop: inputs(read(stop))) if read else None
        return Task(name, inputs(video), request, prepare)

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
        """A fresh drafter of one of `OURS`, `tail_arms`, `state_arms` or `text_arms`; None: plain
        decoding. Where graphs are captured for a drafter, which learns nothing, it is the same one
        again.
        """
        if mini_pair.TAIL not in name:
            return self._drafter(name)
        if name not in self._tails:
            self._tails[name] = self._drafter(name)
        return self._tails[name]

    def _drafter(self, name: str) -> Drafter | None:
        gamma = self.settings.gamma
        if name == PLAIN:
            return None
        if name in (*self.state_arms, *self.text_arms):
            return self._trained_drafter(name)
        if name == "draft":
            return ModelDrafter(self.draft_model, gamma)
        if name in (*mini_pair.ARMS, *self.tail_arms):
            raw = None if name.endswith(mini_pair.HIDDEN) else self._raw_draft
            target = self._target_of(name) if name in self.tail_arms else None
            return mini_pair.adapter_drafter(name, gamma, raw, target=target)
        if name == "ngram_cold":
            return NgramDrafter(unrelated_memory(), online=True, name=name)
        if name in ("ngram", "ngram_tree"):
            return NgramDrafter(self.memory(), online=True, name=name)
        memory = NgramDrafter(self.memory(), online=True)
        draft = ModelDrafter(self.draft_model, gamma, siblings=2, floor=DRAFT_FLOOR)
        return MergedDrafter([memory, draft], enough=MEMORY_ENOUGH)

    def _trained_drafter(self, name: str) -> Drafter:
        if name == mini_hidden.CONSTANT:
            return mini_hidden.constant_drafter(self.answers)
        s = self.settings

        def draft(model: str):
            return self._raw_draft if model == mini_hidden.DRAFT else self.draft_model

        given, target = (name, s.gamma, s.adapters, s.adapter, draft), self._target_of(name)
        if name in self.text_arms:
            return mini_text.text_drafter(*given, self._load, target)
        head = mini_hidden.state_drafter(*given, target)
        if not name.startswith(mini_hidden.TREE):
            return head
        return MergedDrafter([NgramDrafter(self.memory(), online=True), head], name, HEAD_ENOUGH)

    def decoder(self, name: str) -> SpeculativeDecoder:
        """A decoder with the named drafter on the shared target."""
        s = self.settings
        rows = {PLAIN: 1, "tree": s.rows, "ngram_tree": s.rows}.get(name, s.gamma + 1)
        if name.startswith(mini_hidden.TREE):
            rows = s.rows
        config = SpecConfig(rows, s.max_new_tokens, (mini.EOS,), s.prefill_fused)
        return SpeculativeDecoder(self._target_of(name), self.drafter(name), config)

    def _target_of(self, name: str) -> Target:
        if mini_hidden.reads_target(name):
            return self._tapped
        return self._tail_target if mini_pair.TAIL in name else self.target

    def overlap_decoder(self, name: str, mode: str) -> SpeculativeDecoder:
        """`decoder`, for `Overlap` in that mode: where the target runs in graphs, a draft that is
        to run at the same time does so too.
        """
        s, target = self.settings, self.target
        decoder = self.decoder(name)
        if mode == "concurrent" and isinstance(target, LlamaTarget) and target.graphs:
            draft = LlamaTarget(self.draft_model, target.cache.capacity, s.backend, graphs=True)
            own = GraphDrafter(draft, s.gamma, (mini.EOS,))
            parts = getattr(decoder.drafter, "drafters", None)
            if parts:
                parts[-1] = own
            else:
                decoder.drafter = own
        return decoder

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
            assistant.generate = partial(_text_only, assistant.generate)
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
            **{name: ours(name) for name in (*OURS, *self.tail_arms)},
            **{name: ours(name) for name in (*self.state_arms, *self.text_arms)},
            **mode_arms(self._parts()),
        }
        seen = {tuple(a) for a in self.answers}
        record = {"pair": "embedded", "training_scenes_in_memory": len(self.answers)}
        left_out = s.engine == "llama" and mini_hidden.left_out(s.adapters, s.adapter_levels)
        return Workload(
            tasks, arms, lambda ids: mini.decode_answer(list(ids), self.tokenizer), seen, record,
            notes=[left_out] if left_out else [],
        )  # fmt: skip

    def _parts(self) -> Parts:
        s = self.settings
        return Parts(
            self.target,
            lambda: mini.load("target", device=s.drafting_device, dtype=s.dtype),
            SpecConfig(s.rows, s.max_new_tokens, (mini.EOS,), s.prefill_fused),
            self.target_model.config.get_text_config().num_hidden_layers,
            s.gamma,
            self.target.cache.capacity,
            lambda: ModelDrafter(self.draft_model, s.gamma),
            draft_ends=(mini.EOS,),
            quantized=None if s.weights == "nf4" else in_nf4,
        )

    def _move(self, inputs: dict[str, torch.Tensor], device: str) -> dict[str, torch.Tensor]:
        """On a device; pixels go through pinned memory, a prompt of another length each time
        does not pay for it.
        """
        upload = self._uploads[device]
        return {
            key: upload(value.to(self.settings.dtype))
            if value.is_floating_point()
            else value.to(device)
            for key, value in inputs.items()
        }


def _text_only(
    generate: Callable[..., Any], *inputs: Any, pixel_values_videos: Any = None, **options: Any
) -> Any:
    """`generate` of a model without eyes: transformers 5.17 hands an assistant the target's frames,
    too.
    """
    return generate(*inputs, **options)
