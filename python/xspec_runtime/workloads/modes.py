"""Arms beside the drafters: other ways to use two models, each against the same target.

They cost time or memory of their own, so a run takes them only by name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from time import perf_counter

import torch
from transformers import PreTrainedModel

from ..arms import Arm, DecoderArm, OnRound, Outcome, Task
from ..config import SpecConfig
from ..drafters.base import Drafter
from ..drafters.cascade import CascadeDrafter, FamilyDrafter, MiddleModel, skip_layers
from ..drafters.draft_model import ModelDrafter
from ..engine import SpeculativeDecoder
from ..head_start import HeadStart
from ..targets.base import Target
from .overlap_arms import OverlapArm

DRAFT_ALONE, PARALLEL, SELF_NF4, SELF_SKIP, CASCADE = MODES = (
    *("draft_alone", "parallel_prefill", "self_nf4", "self_skip", "cascade"),
)
# Arms that make a target's inputs from a file at a time of their own, or never.
OWN_CLOCK = (DRAFT_ALONE, PARALLEL)
CASCADE_FLOOR = 0.3


@dataclass(frozen=True)
class Parts:
    """What `mode_arms` makes arms of.

    Attributes:
        target: shared by all arms.
        fresh: loads the target's model once more, where drafts are computed.
        config: of an arm that verifies as many rows as the tree has at most.
        layers: decoder layers of the target.
        gamma: draft tokens of a chain.
        capacity: KV rows of a drafter that reads what the target reads.
        draft: a fresh drafter of the draft model in its own vocabulary, or None.
        translated: that drafter in the target's vocabulary.
        heard: an answer of the draft in the target's tokens.
        draft_ends: what ends the draft's own answers.
        quantized: makes a model's linear layers NF4; None where the target's are that already.
        middle: loads the cascade's middle model; by default the target's in NF4.
    """

    target: Target
    fresh: Callable[[], PreTrainedModel]
    config: SpecConfig
    layers: int
    gamma: int
    capacity: int
    draft: Callable[[], ModelDrafter] | None = None
    translated: Callable[[Drafter], Drafter] = lambda drafter: drafter
    heard: Callable[[list[int]], list[int]] = list
    draft_ends: Sequence[int] = ()
    quantized: Callable[[PreTrainedModel], PreTrainedModel] | None = None
    middle: Callable[[], PreTrainedModel] | None = None


def mode_arms(parts: Parts) -> dict[str, Callable[[], Arm]]:
    """Those of `MODES` that `parts` suffice for."""
    chain = replace(parts.config, rows=parts.gamma + 1)

    @cache
    def nf4() -> PreTrainedModel:
        return parts.quantized(parts.fresh())

    @cache
    def skipping() -> PreTrainedModel:
        return skip_layers(parts.fresh())

    @cache
    def middle() -> PreTrainedModel:
        return parts.middle() if parts.middle else nf4()

    def family(name: str, model: Callable[[], PreTrainedModel]) -> Callable[[], Arm]:
        def make() -> Arm:
            drafter = FamilyDrafter(model(), parts.gamma, name=name, capacity=parts.capacity)
            return FamilyArm(name, SpeculativeDecoder(parts.target, drafter, chain))

        return make

    def cascade() -> Arm:
        checking = MiddleModel(middle(), parts.gamma, name=CASCADE, capacity=parts.capacity)
        drafter = CascadeDrafter(
            parts.translated(parts.draft()), checking, parts.gamma, CASCADE_FLOOR,
            parts.config.eos_token_ids,
        )  # fmt: skip
        return FamilyArm(CASCADE, SpeculativeDecoder(parts.target, drafter, parts.config))

    def parallel() -> Arm:
        plain = replace(parts.config, rows=1, prefill_fused="off")
        return ParallelPrefillArm(SpeculativeDecoder(parts.target, parts.draft(), plain))

    def alone() -> Arm:
        limit = parts.config.max_new_tokens
        return DraftAloneArm(parts.draft(), limit, parts.draft_ends, parts.heard)

    arms: dict[str, Callable[[], Arm]] = {}
    if parts.draft:
        arms |= {DRAFT_ALONE: alone, PARALLEL: parallel}
    if parts.quantized:
        arms[SELF_NF4] = family(SELF_NF4, nf4)
    if parts.layers > 2:
        arms[SELF_SKIP] = family(SELF_SKIP, skipping)
    if parts.draft and (parts.middle or parts.quantized):
        arms[CASCADE] = cascade
    return arms


class FamilyArm(DecoderArm):
    """One of our decoders, whose drafter reads what the target reads."""

    def run(self, task: Task, on_round: OnRound | None = None) -> Outcome:
        request = replace(task.request, target_inputs=task.inputs)
        return super().run(replace(task, request=request), on_round)


class DraftAloneArm:
    """The draft's own answer: what the target would say is neither asked nor promised.

    Args:
        heard: the answer in the target's tokens.
    """

    name = DRAFT_ALONE
    lossless = False

    def __init__(
        self,
        draft: ModelDrafter,
        limit: int,
        ends: Sequence[int],
        heard: Callable[[list[int]], list[int]] = list,
    ) -> None:
        self.head = HeadStart(draft)
        self.limit, self.ends, self.heard = limit, ends, heard

    def run(self, task: Task, on_round: OnRound | None = None) -> Outcome:
        head, start = self.head, perf_counter()
        with torch.inference_mode():
            head.run(task.request, self.limit, self.ends, lambda: False)
        total, first = 1e3 * (perf_counter() - start), 1e3 * (head.times[0] - start)
        head.end([])
        tokens = self.heard(head.tokens)
        return Outcome(tokens, total, first, first, forwards=len(head.tokens))


class ParallelPrefillArm:
    """Both models' prefills side by side, the draft's text until the target's first token, then
    plain decoding: no draft is verified, so what is there of the draft's text saves nothing.
    """

    name = PARALLEL

    def __init__(self, decoder: SpeculativeDecoder) -> None:
        self.decoder = decoder
        self.arm = OverlapArm(PARALLEL, decoder, "concurrent", decoder.config.max_new_tokens)

    def run(self, task: Task, on_round: OnRound | None = None) -> Outcome:
        prepare = task.prepare or (lambda stop: task.inputs)
        out = self.arm.run(replace(task, prepare=prepare), on_round)
        if not task.prepare:
            out.prepare_ms = None
        return out
