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
    """What a decoder asks of a target of batch 1; `TransformersTarget` says more, and what raises.

    Attributes:
        cache: K and V of the committed rows.
        device: where its tensors lie.
        vocab_size: token ids are below it.
        num_layers: layers of the cache.
        turn: how rotary positions go on behind the prompt.
    """

    cache: KVCache
    device: torch.device
    vocab_size: int
    num_layers: int
    turn: Turn

    def batched(self, batch: int) -> BatchTarget:
        """A target over the same weights that answers `batch` requests at once."""

    def prefill(
        self,
        inputs: Mapping[str, torch.Tensor],
        logits_processor: LogitsProcessorList | None = None,
        drafted: Sequence[int] = (),
        cache: KVCache | None = None,
        sampling: Sampling | None = None,
    ) -> Verdict:
        """Run the prompt; the first token, or more where drafts that ride along are accepted."""

    def forward(self, tree: DraftTree, height: int = 0) -> Any:
        """What `accept` wants to know about every row: logits, or tokens and flags."""

    def accept(self, tree: DraftTree, scored: Any, context: Sequence[int]) -> Verdict:
        """The longest path of `tree` that the target itself would say, and the token behind it."""

    def commit(self, verdict: Verdict) -> None:
        """Keep the rows of the accepted path in the cache, and no others."""
