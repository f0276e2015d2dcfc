"""Arms that answer from a file: the CPU's preparation of the target's inputs counts."""

from __future__ import annotations

from dataclasses import replace
from threading import Event
from time import perf_counter

from xspec_kernels import ranges

from ..arms import Arm, OnRound, Outcome, Task
from ..engine import SpeculativeDecoder
from ..overlap import Overlap

# Arms with a draft model that can work before the target does.
OVERLAPPING = ("draft", "tree")


class PreparedArm:
    """Another arm, behind the preparation of its task: the draft says nothing meanwhile."""

    def __init__(self, arm: Arm) -> None:
        self.name = arm.name
        self.arm = arm

    @property
    def decoder(self) -> SpeculativeDecoder | None:
        """Of our own arms."""
        return getattr(self.arm, "decoder", None)

    def run(self, task: Task, on_round: OnRound | None = None) -> Outcome:
        start = perf_counter()
        with ranges.range_("target.preprocess"):
            inputs = task.prepare(Event())
        spent = 1e3 * (perf_counter() - start)
        out = self.arm.run(replace(task, inputs=inputs), on_round)
        out.prepare_ms = spent
        out.ttft_ms += spent
        out.total_ms += spent
        return out


class OverlapArm:
    """One of our decoders, whose draft writes text in one of the modes of `overlap.MODES`."""

    def __init__(
        self, name: str, decoder: SpeculativeDecoder, mode: str, limit: int | None = None
    ) -> None:
        self.name = name
        self.decoder = decoder
        self.work = Overlap(decoder, mode, limit)

    def run(self, task: Task, on_round: OnRound | None = None) -> Outcome:
        out = self.work.generate(task.prepare, task.request, on_round=on_round)
        stages = self.work.stages
        return Outcome(
            out.tokens, stages.total_ms, stages.ttft_ms, out.prefill_ms, out.begin_ms,
            out.near_ties, 1 + len(out.rounds), out.rounds, out.prefill_drafted,
            out.prefill_accepted, max(0.0, stages.ttft_ms - out.prefill_ms), stages,
        )  # fmt: skip
