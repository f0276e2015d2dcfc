"""What an end-to-end comparison runs on: a pair of models, its tasks and the arms that fit them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ..arms import Arm, Task
from ..drafters.ngram import NgramMemory
from ..models import mini
from ..nf4_dense import keep_dense
from ..nf4_model import NF4Linear, quantize_model
from ..targets.base import Target
from ..targets.llama import LlamaTarget
from ..targets.transformers import TransformersTarget
from .modes import MODES

PLAIN = "target"
ENGINES = ("transformers", "llama")
WEIGHTS = ("float", "nf4")
# Transformers' lookup of the longest repeated n-gram; 3 was its best setting on grounded prompts.
MAX_MATCHING_NGRAM = 3
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
        weights: of every model, one of `WEIGHTS`.
        device: of the target, and of the draft models unless they have a `draft_device`.
        adapters: folder of runs of `xspec train`; `adapter_levels` and `adapter` choose.
    """

    gamma: int = 5
    rows: int = 16
    max_new_tokens: int = mini.MAX_NEW_TOKENS
    prefill_fused: str = "exact"
    engine: str = "transformers"
    weights: str = "float"
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    backend: str = "auto"
    draft_device: str = ""
    adapters: Path | None = None
    adapter_levels: str = ""
    adapter: str = ""

    @property
    def drafting_device(self) -> str:
        """Where draft models are."""
        return self.draft_device or self.device


@dataclass
class Workload:
    """Tasks and arms.

    Attributes:
        decode: ids to text.
        seen: answers known verbatim before the run (None: not applicable).
        optional: arms that run only where they are named.
        notes: lines to print with the results.
        files: closes what tasks read.
    """

    tasks: list[Task]
    arms: dict[str, Callable[[], Arm]]
    decode: Callable[[Sequence[int]], str]
    seen: set[tuple[int, ...]] | None = None
    facts: dict[str, object] = field(default_factory=dict)
    files: ExitStack = field(default_factory=ExitStack)
    optional: tuple[str, ...] = MODES
    notes: list[str] = field(default_factory=list)


def build_target(
    model: PreTrainedModel,
    settings: Settings,
    capacity: int = 1024,
    graphs: bool | str = "auto",
) -> Target:
    """The target on its own kernels, or on ours, with `graphs` as `LlamaTarget` takes them."""
    if settings.engine == "llama":
        max_depth = 32 if settings.rows <= 32 and settings.gamma < 32 else 64
        return LlamaTarget(model, capacity, settings.backend, max_depth=max_depth, graphs=graphs)
    return TransformersTarget(model, capacity, settings.backend)


def in_nf4(model: PreTrainedModel) -> PreTrainedModel:
    """The model with its linear layers in NF4, quantized here unless they are so already; on a CPU
    the layers keep dequantized copies, see `nf4_dense`.

    Raises:
        ValueError: it has none that can be quantized.
    """
    if not any(isinstance(module, NF4Linear) for module in model.modules()):
        quantize_model(model)
    keep_dense(model)
    return model


def unrelated_memory() -> NgramMemory:
    """An empty memory for requests that have nothing to do with the ones before them."""
    return NgramMemory(recency=0)
