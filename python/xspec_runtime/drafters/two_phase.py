"""Two adapters in one answer: of the draft's text at its start, of the verified prefix after it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .base import Drafter, DraftTree, Request
from .hidden import DraftSource, HiddenDrafter


class TwoPhaseDrafter:
    """A prefill-phase adapter proposes while the draft's text and the target are in step; from the
    first token on which they differ, or where that text ends, a decode-phase one.

    The published two-phase arm is meant so: what the first adapter makes of the draft is verified,
    then the second drafts from the target's own states.

    Args:
        first: of a level that reads the draft alone, L1 to L5.
        then: any drafter, begun with every request.
        shared: sources of draft states that both read, forgotten once both have.
    """

    def __init__(
        self,
        first: HiddenDrafter,
        then: Drafter,
        shared: Sequence[SharedStates] = (),
        name: str = "two phases",
    ) -> None:
        self.first, self.then, self.name = first, then, name
        self._shared = shared
        self._decoding = False

    def begin(self, request: Request) -> None:
        """Start the request in both; raises what they do."""
        self._decoding = False
        try:
            self.first.begin(request)
            self.then.begin(request)
        finally:
            for source in self._shared:
                source.forget()

    def propose(self, context: Sequence[int], rows: int) -> DraftTree:
        """A tree of at most `rows` nodes, from one of the two."""
        if not self._decoding:
            if self.first.in_step(context):
                tree = self.first.propose(context, rows)
                if len(tree) > 1:
                    return tree
            self._decoding = rows > 1
        return self.then.propose(context, rows)

    def end(self, answer: Sequence[int]) -> None:
        """End the request in both."""
        self.first.end(answer)
        self.then.end(answer)


class SharedStates:
    """A source of draft states that runs once for several readers of the same request."""

    def __init__(self, source: DraftSource) -> None:
        self._source = source
        self.forget()

    def __call__(self, request: Request) -> torch.Tensor:
        """The states ``[L, De]`` of `request`."""
        if self._request is not request:
            self._states, self._request = self._source(request), request
        return self._states

    def forget(self) -> None:
        """Drop them: the next request is read anew, be it the same object."""
        self._request: Request | None = None
        self._states: torch.Tensor | None = None
