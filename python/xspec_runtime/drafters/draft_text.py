"""The draft model's own answer as a source, found again after every mismatch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .base import DraftTree, Request, check_growth

# Chance that the target goes on like a place of the draft's text whose last 1, 2, ... tokens agree
# with its answer; what requests show is weighed in, as if these had been seen in PRIOR cases.
TRUST = (0.1, 0.2, 0.4, 0.55, 0.65, 0.7, 0.75, 0.8)
PRIOR = 16.0
SECOND = 0.5  # the same of a place that is not the best one
PLACES = 2  # different continuations that are proposed
LOOKED_AT = 16  # latest places with the same token that are compared
FLOOR = 1e-4  # paths less likely than this are not worth a row


class DraftTextDrafter:
    """Proposes what follows, in the draft's text, the places that end like the verified prefix.

    How far such places can be trusted is counted over all requests, by how many tokens agree.

    Args:
        text: the draft's text for a request, decoded (`DraftText`) or recorded.
        name: how reports call it.
    """

    def __init__(self, text: Callable[[Request], Sequence[int]], name: str = "draft text") -> None:
        self.name = name
        self._text = text
        # By first or second choice and agreeing tokens: [times right, times tried].
        self._tally = [[[PRIOR * trust * part, PRIOR] for trust in TRUST] for part in (1.0, SECOND)]
        self._start(())

    def begin(self, request: Request) -> None:
        """Get the draft's text; an empty one proposes nothing."""
        self._start(self._text(request))

    def propose(self, context: Sequence[int], rows: int) -> DraftTree:
        """At most `PLACES` chains in one tree of at most `rows` rows.

        Raises:
            ValueError: `context` is empty or shrank.
        """
        check_growth(context, self._known)
        for known in range(max(1, self._known), len(context)):
            self._judge(context[:known], context[known])
        self._known = len(context)
        tree = DraftTree.root(context[-1])
        for choice, (place, agreed) in enumerate(self._places(context)):
            node, score = 0, 1.0
            for token in self._draft[place : place + rows - 1]:
                right, tried = self._tally[choice > 0][min(agreed, len(TRUST)) - 1]
                score *= right / tried
                if score < FLOOR:
                    break
                # Where the chains part, the rest of a second one has its own path's chance.
                known = tree.child(node, token)
                node = tree.add(node, token, score) if known is None else known
                score = min(score, tree.scores[node])
                agreed += 1
        return tree.best(rows)

    def end(self, answer: Sequence[int]) -> None:
        """Judge the tokens that no proposal followed, and forget the request."""
        for known in range(max(1, self._known), len(answer)):
            self._judge(answer[:known], answer[known])
        self._start(())

    def _start(self, text: Sequence[int]) -> None:
        self._draft = list(text)
        self._after: dict[int, list[int]] = {}
        for place, token in enumerate(self._draft[:-1], 1):
            self._after.setdefault(token, []).append(place)
        self._known = 0

    def _judge(self, context: Sequence[int], token: int) -> None:
        for choice, (place, agreed) in enumerate(self._places(context)):
            tally = self._tally[choice > 0][min(agreed, len(TRUST)) - 1]
            tally[0] += self._draft[place] == token
            tally[1] += 1

    def _places(self, context: Sequence[int]) -> list[tuple[int, int]]:
        """Places of the text with different next tokens, and how many tokens before them agree with
        the end of `context`; the longest agreement first, the earliest of equals.
        """
        draft, best = self._draft, {}
        for place in self._after.get(context[-1], ())[-LOOKED_AT:]:
            agreed, most = 1, min(place, len(context), len(TRUST))
            while agreed < most and draft[place - 1 - agreed] == context[-1 - agreed]:
                agreed += 1
            if agreed > best.get(draft[place], (0, 0))[1]:
                best[draft[place]] = place, agreed
        return sorted(best.values(), key=lambda found: (-found[1], found[0]))[:PLACES]
