"""The simplest memory: how answers to the same question went on after the same beginning."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

from .base import DraftTree, Request


@dataclass(slots=True)
class _Node:
    """Answers that begin alike: how many, and what came next in them."""

    count: int = 0
    next: dict[int, _Node] = field(default_factory=dict)


class PrefixTable:
    """Past answers by question. It knows nothing of an answer that differs from all others in one
    early token: a baseline for memories that back off to shorter contexts.
    """

    def __init__(self) -> None:
        self._roots: dict[Hashable, _Node] = {}

    def learn(self, question: Hashable, answer: Sequence[int]) -> None:
        """Count one answer."""
        node = self._roots.setdefault(question, _Node())
        node.count += 1
        for token in answer:
            node = node.next.setdefault(token, _Node())
            node.count += 1

    def find(self, question: Hashable, prefix: Sequence[int]) -> _Node | None:
        """Answers to the question that begin with `prefix`; None if there are none."""
        node = self._roots.get(question)
        for token in prefix:
            if node is None:
                return None
            node = node.next.get(token)
        return node


def prompt_of(request: Request) -> Hashable:
    """The prompt's tokens, as the question of a request."""
    return tuple(request.prompt_ids)


class PrefixTableDrafter:
    """Proposes the likeliest continuations of the whole answer so far, best first.

    Args:
        table: past answers; may be shared.
        online: whether `end` adds the answer to the table.
        question: what of a request names its question, by default its prompt.
    """

    def __init__(
        self,
        table: PrefixTable,
        online: bool,
        name: str = "prefix table",
        question: Callable[[Request], Hashable] = prompt_of,
    ) -> None:
        self.table = table
        self.online = online
        self.name = name
        self._question_of = question
        self._question: Hashable = ()

    def begin(self, request: Request) -> None:
        """Take the request's question."""
        self._question = self._question_of(request)

    def propose(self, context: Sequence[int], rows: int) -> DraftTree:
        """A tree of at most `rows` nodes; a score is the share of the answers that began like
        `context` and took the path. The root alone where none did.
        """
        tree = DraftTree.root(context[-1])
        start = self.table.find(self._question, context)
        # (-score, order of arrival, parent, token, node)
        heap: list[tuple[float, int, int, int, _Node]] = []
        arrivals, parent, node = 0, 0, start
        while node is not None and len(tree) < rows:
            for token, child in sorted(node.next.items(), key=lambda n: (-n[1].count, n[0])):
                arrivals += 1
                heapq.heappush(heap, (-child.count / start.count, arrivals, parent, token, child))
            if not heap:
                break
            score, _, above, token, node = heapq.heappop(heap)
            parent = tree.add(above, token, -score)
        return tree

    def end(self, answer: Sequence[int]) -> None:
        """Learn the answer, if online and there is one."""
        if self.online and answer:
            self.table.learn(self._question, answer)
