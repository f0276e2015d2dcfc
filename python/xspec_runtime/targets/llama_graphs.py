"""Rounds and prefills of `LlamaTarget` as one launch each.

A captured round has a fixed shape B x N; the rows of each tree are a number on the device. Kernels
work on row blocks of 64 and return at once where a row lies behind the tree, so one graph serves a
single request, N = 64: fewer rows would cost the same. In a batch, trees leave gaps, and those are
computed: N is what fills the row blocks that the tallest tree needs, and B and the blocks are
powers of two, which makes ten graphs for eight requests. Called plainly, without a graph, a round
has just the rows of the tallest tree.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch

from xspec_kernels import TailResult, ranges

from ..drafters.base import MAX_ROWS, DraftTree
from ..graphs import Fork, Graphs
from .llama_decoder import Caches, LlamaDecoder, Scored
from .llama_rounds import Round, RoundBuffers

# Prefill graphs kept, one a padded length.
PREFILL_GRAPHS = 8

Run = Callable[[], Scored]


class Follower(Protocol):
    """What drafts on the device behind every verify of a single request, in the same launch.

    It holds no reference to the target, whose graphs hold it.

    Attributes:
        drafts: int64 ``[G]``, what may follow the last token known; see `ON_DEVICE`.
    """

    drafts: torch.Tensor

    def follow(self, at: Round, accepted: TailResult, root: torch.Tensor) -> None:
        """Write `drafts`; only launches.

        Args:
            at: the round, its `cache_seqlens` advanced.
            accepted: what its tail accepted.
            root: int64 ``[1]``, the last token emitted.
        """


class LlamaGraphs:
    """Launches over one decoder and its `rounds`; the decision is then there to be read.

    Attributes:
        profile: a verify is three launches, each in a range of its own, as ranges inside a graph do
            not show on replay. Same bits. The environment variable XSPEC_PROFILE=1 sets it at
            first; it may change between requests.
        follower: drafts behind every verify of one request; it may change between requests.
        followed: the last launch was such a verify, so the follower's drafts are of this moment.
    """

    def __init__(self, decoder: LlamaDecoder, rounds: RoundBuffers) -> None:
        self.profile = os.environ.get("XSPEC_PROFILE") == "1"
        self.follower: Follower | None = None
        self.followed = False
        self._phased: dict[tuple, Run] = {}
        self._decoder, self._rounds = decoder, rounds
        self.verifies = Graphs(rounds.device)
        self.prefills = Graphs(rounds.device, PREFILL_GRAPHS, beside=self.verifies)
        self._prompt: torch.Tensor | None = None
        self._pair: PrefillPair | None = None

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
        follower = self.follower if batch == 1 else None
        self.followed = follower is not None
        caches = _first(caches, batch)
        key = (batch, rows, caches[0][0].data_ptr(), id(follower))
        if self.profile:
            if key not in self._phased:
                parts = _parts(self._decoder, self._rounds, caches, rows, follower)
                self._phased[key] = _phases(self.verifies, key, parts)
            return self._rounds.launch(batch, self._phased[key])
        run = self.verifies.get(
            key, lambda: _verify(self._decoder, self._rounds, caches, rows, follower)
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
        self.followed = False
        height = MAX_ROWS if self.prefills.captures else len(tree)
        self._rounds.write([tree], [length - 1], height)
        x = self._prompt[:rows]
        key = (rows, height, caches[0][0].data_ptr())

        def make() -> Run:
            return _prefill(self._decoder, self._rounds, caches, x, height)

        if self._pair:
            return self._pair.launch(self._rounds, key, make)
        return self._rounds.launch(1, self.prefills.get(key, make))

    def _shape(self, requests: int, rows: int) -> tuple[int, int]:
        """(B, N) of the round that holds so many requests with so many rows each."""
        if not self.verifies.captures:
            return requests, rows
        batch = min(_power_of_two(requests), self._rounds.batch)
        blocks = _power_of_two(-(-batch * rows // MAX_ROWS))
        return batch, min(MAX_ROWS, blocks * MAX_ROWS // batch)


class PrefillPair:
    """Prefills of a target and of a draft as one launch of a graph with two branches.

    The target's prefill is held back until the draft asks for its own; then both run, and each
    publishes to its own record.

    Args:
        target, draft: of different decoders on one device, both with graphs.

    Raises:
        ValueError: they are the same, or lie on two devices.
    """

    def __init__(self, target: LlamaGraphs, draft: LlamaGraphs) -> None:
        device = target.verifies.device
        if target is draft or device != draft.verifies.device:
            raise ValueError(
                "a pair of prefills needs two targets on one device, got "
                f"{'one' if target is draft else f'{device} and {draft.verifies.device}'}"
            )
        self._target, self._draft = target, draft
        # All are kept: dropping one would clear the workspace of the stream that they all fork to.
        # They share a pool, so one more costs its nodes and no memory for activations.
        self._graphs = Graphs(device)
        self._fork = Fork(device)
        self._begin: Callable[[], object] | None = None
        self._held: tuple[RoundBuffers, tuple, Callable[[], Run]] | None = None
        self._scored: Scored | None = None

    @contextmanager
    def beside(self, begin: Callable[[], object]) -> Iterator[None]:
        """While this lasts, the target's next prefill takes along the one that `begin` runs on the
        draft. A prefill that is no graph leaves `begin` uncalled.
        """
        self._begin = begin
        self._target._pair = self
        try:
            yield
        finally:
            self._target._pair = self._draft._pair = None
            self._begin = self._held = self._scored = None

    def launch(self, rounds: RoundBuffers, key: tuple, make: Callable[[], Run]) -> Scored:
        """A prefill of either: the target's waits for the draft's, whose call launches both.

        Raises:
            RuntimeError: `begin` ran no prefill on the draft.
        """
        if self._held:
            return self._both(rounds, key, make)
        begin, self._begin = self._begin, None
        self._held = rounds, key, make
        self._target._pair, self._draft._pair = None, self
        try:
            begin()
        finally:
            self._draft._pair = self._held = None
        if self._scored is None:
            raise RuntimeError("the draft began without a prefill on its graphs")
        return self._scored

    def _both(self, rounds: RoundBuffers, key: tuple, make: Callable[[], Run]) -> Scored:
        first, first_key, first_make = self._held
        self._draft._pair = self._held = None
        fork = self._fork

        def make_both() -> Callable[[], tuple[Scored, Scored]]:
            main, side = first_make(), make()
            return lambda: fork(main, side)

        run = self._graphs.get((first_key, key), make_both)
        self._scored, beside = first.launch(1, lambda: rounds.launch(1, run))
        return beside


def _power_of_two(count: int) -> int:
    """The least one from `count` on."""
    return 1 << (count - 1).bit_length()


def _first(caches: Caches, batch: int) -> Caches:
    return [(k[:batch], v[:batch]) for k, v in caches]


def _verify(
    decoder: LlamaDecoder,
    rounds: RoundBuffers,
    caches: Caches,
    rows: int,
    follower: Follower | None,
) -> Callable[[], Scored]:
    layers, head, tail = _parts(decoder, rounds, caches, rows, follower)
    return lambda: tail(*head(*layers()))


def _parts(
    decoder: LlamaDecoder,
    rounds: RoundBuffers,
    caches: Caches,
    rows: int,
    follower: Follower | None,
) -> tuple[Callable, Callable, Callable]:
    """A verify in three: each takes what the one before returns."""
    batch = len(caches[0][0])
    drafts = follower.drafts if follower else None

    def layers() -> tuple[torch.Tensor, Round]:
        at = rounds.load(batch, rows, drafts)
        return decoder.step(at, caches), at

    def head(hidden: torch.Tensor, at: Round) -> tuple[Scored, Round]:
        return decoder.score(hidden, at), at

    def tail(scored: Scored, at: Round) -> Scored:
        accepted = rounds.tail(at, scored.ids, scored.flags, caches)
        if follower:
            follower.follow(at, accepted, rounds.root[:1])
        return scored

    return layers, head, tail


def _phases(graphs: Graphs, key: tuple, parts: tuple[Callable, Callable, Callable]) -> Run:
    """`parts` as a launch each, in ranges."""
    layers, head, tail = parts
    held: dict[str, tuple] = {}
    first = graphs.get((*key, "layers"), lambda: layers)
    second = graphs.get((*key, "head"), lambda: lambda: head(*held["layers"]))
    third = graphs.get((*key, "tail"), lambda: lambda: tail(*held["head"]))
    rows, captured = key[0] * key[1], not graphs.captures

    def run() -> Scored:
        nonlocal captured
        for name, part in (("layers", first), ("head", second)):
            with ranges.range_(f"verify.{name}", rows):
                held[name] = part()
                if not captured:
                    # A first call returns other memory than replays fill, which the next part is
                    # to read; what these two do may be done twice.
                    held[name] = part()
        with ranges.range_("verify.tail", rows):
            scored = third()
        captured = True
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
