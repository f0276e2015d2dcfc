"""Arms of an end-to-end comparison: our decoders and transformers' own, behind one `run`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from threading import Event
from time import perf_counter
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from .drafters.base import DraftTree, Request
from .engine import Round, SpeculativeDecoder
from .overlap import Stages
from .targets.transformers import Verdict

OnRound = Callable[[DraftTree, Verdict, list[int]], None]


@dataclass(slots=True)
class Task:
    """One prompt: what the target takes, what the drafters may know, and a name for reports.

    Attributes:
        prepare: makes `inputs` anew from a file, where that is part of the request; its argument is
            set once nobody wants them any more.
    """

    name: str
    inputs: Mapping[str, torch.Tensor]
    request: Request
    prepare: Callable[[Event], Mapping[str, torch.Tensor]] | None = None


@dataclass(slots=True)
class Outcome:
    """What one arm did with one task; milliseconds of wall time.

    Attributes:
        prepare_ms: until the target's prefill began, where inputs are made from a file.
        stages: of an arm that overlaps that with the draft.
    """

    tokens: list[int]
    total_ms: float
    ttft_ms: float
    prefill_ms: float | None = None
    begin_ms: float = 0.0
    near_ties: int = 0
    forwards: int = 0
    rounds: list[Round] = field(default_factory=list)
    prefill_drafted: int = 0
    prefill_accepted: int = 0
    prepare_ms: float | None = None
    stages: Stages | None = None


class Arm(Protocol):
    """Anything that can answer a task."""

    name: str

    def run(self, task: Task, on_round: OnRound | None = None) -> Outcome: ...


class DecoderArm:
    """One of our decoders."""

    def __init__(self, name: str, decoder: SpeculativeDecoder) -> None:
        self.name = name
        self.decoder = decoder

    def run(self, task: Task, on_round: OnRound | None = None) -> Outcome:
        out = self.decoder.generate(task.inputs, task.request, on_round=on_round)
        return Outcome(
            out.tokens,
            out.total_ms,
            out.prefill_ms,
            out.prefill_ms,
            out.begin_ms,
            out.near_ties,
            1 + len(out.rounds),
            out.rounds,
            out.prefill_drafted,
            out.prefill_accepted,
        )


class _FirstToken(BaseStreamer):
    """Notes when the first token after the prompt arrives."""

    def __init__(self) -> None:
        self.calls = 0
        self.at: float | None = None

    def put(self, value: torch.Tensor) -> None:
        self.calls += 1
        if self.calls == 2:
            self.at = perf_counter()

    def end(self) -> None:
        """Nothing to flush."""


class HfArm:
    """transformers' `generate` with `options` (assistant_model, prompt_lookup_num_tokens, ...)."""

    def __init__(self, name: str, model: PreTrainedModel, plain: bool, **options: Any) -> None:
        self.name = name
        self.model = model
        self.plain = plain
        self.options = options

    def run(self, task: Task, on_round: OnRound | None = None) -> Outcome:
        streamer = _FirstToken()
        forwards = 0

        def count(*_: Any) -> None:
            nonlocal forwards
            forwards += 1

        hook = self.model.register_forward_pre_hook(count)
        start = perf_counter()
        with torch.inference_mode():
            ids = self.model.generate(
                **task.inputs, do_sample=False, streamer=streamer, **self.options
            )
        total = 1e3 * (perf_counter() - start)
        hook.remove()
        tokens = ids[0, task.inputs["input_ids"].shape[1] :].tolist()
        ttft = 1e3 * (streamer.at - start) if streamer.at else total
        # Assisted generation verifies drafts in its first pass: it has no prefill of its own.
        return Outcome(tokens, total, ttft, ttft if self.plain else None, forwards=forwards)
