"""Several requests in one forward pass of `LlamaTarget`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..drafters.base import DraftTree
from .batch import BatchTarget
from .greedy import TreeRows, Verdict
from .llama import LlamaTarget
from .llama_decoder import Scored
from .llama_graphs import LlamaGraphs
from .llama_rounds import RoundBuffers


class LlamaBatchTarget(BatchTarget):
    """Up to `batch` requests over a `LlamaTarget`, each as that target would answer it by itself,
    bit for bit where the ops are; see `BatchTarget`.
    """

    target: LlamaTarget

    def __init__(self, target: LlamaTarget, batch: int = 8) -> None:
        super().__init__(target, batch)
        self._rounds = RoundBuffers(target.device, target.backend, target.max_depth, batch)
        self._graphs = LlamaGraphs(target.decoder, self._rounds) if target.graphs else None

    def check(self, request: int, tree: DraftTree) -> None:
        """See `BatchTarget.check`; a tree may also be too deep."""
        super().check(request, tree)
        self._rounds.check_depth(tree)

    @torch.inference_mode()
    def forward(self, trees: Sequence[DraftTree], height: int = 0) -> Scored:
        """What follows every node of one tree a running request, in one pass; `height` as in
        `LlamaTarget.forward`.
        """
        used = slice(0, len(trees))
        slots = self.cache.slots[used]
        for slot, tree in zip(slots, trees, strict=True):
            slot.check_room(len(tree))
        lengths = [slot.length for slot in slots]
        if self._graphs and not self._walks:
            self._round = None
            whole = [(layer.keys, layer.values) for layer in self.cache.layers]
            return self._graphs.verify(trees, lengths, height, whole)
        self._caches = [(layer.keys[used], layer.values[used]) for layer in self.cache.layers]
        self._round = self._rounds.place(trees, lengths, height)
        decoder = self.target.decoder
        hidden = decoder.step(self._round, self._caches)
        if self._walks:
            return Scored(hidden, None, None)
        return decoder.score(hidden, self._round)

    @torch.inference_mode()
    def accept(
        self, trees: Sequence[DraftTree], scored: Scored, contexts: Sequence[Sequence[int]]
    ) -> list[Verdict]:
        """The decisions on `trees`, which the last `forward` `scored`; see
        `BatchTarget.accept`.
        """
        at = self._round
        if at is None:
            return self._rounds.read(len(trees))
        if not self._walks:
            return self._rounds.decide(at, scored.ids, scored.flags, self._caches)
        self.cache.place(at.tokens.shape[1])
        self._laid = TreeRows(at.tokens, at.parents, at.bits, at.depth, at.num_rows)
        logits = self.target.decoder.logits(scored.hidden)
        return super().accept(trees, logits.view(*at.tokens.shape, -1), contexts)

    @torch.inference_mode()
    def commit(self, verdicts: Sequence[Verdict]) -> None:
        """Keep the KV rows of every root and accepted path."""
        if self._walks:
            super().commit(verdicts)
            return
        for slot, verdict in zip(self.cache.slots, verdicts, strict=False):
            slot.advance(verdict.accepted + 1)

    @property
    def _walks(self) -> bool:
        """Whether a running request samples or has logits processors."""
        return any(running.processor or running.sampling for running in self._running)
