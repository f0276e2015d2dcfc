"""Weighted counts of all n-grams of a set of answers: a suffix trie with compact singletons.

A context of n tokens is a path from the root. An n-gram that occurred once is stored as its
position alone, since the rest of it can be read in its answer; it becomes a node when it occurs
again. The matches of a context are kept for every order at once (`Matches`), so that appending a
token costs one dictionary look-up an order, whatever the size of the trie.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

OFFSET_BITS = 24  # a position is an answer's number above its offset
OFFSET_MASK = (1 << OFFSET_BITS) - 1
MAX_CHILDREN = 12  # continuations of one context that are ranked


class Node:
    """An n-gram that occurred at least twice, as a context.

    Attributes:
        count: weight of its occurrences.
        total: weight of those that a token follows.
        next: token -> node, or the position of the only occurrence; None at full length.
        top: heaviest continuations as (-weight, token), or None if they must be ranked again.
    """

    __slots__ = ("count", "next", "top", "total")

    def __init__(self, count: int, leaf: bool = False) -> None:
        self.count = count
        self.total = 0
        self.next: dict[int, Node | int] | None = None if leaf else {}
        self.top: list[tuple[int, int]] | None = None


class Matches(NamedTuple):
    """Where a context occurs: one entry an order, the longest first. Valid until the trie changes.

    Attributes:
        position: the only occurrence of the longest `singles` orders, or -1.
        singles: orders that occur once.
        nodes: the shorter orders, down to order 0.
    """

    position: int
    singles: int
    nodes: list[Node]


class SuffixTrie:
    """Answers by number, each with an integer weight.

    Args:
        order: longest context, in tokens. The start of an answer counts as one.
    """

    def __init__(self, order: int) -> None:
        self.order = order
        self.answers: dict[int, list[int]] = {}
        self.weights: dict[int, int] = {}
        self._root = Node(0)
        self._start = Node(0)

    def insert(self, number: int, answer: list[int], weight: int) -> None:
        """Count every n-gram of a new answer."""
        self.answers[number] = answer
        self.weights[number] = weight
        full = self.order
        contexts = [self._root, self._start]
        for position, token in enumerate(answer, number << OFFSET_BITS):
            longer = [self._root]
            for depth, node in enumerate(contexts):
                node.total += weight
                node.top = None
                child = node.next.get(token)
                if child is None:
                    node.next[token] = position
                    continue
                if type(child) is int:
                    child = node.next[token] = self._split(child, depth == full)
                child.count += weight
                if depth < full:
                    longer.append(child)
            contexts = longer

    def reweigh(self, number: int, weight: int) -> None:
        """Change an answer's weight; 0 takes it out as if it had never been inserted."""
        change = weight - self.weights[number]
        if not change:
            return
        full = self.order
        contexts = [self._root, self._start]
        for token in self.answers[number]:
            longer = [self._root]
            for depth, node in enumerate(contexts):
                node.total += change
                node.top = None
                child = node.next[token]
                if type(child) is int:
                    if not weight:
                        del node.next[token]
                    continue
                child.count += change
                if not child.count:
                    del node.next[token]
                elif depth < full:
                    longer.append(child)
            contexts = longer
        if weight:
            self.weights[number] = weight
        else:
            del self.answers[number], self.weights[number]

    def match(self, context: Sequence[int]) -> Matches:
        """Matches of an answer so far; an empty one is the start of an answer."""
        whole = len(context) < self.order
        matches = Matches(-1, 0, [self._start, self._root] if whole else [self._root])
        for token in context[-self.order :]:
            matches = self.advance(matches, token)
        return matches

    def advance(self, matches: Matches, token: int) -> Matches:
        """Matches of the context followed by `token`."""
        position, singles, nodes = matches
        if position >= 0 and self.after(position) == token:
            position += 1
        else:
            position, singles = -1, 0
        kept = []
        for node in nodes:
            child = node.next.get(token)
            if child is None:
                continue
            if type(child) is int:
                position = child
                singles += 1
            elif child.total:
                kept.append(child)
        if position >= 0 and self.after(position) is None:
            position, singles = -1, 0
        singles = min(singles, self.order - len(kept))
        kept.append(self._root)
        return Matches(position if singles > 0 else -1, singles, kept)

    def after(self, position: int) -> int | None:
        """The token that follows a position; None at the end of its answer."""
        answer = self.answers[position >> OFFSET_BITS]
        offset = (position & OFFSET_MASK) + 1
        return answer[offset] if offset < len(answer) else None

    def continuations(self, node: Node) -> list[tuple[int, int]]:
        """Tokens that follow a context and their weights."""
        weights = self.weights
        return [
            (token, weights[child >> OFFSET_BITS] if type(child) is int else child.count)
            for token, child in node.next.items()
        ]

    def rank(self, node: Node) -> list[tuple[int, int]]:
        """The heaviest continuations of a context as (-weight, token), kept until they change."""
        ranked = [(-weight, token) for token, weight in self.continuations(node)]
        if len(ranked) > MAX_CHILDREN:
            floor = sorted(weight for weight, _ in ranked)[MAX_CHILDREN - 1]
            ranked = [pair for pair in ranked if pair[0] <= floor]
        ranked.sort()
        node.top = ranked[:MAX_CHILDREN]
        return node.top

    def nodes(self) -> int:
        """Number of nodes; walks all of them."""
        count, waiting = 0, [self._root, self._start]
        while waiting:
            node = waiting.pop()
            count += 1
            waiting += [child for child in (node.next or {}).values() if type(child) is Node]
        return count

    def _split(self, position: int, leaf: bool) -> Node:
        """The node of an n-gram that has occurred once, at `position`."""
        weight = self.weights[position >> OFFSET_BITS]
        node = Node(weight, leaf)
        token = self.after(position)
        if not leaf and token is not None:
            node.total = weight
            node.next[token] = position + 1
        return node
