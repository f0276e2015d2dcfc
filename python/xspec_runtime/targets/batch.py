"""Several requests in one forward pass: trees of different sizes at different lengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import LogitsProcessorList

from ..batch_cache import BatchKVCache
from ..drafters.base import MAX_ROWS, DraftTree
from .greedy import TreeRows, Verdict, decide, decide_steps, lay_out, walk
from .transformers import TransformersTarget


@dataclass(slots=True)
class _Running:
    """What the decision on one request needs beside its logits."""

    prompt: torch.Tensor
    processor: LogitsProcessorList | None


class BatchTarget:
    """Up to `batch` requests over the model of `target`, each as that target would answer it.

    Running requests are numbered 0, 1, ... without gaps. A prompt is prefilled by itself, so it is
    never padded; a round verifies one tree a request, filled up to the tallest.

    Args:
        target: whose model, backend and capacity are used; its own cache is not.
        batch: requests at once; KV storage is allocated for all of them on first use.

    Raises:
        ValueError: `batch` is below 1.
    """

    def __init__(self, target: TransformersTarget, batch: int = 8) -> None:
        if batch < 1:
            raise ValueError(f"batch must be at least 1, got {batch}")
        self.target = target
        self.cache = BatchKVCache(target.num_layers, target.cache.capacity, batch)
        self._running: list[_Running] = []
        self._nodes = torch.arange(MAX_ROWS, device=target.device)

    def reset(self) -> None:
        """Forget every request."""
        self.cache.reset()
        self._running.clear()

    def room(self, request: int) -> int:
        """Rows that still fit behind a running request."""
        return self.cache.slots[request].room

    def prefill(
        self,
        inputs: Mapping[str, torch.Tensor],
        logits_processor: LogitsProcessorList | None = None,
        drafted: Sequence[int] = (),
    ) -> Verdict:
        """Start a request, which gets the next number; see `TransformersTarget.prefill`.

        Raises:
            RuntimeError: `batch` requests are running, or as there.
        """
        number = self.cache.active
        if number == self.cache.batch:
            raise RuntimeError(f"{number} requests are running, which is the batch size")
        slot = self.cache.slots[number]
        verdict = self.target.prefill(inputs, logits_processor, drafted, slot)
        self.cache.active += 1
        self._running.append(_Running(inputs["input_ids"], logits_processor))
        return verdict

    @torch.inference_mode()
    def forward(self, trees: Sequence[DraftTree], height: int = 0) -> torch.Tensor:
        """Logits ``[B, N, V]`` after every node of one tree a running request, in one pass.

        N is the rows of the tallest tree, or `height` if that is more; the rows after a tree's own
        are inert.
        """
        for slot, tree in zip(self.cache.slots, trees, strict=False):
            slot.check_room(len(tree))
        rows = max(height, *map(len, trees))
        target = self.target
        self._laid = lay_out(trees, rows, target.device, target.backend)
        lengths = self.cache.place(rows)
        return target.model(
            input_ids=self._laid.tokens,
            position_ids=self._laid.depth + lengths[:, None],
            past_key_values=self.cache,
            use_cache=True,
            attention_mask=self._additive_mask(self._laid, lengths, rows),
            xspec_tree=True,
        ).logits

    @torch.inference_mode()
    def accept(
        self, trees: Sequence[DraftTree], logits: torch.Tensor, contexts: Sequence[Sequence[int]]
    ) -> list[Verdict]:
        """The greedy decisions on `trees`, whose `logits` the last `forward` gave; nothing is
        committed yet. `contexts` are the answers so far, each root its answer's last token.

        Raises:
            RuntimeError: the logits are NaN on an accepted path.
        """
        if any(running.processor for running in self._running):
            return self._accept_each(trees, logits, contexts)
        if logits.shape[1] == 1:
            self._paths = None
            return decide_steps(logits[:, 0])
        verdicts, result = decide(logits, self._laid, self.target.backend)
        self._paths = (result.accept_path, result.accept_len)
        return verdicts

    @torch.inference_mode()
    def commit(self, verdicts: Sequence[Verdict]) -> None:
        """Keep the KV rows of every root and accepted path."""
        path, length = self._paths or (None, None)
        self.cache.commit(path, length, [v.accepted for v in verdicts])

    def release(self, request: int) -> None:
        """End a running request; the last one takes its number."""
        self.cache.release(request)
        last = self._running.pop()
        if request < len(self._running):
            self._running[request] = last

    def _accept_each(
        self, trees: Sequence[DraftTree], logits: torch.Tensor, contexts: Sequence[Sequence[int]]
    ) -> list[Verdict]:
        """`accept` where a request has processors: those walk, the others are decided at once."""
        verdicts, result = decide(logits, self._laid, self.target.backend)
        path, length = result.accept_path, result.accept_len
        for i, running in enumerate(self._running):
            if running.processor:
                answer = running.prompt.new_tensor([list(contexts[i])])
                prefix = torch.cat([running.prompt, answer], 1)
                verdicts[i] = verdict = walk(trees[i], logits[i], prefix, running.processor)
                path[i, : verdict.accepted] = verdict.path[0]
                length[i] = verdict.length[0]
        self._paths = (path, length)
        return verdicts

    def _additive_mask(self, laid: TreeRows, lengths: torch.Tensor, rows: int) -> torch.Tensor:
        """``[B, 1, N, S]``: 0 on a request's committed rows and the row's path, -inf elsewhere."""
        _, places, end = self.cache.writing
        committed = torch.arange(end, device=lengths.device) < lengths[:, None]
        seen = committed[:, None].expand(-1, rows, -1).contiguous()
        path = (laid.bits[:, :, None] >> self._nodes[:rows]) & 1 == 1
        seen.scatter_(2, places[:, None].expand(-1, rows, -1), path)
        mask = torch.zeros(seen.shape, dtype=self.target.dtype, device=lengths.device)
        return mask.masked_fill_(~seen, float("-inf"))[:, None]
