"""A round of `LlamaTarget`: trees in with one copy, the decision out with one wait."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from xspec_kernels import (
    INVALID,
    SEQUENCE,
    TOKENS,
    ranges,
    read_record,
    tree_mask,
    verify_tail,
)

from ..drafters.base import MAX_ROWS, DraftTree
from .greedy import Verdict

# Looks at the record between two looks at the stream.
_POLLS = 1 << 14


class Round(NamedTuple):
    """Draft trees side by side; rows past a tree's own are inert.

    Attributes:
        tokens: int64 ``[B, N]``; parents: int32 ``[B, N]``.
        num_rows, cache_seqlens: int32 ``[B]``.
        bits, depth, path_slot: of `tree_mask`.
    """

    tokens: torch.Tensor
    parents: torch.Tensor
    num_rows: torch.Tensor
    cache_seqlens: torch.Tensor
    bits: torch.Tensor
    depth: torch.Tensor
    path_slot: torch.Tensor

    @property
    def linear_rows(self) -> torch.Tensor | None:
        """Rows that a product has to compute; None means all, as trees of a batch leave gaps."""
        return self.num_rows if len(self.num_rows) == 1 else None


class RoundBuffers:
    """Memory of rounds, at addresses that stay.

    Args:
        max_depth: 32 or 64, columns of `path_slot`.
        batch: trees a round at most.

    Raises:
        ValueError: `max_depth` is neither 32 nor 64.
    """

    def __init__(self, device: torch.device, backend: str, max_depth: int, batch: int = 1) -> None:
        if max_depth not in (32, 64):
            raise ValueError(f"max_depth must be 32 or 64, got {max_depth}")
        self.backend, self.max_depth, self.device = backend, max_depth, device
        pinned = device.type == "cuda"
        # Tokens are two words each; every field starts at a multiple of 16 bytes.
        nodes, requests = batch * MAX_ROWS, -(-batch // 4) * 4
        sizes = (2 * nodes, nodes, requests, requests)
        self._host = torch.zeros(sum(sizes), dtype=torch.int32, pin_memory=pinned)
        self._words = self._host.to(device)
        self._host_fields, self._fields = _fields(self._host, sizes), _fields(self._words, sizes)
        self._root = torch.zeros(batch, dtype=torch.int64, device=device)
        self._sequence = torch.zeros_like(self._root)
        self._record = torch.zeros(batch, TOKENS + MAX_ROWS, dtype=torch.int64, pin_memory=pinned)

    def place(self, trees: Sequence[DraftTree], lengths: Sequence[int], height: int = 0) -> Round:
        """`trees` behind `lengths` committed rows, each filled up to the tallest or to `height`.

        Raises:
            ValueError: a tree is too deep.
        """
        rows, batch = max(height, *map(len, trees)), len(trees)
        tokens: list[int] = []
        parents: list[int] = []
        for tree in trees:
            self._check_depth(tree)
            fill = [0] * (rows - len(tree))
            tokens += tree.tokens + fill
            parents += tree.parent_idx + fill
        # The device has read the last round's numbers: its decision was waited for.
        values = (tokens, parents, list(map(len, trees)), list(lengths))
        for field, value in zip(self._host_fields, values, strict=True):
            field[: len(value)] = torch.tensor(value)
        self._words.copy_(self._host, non_blocking=True)
        sizes = (batch * rows, batch * rows, batch, batch)
        tokens, parents, num_rows, lengths = (
            field[:size] for field, size in zip(self._fields, sizes, strict=True)
        )
        parents = parents.view(batch, rows)
        mask = tree_mask(parents, num_rows, max_depth=self.max_depth, backend=self.backend)
        return Round(
            tokens.view(batch, rows), parents, num_rows, lengths,
            mask.ancestor_bits, mask.depth, mask.path_slot,
        )  # fmt: skip

    def decide(
        self,
        at: Round,
        ids: torch.Tensor,
        flags: torch.Tensor,
        caches: Sequence[tuple[torch.Tensor, torch.Tensor]],
    ) -> list[Verdict]:
        """Accept the longest paths and move their rows into place.

        Args:
            ids, flags: ``[B, N]`` from `lm_head_argmax`.
            caches: K and V of every layer.

        Raises:
            RuntimeError: the logits are NaN on an accepted path.
        """
        batch = len(at.tokens)
        before = self._record[:batch, SEQUENCE].tolist()
        verify_tail(
            ids, flags, at.tokens, at.parents, at.bits, [t for pair in caches for t in pair],
            at.cache_seqlens, self._root[:batch], self._sequence[:batch], self._record[:batch],
            at.num_rows, backend=self.backend,
        )  # fmt: skip
        with ranges.range_("readback", batch * self._record.shape[1]):
            self._wait(before)
            records = [read_record(self._record, request) for request in range(batch)]
        if any(record.status & INVALID for record in records):
            raise RuntimeError("the target's logits are NaN: its weights or inputs are damaged")
        return [Verdict(r.tokens, len(r.tokens) - 1, r.near_ties) for r in records]

    def _check_depth(self, tree: DraftTree) -> None:
        if len(tree) <= self.max_depth:
            return
        depths: list[int] = []
        for parent in tree.parent_idx:
            depths.append(0 if parent < 0 else depths[parent] + 1)
        if max(depths) >= self.max_depth:
            raise ValueError(
                f"the tree is {max(depths)} deep, expected at most {self.max_depth - 1}; "
                "LlamaTarget(max_depth=64) takes every tree"
            )

    def _wait(self, before: Sequence[int]) -> None:
        """Until the record of every request is complete; no CUDA call waits."""
        numbers = self._record.numpy()[:, SEQUENCE]
        for request, number in enumerate(before):
            polls = 0
            while numbers[request] == number:
                polls += 1
                # Raises where a kernel failed; an idle stream has nothing left to publish.
                idle = polls % _POLLS == 0 and torch.cuda.current_stream(self.device).query()
                if idle and numbers[request] == number:
                    raise RuntimeError("the device is idle and has published no decision")


def _fields(words: torch.Tensor, sizes: Sequence[int]) -> list[torch.Tensor]:
    """Tokens as int64, then the int32 fields."""
    tokens, *rest = words.split(sizes)
    return [tokens.view(torch.int64), *rest]
