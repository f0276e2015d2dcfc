"""A drafter that remembers: past answers of the target, the prompt, and this answer so far."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from .base import MAX_ROWS, DraftTree, Request
from .memory import MemoryStatistics, NgramMemory
from .trie import Matches

__all__ = ["MemoryStatistics", "NgramDrafter", "NgramMemory"]

# Chance that text of this request goes on like an earlier place whose last 1, 2, ... tokens agree;
# what a request shows is weighed in, as if these had been seen in COPY_PRIOR cases.
COPY_TRUST = (0.3, 0.45, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9)
COPY_PRIOR = 16.0
COPY_SECOND = 0.5  # the same of a place that agrees less than another one, as a part of it
COPY_FIRST = 6  # agreeing tokens from which on a place is heard before the memory
COPIES = 4  # different continuations that are considered
COPY_ANCHOR = 3  # of so many tokens the places are indexed, beside those of the last token alone
COPY_PLACES = 16  # latest places looked at in either index
SIBLINGS = 12
OPENING = 0.5  # an answer's beginning is proposed while the next token is at least as likely
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
        return self._grow(context[-1], rows, depth)

    def opening(self, rows: int) -> list[int]:
        """At most `rows` tokens that answers usually begin with, while the next one is likelier
        than not.
        """
        matches, tokens = self.memory.match([]), []
        while len(tokens) < rows:
            found = self.memory.distribution(matches)
            best = max(found.items(), key=_likelihood, default=(0, 0.0))
            if best[1] < OPENING:
                break
            tokens.append(best[0])
            matches = self.memory.advance(matches, best[0])
        return tokens

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
                self._text.learn(token)
        self._seen = len(context)

    def _grow(self, root: int, rows: int, depth: int) -> DraftTree:
        tree = DraftTree.root(root)
        # (-probability, order of arrival, parent, token, depth, matches and tail of the parent)
        heap: list[tuple[float, int, int, int, int, Matches, list[int]]] = []
        arrivals, node, level, score = 0, 0, 0, 1.0
        matches, tail = self._matches, self._text.tail() if self.copy else []
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
                matches = self.memory.advance(matches, token)
                if self.copy:
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
        found = self.memory.distribution(matches, left)
        left -= sum(found.values())
        for token, chance in early.items():
            found[token] = found.get(token, 0.0) + chance
        for token, trust, agreed in copies:
            if agreed < COPY_FIRST:
                found[token] = found.get(token, 0.0) + left * trust
                left -= left * trust
        if self.chain:
            best = max(found.items(), key=_likelihood, default=None)
            return [best] if best else []
        if len(found) <= SIBLINGS:
            return sorted(found.items(), key=_likelihood, reverse=True)
        return heapq.nlargest(SIBLINGS, found.items(), key=_likelihood)


def _likelihood(item: tuple[int, float]) -> tuple[float, int]:
    return item[1], -item[0]


class _RequestText:
    """Prompt and answer of one request, searched for places like its end, and how often going on
    as such a place did was right.
    """

    def __init__(self, prompt: Sequence[int]) -> None:
        self._tokens: list[int] = []
        self._places: dict[int | tuple[int, ...], list[int]] = {}
        # By first or second choice and agreeing tokens: [times right, times tried].
        self._tally = [
            [[COPY_PRIOR * trust * part, COPY_PRIOR] for trust in COPY_TRUST]
            for part in (1.0, COPY_SECOND)
        ]
        for token in prompt:
            self._append(token)

    def learn(self, token: int) -> None:
        """Append a token of the answer; what `tail` made expect is judged by it."""
        for i, (guess, agreed) in enumerate(self._candidates(self.tail())):
            tally = self._tally[i > 0][agreed - 1]
            tally[0] += guess == token
            tally[1] += 1
        self._append(token)

    def tail(self) -> list[int]:
        """The last tokens, as many as can matter."""
        return self._tokens[-len(COPY_TRUST) :]

    def copies(self, tail: list[int]) -> list[tuple[int, float, int]]:
        """Tokens that followed `tail` before, the trust in each and how many tokens agreed, the
        most trusted first.
        """
        found = []
        for i, (token, agreed) in enumerate(self._candidates(tail)):
            right, tried = self._tally[i > 0][agreed - 1]
            found.append((token, right / tried, agreed))
        return sorted(found, key=lambda copy: (-copy[1], copy[0]))

    def _append(self, token: int) -> None:
        tokens, places = self._tokens, self._places
        tokens.append(token)
        places.setdefault(token, []).append(len(tokens))
        if len(tokens) >= COPY_ANCHOR:
            places.setdefault(tuple(tokens[-COPY_ANCHOR:]), []).append(len(tokens))

    def _candidates(self, tail: list[int]) -> list[tuple[int, int]]:
        """Different tokens that followed places like `tail` and how many tokens agree there, the
        longest agreement first, the latest of equals.
        """
        if not tail:
            return []
        tokens, best = self._tokens, {}
        for key in (tuple(tail[-COPY_ANCHOR:]), tail[-1]):
            for place in reversed(self._places.get(key, ())[-COPY_PLACES:]):
                if place == len(tokens):
                    continue
                agreed, most = 1, min(len(tail), place)
                while agreed < most and tokens[place - 1 - agreed] == tail[-1 - agreed]:
                    agreed += 1
                if agreed > best.get(tokens[place], 0):
                    best[tokens[place]] = agreed
        # Stable: of equals the one found first, which is the latest, stays first.
        return sorted(best.items(), key=lambda item: -item[1])[:COPIES]
