"""A round of `LlamaTarget`: trees in with one copy, the decision out with one wait."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter
from typing import NamedTuple, TypeVar

import torch

from xspec_kernels import (
    INVALID,
    SEQUENCE,
    TOKENS,
    TailResult,
    await_record,
    ranges,
    read_record,
    tree_mask,
    verify_tail,
)

from ..drafters.base import MAX_ROWS, ON_DEVICE, DraftTree
from .greedy import Verdict

T = TypeVar("T")
# Microseconds at the record between two looks at the stream and at the clock.
_SLICE = 1000
# Seconds that a launch may take before it counts as one that never ends.
_LIMIT = 300.0


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

    A round is `write`, by the host; `load`, a forward pass and `tail`, on the device and without a
    wait, so that they can be captured; and `read`, which waits. `place` and `decide` are the same
    in two steps.

    Args:
        max_depth: 32 or 64, columns of `path_slot`.
        batch: trees a round at most.

    Raises:
        ValueError: `max_depth` is neither 32 nor 64.
    """

    def __init__(
        self,
        device: torch.device,
        backend: str,
        max_depth: int,
        batch: int = 1,
    ) -> None:
        if max_depth not in (32, 64):
            raise ValueError(f"max_depth must be 32 or 64, got {max_depth}")
        self.backend, self.max_depth, self.device = backend, max_depth, device
        pinned = device.type == "cuda"
        # Tokens are two words each; every field starts at a multiple of 16 bytes.
        nodes, requests = batch * MAX_ROWS, -(-batch // 4) * 4
        sizes = (2 * nodes, nodes, requests, requests, requests)
        self._host = torch.zeros(sum(sizes), dtype=torch.int32, pin_memory=pinned)
        self._words = self._host.to(device)
        self._fields = _fields(self._words, sizes)
        # A numpy array takes a list in a fraction of the time that a tensor does.
        self._host_fields = [field.numpy() for field in _fields(self._host, sizes)]
        self.batch, self.limits = batch, self._fields[-1]
        self._root = torch.zeros(batch, dtype=torch.int64, device=device)
        self._sequence = torch.zeros_like(self._root)
        self._record = torch.zeros(batch, TOKENS + MAX_ROWS, dtype=torch.int64, pin_memory=pinned)
        self._unread: list[int] | None = None

    def write(
        self,
        trees: Sequence[DraftTree],
        lengths: Sequence[int],
        rows: int,
        batch: int = 0,
        limits: Sequence[int] = (),
    ) -> None:
        """Put `trees` behind `lengths` committed rows into the host's half.

        Args:
            rows: of each tree, its own and then inert ones.
            batch: requests, those behind the trees are idle.
            limits: numbers for the device's `limits`; what they mean is up to the reader.

        Raises:
            ValueError: a tree is too deep.
        """
        for tree in trees:
            self.check_depth(tree)
        # A launch whose decision nobody has read may still be reading these numbers.
        self._settle()
        idle = max(batch - len(trees), 0)
        tokens: list[int] = []
        parents: list[int] = []
        for tree in trees:
            fill = [0] * (rows - len(tree))
            tokens += tree.tokens + fill
            parents += tree.parent_idx + fill
        none, nobody = [0] * (idle * rows), [0] * idle
        sizes = [*map(len, trees), *nobody]
        values = (tokens + none, parents + none, sizes, [*lengths, *nobody], limits)
        for field, value in zip(self._host_fields, values, strict=True):
            field[: len(value)] = value

    @property
    def root(self) -> torch.Tensor:
        """int64 ``[batch]``: the last token that each request's `tail` emitted."""
        return self._root

    def load(self, batch: int, rows: int, drafts: torch.Tensor | None = None) -> Round:
        """Bring what `write` left to the device; only launches.

        Args:
            drafts: int64 ``[G]``, what tokens from `ON_DEVICE` downwards stand for.
        """
        self._words.copy_(self._host, non_blocking=True)
        sizes = (batch * rows, batch * rows, batch, batch)
        tokens, parents, num_rows, lengths = (
            field[:size] for field, size in zip(self._fields, sizes, strict=False)
        )
        if drafts is not None:
            place = (ON_DEVICE - tokens).clamp(0, len(drafts) - 1)
            tokens = torch.where(tokens <= ON_DEVICE, drafts.index_select(0, place), tokens)
        parents = parents.view(batch, rows)
        mask = tree_mask(parents, num_rows, max_depth=self.max_depth, backend=self.backend)
        return Round(
            tokens.view(batch, rows), parents, num_rows, lengths,
            mask.ancestor_bits, mask.depth, mask.path_slot,
        )  # fmt: skip

    def tail(
        self,
        at: Round,
        ids: torch.Tensor,
        flags: torch.Tensor,
        caches: Sequence[tuple[torch.Tensor, torch.Tensor]],
    ) -> TailResult:
        """Accept the longest paths, publish them and move their rows into place; only launches.

        Args:
            ids, flags: ``[B, N]`` from `lm_head_argmax`.
            caches: K and V of every layer.
        """
        batch = len(at.tokens)
        return verify_tail(
            ids, flags, at.tokens, at.parents, at.bits, [t for pair in caches for t in pair],
            at.cache_seqlens, self._root[:batch], self._sequence[:batch], self._record[:batch],
            at.num_rows, backend=self.backend,
        )  # fmt: skip

    def launch(self, batch: int, run: Callable[[], T]) -> T:
        """Call `run`, which ends in a `tail` of so many requests."""
        before = self._record[:batch, SEQUENCE].tolist()
        result = run()
        self._unread = before
        return result

    def read(self, requests: int) -> list[Verdict]:
        """Wait for the last launch: its decisions on the first `requests`, which may be invalid.

        Raises:
            RuntimeError: it has published none.
        """
        with ranges.range_("readback", requests * self._record.shape[1]):
            self._settle()
            records = [read_record(self._record, request) for request in range(requests)]
        return [
            Verdict(r.tokens, len(r.tokens) - 1, r.near_ties, invalid=bool(r.status & INVALID))
            for r in records
        ]

    def place(self, trees: Sequence[DraftTree], lengths: Sequence[int], height: int = 0) -> Round:
        """`trees` behind `lengths` committed rows, each filled up to the tallest or to `height`.

        Raises:
            ValueError: a tree is too deep.
        """
        rows = max(height, *map(len, trees))
        self.write(trees, lengths, rows)
        return self.load(len(trees), rows)

    def decide(
        self,
        at: Round,
        ids: torch.Tensor,
        flags: torch.Tensor,
        caches: Sequence[tuple[torch.Tensor, torch.Tensor]],
    ) -> list[Verdict]:
        """`tail` and `read`; raises like that."""
        self.launch(len(at.tokens), lambda: self.tail(at, ids, flags, caches))
        return self.read(len(at.tokens))

    def check_depth(self, tree: DraftTree) -> None:
        """Raise `ValueError` where the tree is too deep."""
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

    def _settle(self) -> None:
        """Until every request of the last launch has its record; no CUDA call waits."""
        before, self._unread = self._unread or (), None
        deadline = perf_counter() + _LIMIT
        for request, number in enumerate(before):
            while not await_record(self._record, request, number, _SLICE):
                if self._idle() and not await_record(self._record, request, number, 0):
                    raise RuntimeError("the device is idle and has published no decision")
                if perf_counter() > deadline:
                    raise RuntimeError(f"no decision after {_LIMIT:.0f} s: a kernel hangs")

    def _idle(self) -> bool:
        """Whether there is nothing left to publish. Raises where a kernel failed."""
        return self.device.type != "cuda" or torch.cuda.current_stream(self.device).query()


def _fields(words: torch.Tensor, sizes: Sequence[int]) -> list[torch.Tensor]:
    """Tokens as int64, then the int32 fields."""
    tokens, *rest = words.split(sizes)
    return [tokens.view(torch.int64), *rest]
