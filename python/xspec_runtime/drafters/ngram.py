"""A drafter that remembers: past answers of the target, the prompt, and this answer so far."""

from __future__ import annotations

from collections.abc import Sequence

from .base import MAX_ROWS, DraftTree, Request
from .memory import MemoryStatistics, NgramMemory

__all__ = ["MemoryStatistics", "NgramDrafter", "NgramMemory"]

OPENING = 0.5  # an answer's beginning is proposed while the next token is at least as likely


class NgramDrafter:
    """Grows trees best first: the next node is always the likeliest path not yet in the tree.

    Args:
        memory: past answers; may be shared by several drafters, of which one learns, also by
            drafters of other threads.
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
        self._request = memory.request(chain, copy)
        self._seen = 0

    def begin(self, request: Request) -> None:
        """Index the prompt for this request only."""
        self._request.begin(request.prompt_ids)
        self._seen = 0

    def propose(self, context: Sequence[int], rows: int) -> DraftTree:
        """A tree (or chain) of at most `rows` nodes below ``context[-1]``.

        Raises:
            ValueError: `context` is empty or shrank, or `rows` is not in 1..64.
        """
        if not context:
            raise ValueError("propose needs a context of at least one token")
        if not 1 <= rows <= MAX_ROWS:
            raise ValueError(f"rows must be from 1 to {MAX_ROWS}, got {rows}")
        seen = self._seen
        if len(context) < seen:
            raise ValueError(
                f"the context shrank from {seen} to {len(context)} tokens; call begin first"
            )
        self._seen = len(context)
        return DraftTree(*self._request.propose(context[seen:], rows))

    def opening(self, rows: int) -> list[int]:
        """At most `rows` tokens that answers usually begin with, while the next one is likelier
        than not.
        """
        return self.memory.opening(rows, OPENING)

    def end(self, answer: Sequence[int]) -> None:
        """Learn the answer, if online."""
        if self.online:
            self.memory.add(answer)
        self.begin(Request())
