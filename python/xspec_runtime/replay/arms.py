"""The drafters a replay compares, by name, and how each is made from training answers.

A new source of drafts joins with one line in `SOURCES`; `bench/replay.py` shows the first four,
`xspec evaluate` all of them and what they give together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ..data.pairs import Pair
from ..drafters.base import MAX_ROWS, Drafter
from ..drafters.memory_file import MemorySettings
from ..drafters.merge import MergedDrafter
from ..drafters.ngram import NgramDrafter, NgramMemory
from ..drafters.prefix_table import PrefixTable, PrefixTableDrafter
from .drafters import (
    RECORDED_DRAFT,
    PositionDrafter,
    WideMemoryDrafter,
    recorded_question,
    request_of,
)
from .suffix import SuffixDecodingDrafter, suffix_decoding_missing
from .text import draft_text, text_head

__all__ = [
    "RECORDED_DRAFT",
    "SOURCES",
    "Arm",
    "PositionDrafter",
    "Source",
    "Training",
    "Variant",
    "combined",
    "replay_arms",
]

if TYPE_CHECKING:
    from ..workloads import MiniPair

T = TypeVar("T")
ANY_ROWS = 4096  # of replays: more than any tree that can be verified


@dataclass(slots=True)
class Training:
    """What the drafters of one fold may learn from.

    Attributes:
        fold: its number.
        pairs: other folds' pairs.
        folder: where networks trained on this fold may be kept between runs; None: nowhere.
        models: the embedded pair, for sources that run its models; None in a replay.
    """

    fold: int
    pairs: Sequence[Pair]
    folder: Path | None = None
    models: MiniPair | None = None
    _shared: dict[str, object] = field(default_factory=dict)

    def shared(self, key: str, make: Callable[[], T]) -> T:
        """What `make` returns, made once a fold: for trained networks and static memories."""
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]


@dataclass(frozen=True, slots=True)
class Variant:
    """How a source is run.

    Attributes:
        rows: of a verify, root included.
        gamma: draft tokens of sources that propose a chain.
        online: learn each answer once it is over.
        hide_draft: the draft's text is not in the request (nor its events); what is then accepted
            owes nothing to the draft.
    """

    rows: int
    gamma: int
    online: bool = False
    hide_draft: bool = False


@dataclass(frozen=True, slots=True)
class Source:
    """Something that proposes tokens.

    Attributes:
        make: a fresh drafter for one fold.
        baseline: shown beside every drafter and no part of the combination.
        learns: run static and online.
        reads_draft: run with the draft's text and with it hidden.
        chain: proposes `Variant.gamma` tokens, whatever the rows.
        most_rows: its tallest proposal; above 64 rows there is nothing that could verify it.
        live: runs models of the embedded pair; left out of replays of a file.
        recorded: reads drafts that were recorded; left out of live runs.
        missing: why it cannot run here, or "".
    """

    make: Callable[[Training, Variant], Drafter]
    baseline: bool = False
    learns: bool = False
    reads_draft: bool = False
    chain: bool = False
    most_rows: int = MAX_ROWS
    live: bool = False
    recorded: bool = False
    missing: Callable[[], str] = str


def _constant(training: Training, variant: Variant) -> Drafter:
    """The commonest token of every position; the lowest of equally common ones."""
    longest = max(len(pair.target) for pair in training.pairs)
    columns = [
        Counter(pair.target[i] for pair in training.pairs if i < len(pair.target))
        for i in range(longest)
    ]
    tokens = [min(c, key=lambda token, c=c: (-c[token], token)) for c in columns]
    return PositionDrafter("constant string", tokens)


def _memory(chain: bool) -> Callable[[Training, Variant], Drafter]:
    def make(training: Training, variant: Variant) -> Drafter:
        wide = variant.rows > MAX_ROWS

        def filled() -> NgramMemory:
            # Neighboring clips are alike, scenes are not; and a memory that does not learn knows no
            # neighbors: elsewhere the latest is worth no more.
            streams = variant.online and training.models is None
            recency = MemorySettings.recency if streams else 0
            memory = NgramMemory(recency=recency, backend="python" if wide else "auto")
            memory.extend(pair.target for pair in training.pairs)
            return memory

        key = "wide memory" if wide else "memory"
        memory = filled() if variant.online else training.shared(key, filled)
        kind = WideMemoryDrafter if wide else NgramDrafter
        return kind(memory, variant.online, "memory chain" if chain else "memory tree", chain)

    return make


def _prefix_table(training: Training, variant: Variant) -> Drafter:
    table = PrefixTable()
    for pair in training.pairs:
        table.learn(recorded_question(request_of(pair)), pair.target)
    return PrefixTableDrafter(table, variant.online, question=recorded_question)


def _suffix_decoding(training: Training, variant: Variant) -> Drafter:
    drafter = SuffixDecodingDrafter(variant.online)
    drafter.learn(pair.target for pair in training.pairs)
    return drafter


def _draft_model(training: Training, variant: Variant) -> Drafter:
    from ..drafters.draft_model import ModelDrafter

    return ModelDrafter(training.models.draft_model, variant.gamma, name="draft model")


def _shipped(name: str) -> Callable[[Training, Variant], Drafter]:
    """An adapter of the embedded pair, on the text of its draft model."""

    def make(training: Training, variant: Variant) -> Drafter:
        from ..adapters.mini.pair import HIDDEN, adapter_drafter
        from ..models import mini

        if variant.hide_draft:
            return adapter_drafter(name + HIDDEN, variant.gamma)
        raw = training.shared("raw draft", lambda: mini.load("draft_raw"))
        return adapter_drafter(name, variant.gamma, raw)

    return make


SOURCES: dict[str, Source] = {
    "raw draft": Source(
        lambda training, variant: PositionDrafter("raw draft"),
        baseline=True, reads_draft=True, chain=True, recorded=True,
    ),
    "constant string": Source(_constant, baseline=True, chain=True),
    "memory chain": Source(_memory(chain=True), baseline=True, learns=True),
    "memory tree": Source(_memory(chain=False), learns=True, most_rows=ANY_ROWS),
    "prefix table": Source(_prefix_table, baseline=True, learns=True, most_rows=ANY_ROWS),
    "SuffixDecoding": Source(
        _suffix_decoding, baseline=True, learns=True, missing=suffix_decoding_missing
    ),
    "draft text": Source(draft_text, reads_draft=True),
    "text head": Source(text_head),
    "draft model": Source(_draft_model, reads_draft=True, chain=True, live=True),
    "position adapter": Source(
        _shipped("adapter"), baseline=True, reads_draft=True, chain=True, live=True
    ),
    "prefix adapter": Source(
        _shipped("adapter_prefix"), reads_draft=True, chain=True, live=True
    ),
}  # fmt: skip
REPLAYED = ("raw draft", "constant string", "memory chain", "memory tree")


def combined(drafters: Mapping[str, Drafter]) -> Drafter:
    """One drafter of several sources, by name in the order of `SOURCES`."""
    if len(drafters) == 1:
        return next(iter(drafters.values()))
    return MergedDrafter(list(drafters.values()), "combined", weigh=True)


@dataclass(slots=True)
class Arm:
    """A drafter at a number of rows; `make` builds it for one fold from its training pairs."""

    drafter: str
    rows: int
    online: bool
    make: Callable[[int, Sequence[Pair]], Drafter]


def replay_arms(gamma: int, rows: Sequence[int]) -> list[Arm]:
    """Raw draft and constant string at `gamma`; memory chains and trees, also online, at `rows`.

    Static memories of one fold are shared.
    """
    folds: dict[int, Training] = {}

    def maker(source: Source, variant: Variant) -> Callable[[int, Sequence[Pair]], Drafter]:
        return lambda fold, pairs: source.make(
            folds.setdefault(fold, Training(fold, pairs)), variant
        )

    arms = []
    for name in REPLAYED:
        source = SOURCES[name]
        for online in (False, True) if source.learns else (False,):
            for count in (gamma + 1,) if source.chain else rows:
                make = maker(source, Variant(count, gamma, online))
                arms.append(Arm(name, count, online, make))
    return arms
