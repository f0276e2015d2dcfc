"""One request on Python counts: its text so far, and the trees proposed for what follows.

The reference of the native module's `NgramRequest`: the same trees, and scores of the same bits.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from .base import MAX_ROWS, DraftTree
from .counts import NgramCounts, likelihood
from .request_text import COPY_TRUST, RequestText
from .trie import Matches

COPY_FIRST = 6  # agreeing tokens from which on a place is heard before the memory
SIBLINGS = 12
NEGLIGIBLE = 1e-5  # paths less likely than this are not worth a row


class NgramRequest:
    """Grows trees best first: the next node is always the likeliest path not yet in the tree, of
    equal ones the one that came first; children come likeliest first, ties by token.

    Args:
        counts: what past answers taught; many requests may share it.
        chain: propose one path, greedily, instead of a tree.
        copy: also copy from the prompt and from this answer.
    """

    def __init__(self, counts: NgramCounts, chain: bool, copy: bool) -> None:
        self._counts, self._chain, self._copy = counts, chain, copy
        self.begin([])

    def begin(self, prompt: Sequence[int]) -> None:
        """Forget the request before, index the prompt of this one."""
        self._text = RequestText(prompt if self._copy else [])
        self._answer: list[int] = []
        self._version = -1

    def propose(self, fresh: Sequence[int], rows: int) -> tuple[list[int], list[int], list[float]]:
        """Tokens, parents and scores of at most `rows` nodes; the root is the last of the fresh
        tokens, those of the answer since the call before.
        """
        with self._counts.lock:
            self._follow(fresh)
            end, known = self._counts.current_end(), len(self._answer)
            # The token that ends an answer comes free with the verify of those before it.
            tree = self._grow(rows, end - known - 1 if end and known < end else MAX_ROWS)
        return tree.tokens, tree.parent_idx, tree.scores

    def _follow(self, fresh: Sequence[int]) -> None:
        if self._version != self._counts.current_version:
            self._version = self._counts.current_version
            self._matches = self._counts.match(self._answer)
        for token in fresh:
            self._matches = self._counts.advance(self._matches, token)
            if self._copy:
                self._text.learn(token)
            self._answer.append(token)

    def _grow(self, rows: int, depth: int) -> DraftTree:
        tree = DraftTree.root(self._answer[-1])
        # (-probability, order of arrival, parent, token, depth, matches and tail of the parent)
        heap: list[tuple[float, int, int, int, int, Matches, list[int]]] = []
        arrivals, node, level, score = 0, 0, 0, 1.0
        matches, tail = self._matches, self._text.tail() if self._copy else []
        while True:
            if level < depth and len(tree) < rows:
                for token, chance in self._children(matches, tail):
                    path = score * min(chance, 1.0)
                    if path > NEGLIGIBLE:
                        arrivals += 1
                        entry = (-path, arrivals, node, token, level, matches, tail)
                        heapq.heappush(heap, entry)
            if not heap or len(tree) >= rows:
                return tree
            negative, _, parent, token, level, matches, tail = heapq.heappop(heap)
            score, level = -negative, level + 1
            node = tree.add(parent, token, score)
            if len(tree) < rows:
                matches = self._counts.advance(matches, token)
                if self._copy:
                    tail = [*tail[1 - len(COPY_TRUST) :], token]

    def _children(self, matches: Matches, tail: list[int]) -> list[tuple[int, float]]:
        """Next tokens and their probabilities, likeliest first, ties by token."""
        copies = self._text.copies(tail)
        early: dict[int, float] = {}
        left = 1.0
        for token, trust, agreed in copies:
            if agreed >= COPY_FIRST:
                early[token] = left * trust
                left -= early[token]
        found = self._counts.distribution(matches, left)
        known = 0.0
        for chance in found.values():  # sum() rounds differently from Python 3.12 on
            known += chance
        left -= known
        for token, chance in early.items():
            found[token] = found.get(token, 0.0) + chance
        for token, trust, agreed in copies:
            if agreed < COPY_FIRST:
                found[token] = found.get(token, 0.0) + left * trust
                left -= left * trust
        if self._chain:
            best = max(found.items(), key=likelihood, default=None)
            return [best] if best else []
        if len(found) <= SIBLINGS:
            return sorted(found.items(), key=likelihood, reverse=True)
        return heapq.nlargest(SIBLINGS, found.items(), key=likelihood)
