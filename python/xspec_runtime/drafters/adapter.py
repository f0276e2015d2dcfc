"""An adapter as drafter: what it makes of the draft's text, or of nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel

from xspec_kernels import ranges

from ..adapters.base import Adapter
from ..kv_cache import KVCache
from .base import DraftTree, Request
from .llama_steps import LlamaSteps


class DraftText:
    """The whole greedy answer of a draft model to its own prompt, decoded when asked for.

    Args:
        ends: ids that end an answer; the one that did is its last.
        max_new_tokens: length at most.
        capacity: rows of the KV cache: prompt and answer.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        ends: Sequence[int],
        max_new_tokens: int = 128,
        capacity: int = 1024,
    ) -> None:
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        self.model = model
        self.ends = frozenset(ends)
        self.max_new_tokens = max_new_tokens
        text = model.config.get_text_config()
        self.vocab_size = text.vocab_size
        self.cache = KVCache(text.num_hidden_layers, capacity)
        self._steps = LlamaSteps(model, self.cache) if LlamaSteps.fits(model) else self._step

    @torch.inference_mode()
    def __call__(self, request: Request) -> list[int]:
        """Ids of the answer to ``request.draft_inputs``."""
        inputs = dict(request.draft_inputs)
        if "input_ids" not in inputs:
            raise ValueError("an adapter needs draft_inputs with input_ids for its draft model")
        self.cache.reset()
        with ranges.range_("draft.prefill", inputs["input_ids"].shape[-1]):
            text = [int(self._forward(**inputs).argmax())]
        while text[-1] not in self.ends and len(text) < self.max_new_tokens:
            with ranges.range_("draft.decode", 1):
                text.append(int(self._steps(text[-1:]).argmax()))
        return text

    def _step(self, tokens: Sequence[int]) -> torch.Tensor:
        return self._forward(torch.tensor([list(tokens)], device=self.model.device))

    def _forward(self, input_ids: torch.Tensor, **kwargs) -> torch.Tensor:
        """One pass through the model itself; logits ``[V]`` after the last token."""
        self.cache.check_room(input_ids.shape[1])
        logits = self.model(
            input_ids=input_ids,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
            **kwargs,
        ).logits
        self.cache.advance(input_ids.shape[1])
        return logits[0, -1]


class AdapterDrafter:
    """A chain of at most `gamma` tokens from an adapter.

    Args:
        adapter: of any kind; its vocabulary is the target's.
        text: the draft's text for a request, decoded (`DraftText`) or recorded; not called where
            the draft is hidden.
        hide_draft: the adapter sees padding in place of the draft's text, and no draft model runs:
            what is then accepted owes nothing to the draft.
        floor: the chain ends where the probability of its path falls below this.
    """

    def __init__(
        self,
        adapter: Adapter,
        gamma: int,
        text: Callable[[Request], Sequence[int]] | None = None,
        hide_draft: bool = False,
        floor: float = 0.0,
        name: str = "adapter",
    ) -> None:
        if gamma < 1:
            raise ValueError(f"gamma must be at least 1, got {gamma}")
        if text is None and not hide_draft:
            raise ValueError(f"drafter {name!r} needs a draft's text, or hide_draft=True")
        size, expected = getattr(text, "vocab_size", None), adapter.config.vocab_size
        if size not in (None, expected):
            raise ValueError(
                f"drafter {name!r}: the draft model has {size} tokens, the adapter {expected}"
            )
        self.name = name
        self.gamma = gamma
        self.floor = floor
        self.vocab_size = expected
        self._text = None if hide_draft else text
        self._proposer = adapter.proposer()
        self._draft: list[int] = []

    def begin(self, request: Request) -> None:
        """Get the draft's text and let the adapter read it.

        Raises:
            ValueError: the text holds ids outside the adapter's vocabulary.
        """
        self._draft = list(self._text(request)) if self._text else []
        if any(not 0 <= token < self.vocab_size for token in self._draft):
            raise ValueError(
                f"the draft's text holds ids outside 0..{self.vocab_size - 1}, the vocabulary of "
                f"the adapter of drafter {self.name!r}"
            )
        with ranges.range_("draft.adapter", len(self._draft)):
            self._proposer.begin(self._draft)

    def propose(self, context: Sequence[int], rows: int) -> DraftTree:
        """A chain of at most ``rows - 1`` tokens behind ``context[-1]``."""
        with ranges.range_("draft.adapter", len(self._draft)):
            tokens, scores = self._proposer.chain(context, min(self.gamma, rows - 1), self.floor)
        return DraftTree.chain(context[-1], tokens, scores)

    def end(self, answer: Sequence[int]) -> None:
        """Nothing is learned."""
