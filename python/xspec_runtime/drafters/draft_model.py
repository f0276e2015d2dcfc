"""A model as drafter: it decodes greedily from the verified prefix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from xspec_kernels import ranges

from ..kv_cache import KVCache
from .base import DraftTree, Request
from .llama_steps import LlamaSteps


class ModelDrafter:
    """A chain of `gamma` tokens from a causal model with the target's vocabulary, on any device.

    The draft reads its own prompt (`Request.draft_inputs`: `input_ids` ``[1, L]`` and media) and
    then the target's committed tokens, so it always continues the verified prefix. Its KV rows of
    accepted drafts are kept, those of rejected ones dropped.

    Args:
        siblings: runner-up tokens added beside every chain token, as leaves.
        floor: the chain ends where the probability of its path falls below this; a step costs more
            than such a token is worth.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        gamma: int,
        siblings: int = 0,
        floor: float = 0.0,
        name: str = "draft",
        capacity: int = 1024,
    ) -> None:
        if gamma < 1:
            raise ValueError(f"gamma must be at least 1, got {gamma}")
        self.name = name
        self.model = model
        self.gamma = gamma
        self.siblings = siblings
        self.floor = floor
        text = model.config.get_text_config()
        self.cache = KVCache(text.num_hidden_layers, capacity)
        self._steps = LlamaSteps(model, self.cache) if LlamaSteps.fits(model) else self._step
        self._prompt = 0
        self._fed: list[int] = []

    @torch.inference_mode()
    def begin(self, request: Request) -> None:
        """Prefill the draft's own prompt, `request.draft_inputs`.

        Raises:
            ValueError: there are none, or they hold no `input_ids`.
            RuntimeError: the draft's logits are NaN.
        """
        inputs = request.inputs_on(self.model.device)
        if "input_ids" not in inputs:
            raise ValueError(f"drafter {self.name!r} needs draft_inputs with input_ids")
        self.cache.reset()
        with ranges.range_("draft.prefill", inputs["input_ids"].shape[-1]):
            self._first = self._forward(**inputs)
        # Any argmax of NaN is a draft like another: rejected, round after round.
        if self._first.isnan().any():
            raise RuntimeError("the draft's logits are NaN: its weights or inputs are damaged")
        self._prompt = self.cache.length
        self._fed = []

    @torch.inference_mode()
    def opening(self, rows: int) -> list[int]:
        """At most `rows` and `gamma` tokens of the draft's own answer, from its first on; asked
        before the first `propose`, which keeps the KV rows of those that were right.
        """
        logits, tokens, score = self._first, [], 1.0
        while True:
            best = logits.softmax(-1).max(-1)
            tokens.append(int(best.indices))
            score *= float(best.values)
            if len(tokens) >= min(rows, self.gamma) or score < self.floor:
                return tokens
            self._fed.append(tokens[-1])
            with ranges.range_("draft.decode", 1):
                logits = self._steps(tokens[-1:])

    @torch.inference_mode()
    def propose(self, context: Sequence[int], rows: int) -> DraftTree:
        """A chain of the model's own greedy tokens behind `context`, siblings beside them."""
        tree = DraftTree.root(context[-1])
        pending = self._rewind(context)
        node, score = 0, 1.0
        for _ in range(min(self.gamma, rows - 1)):
            self._fed += pending
            with ranges.range_("draft.decode", len(pending)):
                best = self._steps(pending).softmax(-1).topk(1 + self.siblings)
                probabilities, tokens = best.values.tolist(), best.indices.tolist()
            parent = node
            node = tree.add(parent, tokens[0], score * probabilities[0])
            for token, probability in zip(tokens[1:], probabilities[1:], strict=True):
                tree.add(parent, token, score * probability)
            score *= probabilities[0]
            if score < self.floor:
                break
            pending = [tokens[0]]
        return tree.best(rows)

    def end(self, answer: Sequence[int]) -> None:
        """Nothing is learned."""

    def _rewind(self, context: Sequence[int]) -> list[int]:
        """Drop KV rows that do not belong to `context`; returns its tokens not yet fed (at least
        one).
        """
        same = 0
        limit = min(len(self._fed), len(context) - 1)
        while same < limit and self._fed[same] == context[same]:
            same += 1
        self._fed = self._fed[:same]
        self.cache.truncate(self._prompt + same)
        return list(context[same:])

    def _step(self, tokens: list[int]) -> torch.Tensor:
        return self._forward(torch.tensor([tokens], device=self.model.device))

    def _forward(self, input_ids: torch.Tensor, **kwargs) -> torch.Tensor:
        """One pass through the model itself; logits ``[V]`` after the last token."""
        self.cache.check_room(input_ids.shape[1])
        kwargs["logits_to_keep"] = 1
        logits = self.model(
            input_ids=input_ids, past_key_values=self.cache, use_cache=True, **kwargs
        ).logits
        self.cache.advance(input_ids.shape[1])
        return logits[0, -1]
