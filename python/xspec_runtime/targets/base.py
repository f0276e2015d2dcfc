"""What a target does for a decoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from transformers import LogitsProcessorList

from ..drafters.base import DraftTree
from ..kv_cache import KVCache
from .greedy import Verdict
from .sampling import Sampling
from .windows import Turn

if TYPE_CHECKING:
    from .batch import BatchTarget


class Target(Protocol):
    """A target of batch 1; `TransformersTarget` says what each method does and raises."""

    cache: KVCache
    device: torch.device
    vocab_size: int
    num_layers: int
    turn: Turn

    def batched(self, batch: int) -> BatchTarget: ...

    def prefill(
        self,
        inputs: Mapping[str, torch.Tensor],
        logits_processor: LogitsProcessorList | None = None,
        drafted: Sequence[int] = (),
        cache: KVCache | None = None,
        sampling: Sampling | None = None,
    ) -> Verdict: ...

    def forward(self, tree: DraftTree, height: int = 0) -> Any:
        """What `accept` wants to know about every row: logits, or tokens and flags."""

    def accept(self, tree: DraftTree, scored: Any, context: Sequence[int]) -> Verdict: ...

    def commit(self, verdict: Verdict) -> None: ...
