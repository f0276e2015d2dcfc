"""The drafters a replay compares, and how each is made from training answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .data.pairs import Pair
from .drafters.base import Drafter, DraftTree, Request
from .drafters.ngram import NgramDrafter, NgramMemory

RECORDED_DRAFT = "recorded_draft"  # key of `Request.draft_inputs`
MEMORY_IS_CHAIN = {"memory chain": True, "memory tree": False}


class PositionDrafter:
    """Proposes the tokens of one string at the positions that come next, whatever came before.

    Args:
        name: how reports call it.
        tokens: the string; without one, the draft recorded with each request.
    """

    def __init__(self, name: str, tokens: Sequence[int] | None = None) -> None:
        self.name = name
        self._fixed = tokens
        self._tokens: Sequence[int] = tokens or ()

    def begin(self, request: Request) -> None:
        """Take the request's recorded draft."""
        if self._fixed is None:
            self._tokens = request.draft_inputs[RECORDED_DRAFT]

    def propose(self, context: Sequence[int], rows: int) -> DraftTree:
        """A chain of the string's tokens after position ``len(context) - 1``."""
        known = len(context)
        return DraftTree.chain(context[-1], self._tokens[known : known + rows - 1])

    def end(self, answer: Sequence[int]) -> None:
        """Nothing to learn."""


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
    memories: dict[int, NgramMemory] = {}

    def memory(fold: int, train: Sequence[Pair], online: bool) -> NgramMemory:
        if not online and fold in memories:
            return memories[fold]
        made = NgramMemory()
        made.extend(pair.target for pair in train)
        return made if online else memories.setdefault(fold, made)

    def remembering(name: str, chain: bool, online: bool) -> Callable[..., Drafter]:
        return lambda fold, train: NgramDrafter(memory(fold, train, online), online, name, chain)

    arms = [
        Arm("raw draft", gamma + 1, False, lambda fold, train: PositionDrafter("raw draft")),
        Arm("constant string", gamma + 1, False, _constant),
    ]
    for name, chain in MEMORY_IS_CHAIN.items():
        for online in (False, True):
            make = remembering(name, chain, online)
            arms += [Arm(name, count, online, make) for count in rows]
    return arms


def _constant(fold: int, train: Sequence[Pair]) -> Drafter:
    """The commonest token of every position; the lowest of equally common ones."""
    longest = max(len(pair.target) for pair in train)
    columns = [
        Counter(pair.target[i] for pair in train if i < len(pair.target)) for i in range(longest)
    ]
    tokens = [min(c, key=lambda token, c=c: (-c[token], token)) for c in columns]
    return PositionDrafter("constant string", tokens)
