"""A text head as drafter: trees of what may follow the verified prefix."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np

from ..adapters.text_head import TextHead, TextHeadSteps
from .base import DraftTree, Request, check_growth

CHILDREN = 6  # continuations of one node that are considered
WAVE = 8  # nodes expanded in one batch: more cost little, and may be the wrong ones
FLOOR = 1e-4  # paths less likely than this are not worth a row


class TextHeadDrafter:
    """Grows trees nearly best first, some nodes at a time.

    Args:
        head: its vocabulary is the target's.
        name: how reports call it.
    """

    def __init__(self, head: TextHead, name: str = "text head") -> None:
        self.name = name
        self.vocab_size = head.config.vocab_size
        self._steps = TextHeadSteps(head)
        self.begin(Request())

    def begin(self, request: Request) -> None:
        """Forget the request before; the prompt is not read."""
        self._state, self._known = self._steps.start(), 0

    def propose(self, context: Sequence[int], rows: int) -> DraftTree:
        """A tree of at most `rows` nodes below ``context[-1]``.

        Raises:
            ValueError: `context` is empty or shrank.
        """
        check_growth(context, self._known)
        for token in context[self._known :]:
            self._state = self._steps.advance(self._state, [token])
        self._known = len(context)
        tree = DraftTree.root(context[-1])
        # (-score, parent, rank among its children, token, the parent's state)
        waiting: list[tuple[float, int, int, int, np.ndarray]] = []
        nodes, states = [0], self._state
        while nodes and len(tree) < rows + WAVE:
            self._expand(tree, nodes, states, waiting)
            chosen = [heapq.heappop(waiting) for _ in range(min(WAVE, len(waiting)))]
            nodes = [tree.add(parent, token, -score) for score, parent, _, token, _ in chosen]
            if nodes and len(tree) < rows + WAVE:
                before = np.stack([state for *_, state in chosen])
                states = self._steps.advance(before, [token for *_, token, _ in chosen])
        return tree.best(rows)

    def end(self, answer: Sequence[int]) -> None:
        """Nothing is learned."""
        self.begin(Request())

    def _expand(
        self, tree: DraftTree, nodes: Sequence[int], states: np.ndarray, waiting: list
    ) -> None:
        """Put the likeliest children of `nodes`, whose states are given, among those that wait."""
        tokens, chances = self._steps.likely(states, CHILDREN)
        found = zip(nodes, tokens.tolist(), chances.tolist(), states, strict=True)
        for node, ids, parts, state in found:
            for rank, (token, chance) in enumerate(zip(ids, parts, strict=True)):
                score = tree.scores[node] * chance
                if score < FLOOR:
                    break
                heapq.heappush(waiting, (-score, node, rank, token, state))
