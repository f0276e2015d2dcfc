"""Drafters that only replays need, and what they find in the request of a recorded pair."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from ..data.pairs import Pair
from ..drafters.base import DraftTree, Request
from ..drafters.ngram import NgramDrafter

RECORDED_DRAFT = "recorded_draft"  # keys of `Request.draft_inputs`
RECORDED_QUESTION = "recorded_question"


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


class WideMemoryDrafter(NgramDrafter):
    """A memory's tree without the limit of what can be verified: for ceilings, in replays."""

    def propose(self, context: Sequence[int], rows: int) -> DraftTree:
        """A tree of at most `rows` nodes."""
        seen, self._seen = self._seen, len(context)
        return DraftTree(*self._request.propose(context[seen:], rows))


def recorded_question(request: Request) -> Hashable:
    """The question recorded with a pair; live requests all ask the same."""
    return request.draft_inputs.get(RECORDED_QUESTION, "")


def request_of(pair: Pair, hide_draft: bool = False) -> Request:
    """What drafters may know of a recorded pair."""
    draft = () if hide_draft else pair.draft
    return Request(draft_inputs={RECORDED_DRAFT: draft, RECORDED_QUESTION: pair.question})
