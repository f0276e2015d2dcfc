"""Several requests in one forward pass: trees of different sizes at different lengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import LogitsProcessorList

from ..batch_cache import BatchKVCache
from ..drafters.base import MAX_ROWS, DraftTree
from .greedy import TreeRows, Verdict, decide, decide_steps, lay_out, walk
from .sampling import Draws, Sampling
from .transformers import TransformersTarget
from .windows import Turn


@dataclass(slots=True)
class _Running:
    """What the decision on one request needs beside its logits."""

    prompt: torch.Tensor
    processor: LogitsProcessorList | None
    sampling: Sampling | None
    turn: Turn


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
        sampling: Sampling | None = None,
    ) -> Verdict:
        """Start a request, which gets the next number; see `TransformersTarget.prefill`.

        Raises:
            ValueError: it samples by another law than those that are running.
            RuntimeError: `batch` requests are running.
            Exception: as there; the request has not started, the others go on.
        """
        number = self.cache.active
        if number == self.cache.batch:
            raise RuntimeError(f"{number} requests are running, which is the batch size")
        laws = {one.sampling and tuple(one.sampling.law.items()) for one in self._running}
        if laws and (sampling and tuple(sampling.law.items())) not in laws:
            raise ValueError("requests of a batch sample by one law, or are all greedy")
        slot = self.cache.slots[number]
        try:
            verdict = self.target.prefill(inputs, logits_processor, drafted, slot, sampling)
            turn = self.target.turn
        except BaseException:
            self.cache.wipe(number)
            raise
        self.cache.active += 1
        self._running.append(_Running(inputs["input_ids"], logits_processor, sampling, turn))
        return verdict

    def check(self, request: int, tree: DraftTree) -> None:
        """Raise what is wrong with the tree of a running request, before a pass shared with others.

        Raises:
            ValueError: it holds a token that the model has not.
            RuntimeError: it does not fit the cache.
        """
        low, high = min(tree.tokens), max(tree.tokens)
        if not 0 <= low <= high < self.target.vocab_size:
            raise ValueError(
                f"drafted ids must be in 0..{self.target.vocab_size - 1}, got {low}..{high}"
            )
        self.cache.slots[request].check_room(len(tree))

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
        positions = self._laid.depth + lengths[:, None]
        return target.model(
            input_ids=self._laid.tokens,
            position_ids=self._turned(positions),
            past_key_values=self.cache,
            use_cache=True,
            attention_mask=self._masks(self._laid, lengths, rows, positions),
            xspec_tree=True,
        ).logits

    @torch.inference_mode()
    def accept(
        self, trees: Sequence[DraftTree], logits: torch.Tensor, contexts: Sequence[Sequence[int]]
    ) -> list[Verdict]:
        """The decisions on `trees`, whose `logits` the last `forward` gave; nothing is
        committed yet. `contexts` are the answers so far, each root its answer's last token. A
        verdict may be invalid: release that request as damaged.
        """
        draws = self._draws(logits.shape[1], contexts)
        if any(running.processor for running in self._running):
            return self._accept_each(trees, logits, contexts, draws)
        if logits.shape[1] == 1:
            self._paths = None
            return decide_steps(logits[:, 0], draws)
        verdicts, result = decide(logits, self._laid, self.target.backend, draws)
        self._paths = (result.accept_path, result.accept_len)
        return verdicts

    @torch.inference_mode()
    def commit(self, verdicts: Sequence[Verdict]) -> None:
        """Keep the KV rows of every root and accepted path."""
        path, length = self._paths or (None, None)
        self.cache.commit(path, length, [v.accepted for v in verdicts])

    def release(self, request: int, damaged: bool = False) -> None:
        """End a running request; the last one takes its number.

        Args:
            damaged: its rows may hold NaNs, and are wiped.
        """
        if damaged:
            self.cache.wipe(request)
        self.cache.release(request)
        last = self._running.pop()
        if request < len(self._running):
            self._running[request] = last

    def _draws(self, rows: int, contexts: Sequence[Sequence[int]]) -> Draws | None:
        """The running requests' uniforms, None where they are greedy."""
        asked = [
            (one.sampling, len(context))
            for one, context in zip(self._running, contexts, strict=True)
            if one.sampling
        ]
        target = self.target
        return Draws.of(asked, rows, target.device, target.backend) if asked else None

    def _accept_each(
        self,
        trees: Sequence[DraftTree],
        logits: torch.Tensor,
        contexts: Sequence[Sequence[int]],
        draws: Draws | None,
    ) -> list[Verdict]:
        """`accept` where a request has processors: those walk, the others are decided at once."""
        verdicts, result = decide(logits, self._laid, self.target.backend, draws)
        path, length = result.accept_path, result.accept_len
        for i, running in enumerate(self._running):
            if running.processor:
                answer = running.prompt.new_tensor([list(contexts[i])])
                prefix = torch.cat([running.prompt, answer], 1)
                own = draws and draws.request(i)
                verdicts[i] = verdict = walk(trees[i], logits[i], prefix, running.processor, own)
                path[i, : verdict.accepted] = verdict.path[0]
                length[i] = verdict.length[0]
        self._paths = (path, length)
        return verdicts

    def _turned(self, positions: torch.Tensor) -> torch.Tensor:
        """Row numbers ``[B, N]`` as the model takes them, see `Turn`."""
        turns = [one.turn for one in self._running]
        if not any(turn.shifts for turn in turns):
            return positions
        each = (turn.positions(row[None]) for turn, row in zip(turns, positions, strict=True))
        return torch.cat(list(each), 1)

    def _masks(
        self, laid: TreeRows, lengths: torch.Tensor, rows: int, positions: torch.Tensor
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        """`_additive_mask` as the model takes it."""
        mask = self._additive_mask(laid, lengths, rows)
        if self.target.windows.window is None:
            return mask
        _, places, end = self.cache.writing
        keys = torch.arange(end, device=lengths.device).expand(len(lengths), -1).clone()
        keys.scatter_(1, places, positions.to(keys.dtype))
        return self.target.windows.masks(mask, positions, keys)

    def _additive_mask(self, laid: TreeRows, lengths: torch.Tensor, rows: int) -> torch.Tensor:
        """``[B, 1, N, S]``: 0 on a request's committed rows and the row's path, -inf elsewhere."""
        _, places, end = self.cache.writing
        committed = torch.arange(end, device=lengths.device) < lengths[:, None]
        seen = committed[:, None].expand(-1, rows, -1).contiguous()
        path = (laid.bits[:, :, None] >> self._nodes[:rows]) & 1 == 1
        seen.scatter_(2, places[:, None].expand(-1, rows, -1), path)
        mask = torch.zeros(seen.shape, dtype=self.target.dtype, device=lengths.device)
        return mask.masked_fill_(~seen, float("-inf"))[:, None]
