"""Five stages of one model on one clip, timed: load, preprocess, vision, prefill, decode."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter

import torch

from ..config import SpecConfig
from ..data.dsec import Clip
from ..engine import SpeculativeDecoder
from ..models.vlm_pair import Inputs, VlmPair, vision_modules
from ..targets.transformers import TransformersTarget

STAGES = ("load", "preprocess", "vision", "prefill", "decode")


@dataclass(slots=True)
class Timed:
    """What one model did; times in seconds.

    Attributes:
        stages: seconds of each of `STAGES`. Vision is taken out of the forward pass that it is a
            part of; prefill is the rest of that pass.
        started: when it began, on the clock of `perf_counter`.
        emitted: when each token was there, since `started`.
        prompt: rows of the prefill.
        memory_mb: GPU memory before, after and at its peak; None on a CPU.
    """

    stages: dict[str, float]
    started: float
    tokens: list[int]
    emitted: list[float]
    prompt: int
    memory_mb: dict[str, float] | None = None
    near_ties: int = 0

    @property
    def total(self) -> float:
        return sum(self.stages.values())

    @property
    def first_token(self) -> float:
        """Seconds from the start to the end of the prefill."""
        return self.total - self.stages["decode"]


@dataclass(slots=True)
class StageModel:
    """A model of a pair with the steps that make its inputs."""

    name: str
    target: TransformersTarget
    read: Callable[[Clip], object]
    prepare: Callable[[object, str], Inputs]
    config: SpecConfig
    _vision: tuple[torch.nn.Module, torch.nn.Module] = field(init=False)

    def __post_init__(self) -> None:
        self._vision = vision_modules(self.target.model)

    def run(self, clip: Clip, question: str) -> Timed:
        """Answer `question` about `clip` by plain greedy decoding."""
        device = self.target.device
        before = _memory(device)
        marks = [perf_counter()]
        source = self.read(clip)
        marks.append(perf_counter())
        inputs = self.prepare(source, question)
        _wait(device)
        marks.append(perf_counter())
        emitted: list[float] = []
        seen: list[float] = []

        def note(tokens: list[int]) -> None:
            emitted.extend([perf_counter() - marks[0]] * len(tokens))

        with self._watch(seen, device):
            out = SpeculativeDecoder(self.target, None, self.config).generate(
                inputs, on_tokens=note
            )
        vision = seen[1] - seen[0] if len(seen) == 2 else 0.0
        stages = (
            marks[1] - marks[0],
            marks[2] - marks[1],
            vision,
            out.prefill_ms / 1e3 - vision,
            out.decode_ms / 1e3,
        )
        return Timed(
            dict(zip(STAGES, stages, strict=True)),
            marks[0],
            out.tokens,
            emitted,
            inputs["input_ids"].shape[1],
            _memory_change(device, before),
            out.near_ties,
        )

    @contextmanager
    def _watch(self, seen: list[float], device: torch.device) -> Iterator[None]:
        """Note when media enter the tower and when they leave the connector."""

        def mark(*_: object) -> None:
            _wait(device)
            seen.append(perf_counter())

        first, last = self._vision
        hooks = [first.register_forward_pre_hook(mark), last.register_forward_hook(mark)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def stage_models(
    pair: VlmPair, max_new_tokens: int, frame_mode: str, capacity: int
) -> tuple[StageModel, StageModel]:
    """The draft and the target of `pair`."""
    config = SpecConfig(1, max_new_tokens, pair.stop_ids)
    draft = StageModel(
        "eventgpt",
        TransformersTarget(pair.draft, capacity),
        lambda clip: pair.read_events(clip.events),
        pair.draft_inputs,
        config,
    )
    target = StageModel(
        "videollava",
        TransformersTarget(pair.target, capacity),
        lambda clip: pair.read_video(clip.video, frame_mode),
        pair.target_inputs,
        config,
    )
    return draft, target


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        # Another model may be at work on another stream.
        torch.cuda.current_stream(device).synchronize()


def _memory(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device) / 2**20


def _memory_change(device: torch.device, before: float | None) -> dict[str, float] | None:
    if before is None:
        return None
    after = torch.cuda.memory_allocated(device) / 2**20
    peak = torch.cuda.max_memory_allocated(device) / 2**20
    return {"before": before, "after": after, "peak": peak, "inference_delta": peak - before}
