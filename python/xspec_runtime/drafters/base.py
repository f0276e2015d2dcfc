"""What a drafter is: it sees the tokens the target has committed and proposes a tree to verify."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch

MAX_ROWS = 64  # one int64 of ancestor bits per row
# A token that the device knows and the host does not: `ON_DEVICE` - j is draft j of a `Follower`.
ON_DEVICE = -2


@dataclass(slots=True)
class DraftTree:
    """Nodes to verify. Node 0 is the root; a parent precedes its children.

    Attributes:
        tokens: token id of each node; ``tokens[0]`` is the last committed token.
        parent_idx: parent of each node; ``parent_idx[0] == -1``.
        scores: estimated probability that the whole path to the node is accepted;
            never above the parent's, ``scores[0] == 1.0``.
    """

    tokens: list[int]
    parent_idx: list[int]
    scores: list[float]

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def root(cls, token: int) -> DraftTree:
        """A tree of one row: verifying it is a plain decoding step."""
        return cls([token], [-1], [1.0])

    @classmethod
    def chain(
        cls, root: int, tokens: Sequence[int], scores: Sequence[float] | None = None
    ) -> DraftTree:
        """The root followed by `tokens`, each the child of the one before."""
        path = [1.0] * len(tokens) if scores is None else list(scores)
        return cls([root, *tokens], list(range(-1, len(tokens))), [1.0, *path])

    def add(self, parent: int, token: int, score: float) -> int:
        """Append a node below `parent`; returns its index."""
        self.tokens.append(token)
        self.parent_idx.append(parent)
        self.scores.append(score)
        return len(self.tokens) - 1

    def child(self, parent: int, token: int) -> int | None:
        """The node below `parent` with this token."""
        for i in range(parent + 1, len(self.tokens)):
            if self.parent_idx[i] == parent and self.tokens[i] == token:
                return i
        return None

    def best(self, rows: int) -> DraftTree:
        """The `rows` nodes of highest score; a parent never scores below its child, so paths stay
        whole.
        """
        if len(self) <= rows:
            return self
        ranked = sorted(range(1, len(self)), key=lambda i: (-self.scores[i], i))
        return self._only([0, *sorted(ranked[: rows - 1])])

    def within(self, depth: int) -> DraftTree:
        """The nodes at most `depth` below the root."""
        if len(self) <= depth + 1:
            return self
        depths = [0]
        for parent in self.parent_idx[1:]:
            depths.append(depths[parent] + 1)
        return self._only([node for node, deep in enumerate(depths) if deep <= depth])

    def accept(self, targets: Sequence[int]) -> list[int]:
        """Greedy accepted path, root excluded, given the target's token after each node."""
        path: list[int] = []
        node: int | None = 0
        while (node := self.child(node, targets[node])) is not None:
            path.append(node)
        return path

    def _only(self, kept: Sequence[int]) -> DraftTree:
        """These nodes, in order, their parents among them."""
        place = {-1: -1} | {node: i for i, node in enumerate(kept)}
        return DraftTree(
            [self.tokens[i] for i in kept],
            [place[self.parent_idx[i]] for i in kept],
            [self.scores[i] for i in kept],
        )


@dataclass(slots=True)
class Request:
    """What a drafter may know of a request before the first token.

    Attributes:
        prompt_ids: prompt tokens without media placeholders.
        draft_inputs: keyword tensors for a draft model's prefill (token ids, event images).
        target_inputs: the target's own, for drafters that read what it reads.
    """

    prompt_ids: list[int] = field(default_factory=list)
    draft_inputs: Mapping[str, Any] = field(default_factory=dict)
    target_inputs: Mapping[str, Any] = field(default_factory=dict)

    def inputs_on(self, device: torch.device) -> dict[str, Any]:
        """`draft_inputs` with their tensors on the draft's device, wherever they were."""
        return {
            name: value.to(device) if isinstance(value, torch.Tensor) else value
            for name, value in self.draft_inputs.items()
        }


@runtime_checkable
class Drafter(Protocol):
    """Proposes trees. It never sees a token the target has not committed (DESIGN: no future)."""

    name: str

    def begin(self, request: Request) -> None:
        """A request starts; nothing of its answer is known."""

    def propose(self, context: Sequence[int], rows: int) -> DraftTree:
        """A tree of at most `rows` nodes whose root is ``context[-1]``.

        `context` is the answer so far (at least one token); calls of one request only extend it.
        """

    def end(self, answer: Sequence[int]) -> None:
        """The request is over; `answer` is everything the target emitted.

        It is empty where the request was cancelled or failed, at whatever point, perhaps before
        `begin`: then nothing is learned of it.
        """


@runtime_checkable
class OpeningDrafter(Protocol):
    """A drafter that can say how the answer may begin before the target has said anything."""

    def opening(self, rows: int) -> list[int]:
        """At most `rows` tokens of the answer, from its first on; called between `begin` and the
        first `propose`.
        """


@runtime_checkable
class PricingDrafter(Protocol):
    """A drafter that decides what is worth verifying, of drafts that others made too."""

    def admit(self, drafted: Sequence[int]) -> list[int]:
        """Of drafts that exist before the prefill, the first ones that shall ride in it."""

    def propose(
        self, context: Sequence[int], rows: int, seed: DraftTree | None = None
    ) -> DraftTree:
        """A tree of at most `rows` nodes, from drafts of its own and from `seed`."""


def check_growth(context: Sequence[int], known: int) -> None:
    """Raise `ValueError` unless `context` holds a token and the `known` ones of the call before."""
    if len(context) < max(1, known):
        raise ValueError(
            f"propose needs a context of at least {max(1, known)} tokens, got {len(context)}; "
            "call begin first"
        )
