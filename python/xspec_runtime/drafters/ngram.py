"""A drafter that remembers: past answers of the target, the prompt, and this answer so far."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from .base import MAX_ROWS, DraftTree, Request
from .memory import MemoryStatistics, NgramMemory
from .trie import Matches

__all__ = ["MemoryStatistics", "NgramDrafter", "NgramMemory"]

COPY_ORDER = 3  # tokens that must agree before text of this request is copied
COPY_LIMIT = 8  # agreement beyond this adds no trust
COPY_MISS = 0.7  # chance, per agreeing token from COPY_ORDER on, that the copy is still wrong
SIBLINGS = 12
NEGLIGIBLE = 1e-5  # paths less likely than this are not worth a row


class NgramDrafter:
    """Grows trees best first: the next node is always the likeliest path not yet in the tree.

    Args:
        memory: past answers; may be shared by several drafters, of which one learns.
        online: whether `end` adds the answer to the memory.
        name: how reports call it.
        chain: propose one path, greedily, instead of a tree.
        copy: also copy from the prompt and from this answer, which never enter the memory early.
    """

    def __init__(
        self,
        memory: NgramMemory,
        online: bool,
        name: str = "ngram",
        chain: bool = False,
        copy: bool = True,
    ) -> None:
        self.memory = memory
        self.online = online
        self.name = name
        self.chain = chain
        self.copy = copy
        self.begin(Request())

    def begin(self, request: Request) -> None:
        """Index the prompt for this request only."""
        self._text = _RequestText(request.prompt_ids if self.copy else [])
        self._restart()

    def propose(self, context: Sequence[int], rows: int) -> DraftTree:
        """A tree (or chain) of at most `rows` nodes below ``context[-1]``.

        Raises:
            ValueError: `context` is empty, or `rows` is not in 1..64.
        """
        if not context:
            raise ValueError("propose needs a context of at least one token")
        if not 1 <= rows <= MAX_ROWS:
            raise ValueError(f"rows must be from 1 to {MAX_ROWS}, got {rows}")
        self._follow(context)
        end = self.memory.usual_end()
        # The token that ends an answer comes free with the verify of those before it.
        depth = end - len(context) - 1 if end and len(context) < end else MAX_ROWS
        start = self._text.find() if self.copy else (-1, 0)
        return self._grow(context[-1], rows, depth, start)

    def end(self, answer: Sequence[int]) -> None:
        """Learn the answer, if online."""
        if self.online:
            self.memory.add(answer)
        self.begin(Request())

    def _restart(self) -> None:
        self._seen = 0
        self._version = self.memory.version
        self._matches = self.memory.match([])

    def _follow(self, context: Sequence[int]) -> None:
        """Bring the matches and the request's text up to `context`."""
        if len(context) < self._seen:
            raise ValueError(
                f"the context shrank from {self._seen} to {len(context)} tokens; call begin first"
            )
        if self._version != self.memory.version:
            self._version = self.memory.version
            self._matches = self.memory.match(context[: self._seen])
        for token in context[self._seen :]:
            self._matches = self.memory.advance(self._matches, token)
            if self.copy:
                self._text.append(token)
        self._seen = len(context)

    def _grow(self, root: int, rows: int, depth: int, start: tuple[int, int]) -> DraftTree:
        memory, text = self.memory, self._text
        tree = DraftTree.root(root)
        # (-probability, order of arrival, parent, token, depth, matches and copy of the parent)
        heap: list[tuple[float, int, int, int, int, Matches, tuple[int, int]]] = []
        arrivals, node, level, score = 0, 0, 0, 1.0
        matches, copied = self._matches, start
        while True:
            if level < depth and len(tree) < rows:
                for token, chance in self._children(matches, copied):
                    path = score * min(chance, 1.0)
                    if path > NEGLIGIBLE:
                        arrivals += 1
                        entry = (-path, arrivals, node, token, level, matches, copied)
                        heapq.heappush(heap, entry)
            if not heap or len(tree) >= rows:
                return tree
            negative, _, parent, token, level, matches, copied = heapq.heappop(heap)
            score, level = -negative, level + 1
            node = tree.add(parent, token, score)
            if len(tree) < rows:
                matches, copied = memory.advance(matches, token), text.advance(copied, token)

    def _children(self, matches: Matches, copied: tuple[int, int]) -> list[tuple[int, float]]:
        """Next tokens and their probabilities, likeliest first, ties by token."""
        position, agreed = copied
        left = 1.0
        if position >= 0:
            left = COPY_MISS ** (min(agreed, COPY_LIMIT) - COPY_ORDER + 1)
        found = self.memory.distribution(matches, left)
        if position >= 0:
            token = self._text.tokens[position]
            found[token] = found.get(token, 0.0) + 1.0 - left
        if self.chain:
            best = max(found.items(), key=_likelihood, default=None)
            return [best] if best else []
        if len(found) <= SIBLINGS:
            return sorted(found.items(), key=_likelihood, reverse=True)
        return heapq.nlargest(SIBLINGS, found.items(), key=_likelihood)


def _likelihood(item: tuple[int, float]) -> tuple[float, int]:
    return item[1], -item[0]


class _RequestText:
    """Prompt and answer of one request, searched for where their last tokens occurred before.

    A copy is (position of the next token, tokens that agree before it); position -1: none.
    """

    def __init__(self, prompt: Sequence[int]) -> None:
        self.tokens: list[int] = []
        self._latest: dict[tuple[int, ...], int] = {}
        self._previous = -1
        for token in prompt:
            self.append(token)

    def append(self, token: int) -> None:
        self.tokens.append(token)
        size = len(self.tokens)
        if size >= COPY_ORDER:
            key = tuple(self.tokens[-COPY_ORDER:])
            self._previous = self._latest.get(key, -1)
            self._latest[key] = size

    def find(self) -> tuple[int, int]:
        """The latest earlier place where the text agrees with its own end."""
        position, tokens = self._previous, self.tokens
        if position < 0:
            return -1, 0
        agreed = COPY_ORDER
        for offset in range(COPY_ORDER + 1, min(COPY_LIMIT, position) + 1):
            if tokens[position - offset] != tokens[-offset]:
                break
            agreed = offset
        return position, agreed

    def advance(self, copied: tuple[int, int], token: int) -> tuple[int, int]:
        """The copy after one more token; lost where it differs."""
        position, agreed = copied
        if 0 <= position < len(self.tokens) - 1 and self.tokens[position] == token:
            return position + 1, agreed + 1
        return -1, 0
