"""Rounds and prefills of `LlamaTarget` as one launch each.

A captured round has a fixed shape B x N; the rows of each tree are a number on the device. Kernels
work on row blocks of 64 and return at once where a row lies behind the tree, so one graph serves a
single request, N = 64: fewer rows would cost the same. In a batch, trees leave gaps, and those are
computed: N is what fills the row blocks that the tallest tree needs, and B and the blocks are
powers of two, which makes ten graphs for eight requests. Called plainly, without a graph, a round
has just the rows of the tallest tree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..drafters.base import MAX_ROWS, DraftTree
from ..graphs import Graphs
from .llama_decoder import Caches, LlamaDecoder, Scored
from .llama_rounds import RoundBuffers

# Prefill graphs kept, one a padded length.
PREFILL_GRAPHS = 8


class LlamaGraphs:
    """Launches over one decoder and its `rounds`; the decision is then there to be read."""

    def __init__(self, decoder: LlamaDecoder, rounds: RoundBuffers) -> None:
        self._decoder, self._rounds = decoder, rounds
        self.verifies = Graphs(rounds.device)
        self.prefills = Graphs(rounds.device, PREFILL_GRAPHS, beside=self.verifies)
        self._prompt: torch.Tensor | None = None

    def verify(
        self, trees: Sequence[DraftTree], lengths: Sequence[int], height: int, caches: Caches
    ) -> Scored:
        """Forward pass, decision and commit of `trees` behind `lengths` committed rows.

        Args:
            height: rows of the pass at least.
            caches: of as many requests as there are trees, or more; always the same ones.

        Raises:
            ValueError: a tree is too deep.
        """
        rows = max(height, *map(len, trees))
        batch, rows = self._shape(len(trees), rows)
        self._rounds.write(trees, lengths, rows, batch)
        run = self.verifies.get(
            (batch, rows, caches[0][0].data_ptr()),
            lambda: _verify(self._decoder, self._rounds, _first(caches, batch), rows),
        )
        return self._rounds.launch(batch, run)

    def prompt(self, capacity: int) -> torch.Tensor:
        """``[capacity, D]`` for embedded prompts, always the same memory."""
        if self._prompt is None:
            table = self._decoder.weights.embed
            self._prompt = table.new_empty(capacity, table.shape[1])
        return self._prompt

    def prefill(self, rows: int, length: int, tree: DraftTree, caches: Caches) -> Scored:
        """The pass over a `prompt` of `rows` rows, and the decision on `tree`, whose root is the
        row before row `length` and whose other nodes lie behind it.
        """
        height = MAX_ROWS if self.prefills.captures else len(tree)
        self._rounds.write([tree], [length - 1], height)
        x = self._prompt[:rows]
        run = self.prefills.get(
            (rows, height, caches[0][0].data_ptr()),
            lambda: _prefill(self._decoder, self._rounds, caches, x, height),
        )
        return self._rounds.launch(1, run)

    def _shape(self, requests: int, rows: int) -> tuple[int, int]:
        """(B, N) of the round that holds so many requests with so many rows each."""
        if not self.verifies.captures:
            return requests, rows
        batch = min(_power_of_two(requests), self._rounds.batch)
        blocks = _power_of_two(-(-batch * rows // MAX_ROWS))
        return batch, min(MAX_ROWS, blocks * MAX_ROWS // batch)


def _power_of_two(count: int) -> int:
    """The least one from `count` on."""
    return 1 << (count - 1).bit_length()


def _first(caches: Caches, batch: int) -> Caches:
    return [(k[:batch], v[:batch]) for k, v in caches]


def _verify(
    decoder: LlamaDecoder, rounds: RoundBuffers, caches: Caches, rows: int
) -> Callable[[], Scored]:
    batch = len(caches[0][0])

    def run() -> Scored:
        at = rounds.load(batch, rows)
        scored = decoder.score(decoder.step(at, caches), at)
        rounds.tail(at, scored.ids, scored.flags, caches)
        return scored

    return run


def _prefill(
    decoder: LlamaDecoder, rounds: RoundBuffers, caches: Caches, x: torch.Tensor, rows: int
) -> Callable[[], Scored]:
    behind = torch.arange(rows, dtype=torch.int32, device=x.device)

    def run() -> Scored:
        at = rounds.load(1, rows)
        # Rows past the tree's own are repeats of the last: nothing reads what they give.
        places = (at.cache_seqlens + behind).clamp_max(len(x) - 1)
        hidden = decoder.norm(decoder.prefill(x, caches).index_select(0, places))
        scored = decoder.score(hidden, at)
        rounds.tail(at, scored.ids, scored.flags, caches)
        return scored

    return run


def wants_graphs(graphs: bool | str, chosen: str, device_type: str) -> bool:
    """Whether a target captures; `chosen` is the implementation of its ops.

    Raises:
        ValueError: the value is unknown, or the ops would wait for the device while capturing.
    """
    if graphs not in (True, False, "auto"):
        raise ValueError(f'LlamaTarget: graphs is {graphs!r}, expected True, False or "auto"')
    fit = device_type == "cuda" and chosen == "triton"
    if graphs is True and device_type == "cuda" and not fit:
        raise ValueError(
            f"LlamaTarget: graphs=True needs Triton kernels on a GPU, the backend is {chosen!r}: "
            "it reads lengths on the host"
        )
    return fit if graphs == "auto" else bool(graphs)
