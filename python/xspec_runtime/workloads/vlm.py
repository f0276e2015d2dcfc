"""An end-to-end comparison on a pair in folders: a converted EventGPT that drafts for a Video-LLaVA
or LLaVA-1.5, on recorded clips.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

from transformers import PreTrainedModel

from ..arms import Arm, DecoderArm, HfArm, Task
from ..config import SpecConfig
from ..data.captions import QUESTIONS
from ..data.dsec import Clip
from ..drafters.base import Drafter, Request
from ..drafters.draft_model import ModelDrafter
from ..drafters.merge import MergedDrafter
from ..drafters.ngram import NgramDrafter
from ..engine import SpeculativeDecoder
from ..models.vlm_pair import FolderPair, Inputs
from .base import (
    DRAFT_FLOOR,
    MAX_MATCHING_NGRAM,
    PLAIN,
    Settings,
    Workload,
    build_target,
    in_nf4,
    unrelated_memory,
)
from .modes import Parts, mode_arms
from .video import readable

OURS = (PLAIN, "draft", "ngram_tree", "tree")


class FolderRun:
    """A `FolderPair` with its tasks, and decoders on one target.

    Args:
        questions: asked in turn; without any, each clip's own.

    Attributes:
        left_out: clips that cannot be read, and why.

    Raises:
        FileNotFoundError, ValueError: as `FolderPair`; no clip can be read, or a prompt leaves no
            room for an answer.
    """

    def __init__(
        self,
        settings: Settings,
        draft: Path,
        target: Path,
        clips: Sequence[Clip],
        questions: Sequence[str] = (),
    ) -> None:
        self.settings = s = settings
        nf4 = s.weights == "nf4"
        self.pair = FolderPair(draft, target, s.device, s.dtype, s.drafting_device, nf4)

        def task(i: int, clip: Clip) -> Task:
            asked = questions[i % len(questions)] if questions else clip.question or QUESTIONS[0]
            return self._task(clip, asked)

        self.tasks, self.left_out = readable(clips, task)
        added = s.max_new_tokens + max(s.rows, s.gamma + 1)
        prompts = [t.inputs["input_ids"].shape[1] for t in self.tasks]
        self.capacity = _room(self.pair.target, prompts, added, "target")
        drafts = [t.request.draft_inputs["input_ids"].shape[1] for t in self.tasks]
        self.draft_capacity = _room(self.pair.draft, drafts, added, "draft")
        self.target = build_target(self.pair.target, s, self.capacity)

    def _task(self, clip: Clip, question: str) -> Task:
        pair = self.pair

        def inputs() -> Inputs:
            return pair.target_inputs(pair.read_video(clip.video, "uniform"), question)

        found = inputs()
        spoken = [i for i in found["input_ids"][0].tolist() if i not in pair.placeholders]
        draft = pair.draft_inputs(pair.read_events(clip.events), question)
        name = f"{clip.drive} {clip.events.stem}"
        return Task(name, found, Request(spoken, draft), lambda stop: inputs())

    def draft(self, siblings: int = 0, floor: float = 0.0) -> ModelDrafter:
        """A fresh drafter of the draft model."""
        gamma, room = self.settings.gamma, self.draft_capacity
        return ModelDrafter(self.pair.draft, gamma, siblings, floor, capacity=room)

    def drafter(self, name: str) -> Drafter | None:
        """A fresh drafter of one of `OURS`; None: plain decoding."""
        if name == PLAIN:
            return None
        if name == "draft":
            return self.draft()
        memory = NgramDrafter(unrelated_memory(), online=True, name=name)
        return (
            memory if name == "ngram_tree" else MergedDrafter([memory, self.draft(2, DRAFT_FLOOR)])
        )

    def config(self, rows: int) -> SpecConfig:
        """Settings of a decoder of so many rows."""
        s = self.settings
        return SpecConfig(rows, s.max_new_tokens, self.pair.stop_ids, s.prefill_fused)

    def decoder(self, name: str) -> SpeculativeDecoder:
        """A decoder with the named drafter on the shared target."""
        s = self.settings
        rows = {PLAIN: 1, "draft": s.gamma + 1}.get(name, s.rows)
        return SpeculativeDecoder(self.target, self.drafter(name), self.config(rows))

    def overlap_decoder(self, name: str, mode: str) -> SpeculativeDecoder:
        """`decoder`, for `Overlap`."""
        return self.decoder(name)

    def workload(self) -> Workload:
        """All arms over the clips that can be read."""
        s, pair = self.settings, self.pair

        def ours(name: str) -> Callable[[], Arm]:
            return lambda: DecoderArm(name, self.decoder(name))

        @cache
        def plain() -> PreTrainedModel:
            # A model of its own: transformers' arms run on transformers' own attention.
            return pair.another_target()

        common = {
            "max_new_tokens": s.max_new_tokens,
            "eos_token_id": list(pair.stop_ids),
            "pad_token_id": pair.tokenizer.pad_token_id or 0,
        }
        lookup = {
            "prompt_lookup_num_tokens": s.gamma,
            "max_matching_ngram_size": MAX_MATCHING_NGRAM,
            # Copied placeholders would be taken for media.
            "suppress_tokens": list(pair.placeholders),
        }
        arms: dict[str, Callable[[], Arm]] = {
            **{name: ours(name) for name in OURS},
            "hf_generate": lambda: HfArm("hf_generate", plain(), True, **common),
            "hf_prompt_lookup": lambda: HfArm(
                "hf_prompt_lookup", plain(), False, **lookup, **common
            ),
        }
        parts = Parts(
            self.target,
            lambda: pair.another_target(s.drafting_device),
            self.config(s.rows),
            pair.target.config.get_text_config().num_hidden_layers,
            s.gamma,
            self.capacity,
            self.draft,
            draft_ends=pair.stop_ids,
            quantized=None if s.weights == "nf4" else in_nf4,
        )
        arms |= mode_arms(parts)
        facts = {"pair": str(pair.target_folder), "clips_left_out": len(self.left_out)}
        decode = pair.tokenizer.decode
        return Workload(
            self.tasks, arms, lambda ids: decode(ids, skip_special_tokens=True), None, facts,
            notes=[f"left out: {line}" for line in self.left_out],
        )  # fmt: skip


def _room(model: PreTrainedModel, lengths: Sequence[int], added: int, whose: str) -> int:
    """KV rows that suffice, which the model must have positions for."""
    most = model.config.get_text_config().max_position_embeddings
    if max(lengths) + added > most:
        raise ValueError(
            f"a prompt of {max(lengths)} tokens leaves fewer than {added} of the {whose}'s {most} "
            "positions; lower --max-new-tokens, --rows or --gamma, or ask shorter questions"
        )
    return max(lengths) + added + 1
