"""Prompt and answer of one request, as a place to copy from."""

from __future__ import annotations

from collections.abc import Sequence

# Chance that text of this request goes on like an earlier place whose last 1, 2, ... tokens agree;
# what a request shows is weighed in, as if these had been seen in COPY_PRIOR cases.
COPY_TRUST = (0.3, 0.45, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9)
COPY_PRIOR = 16.0
COPY_SECOND = 0.5  # the same of a place that agrees less than another one, as a part of it
COPIES = 4  # different continuations that are considered
COPY_ANCHOR = 3  # of so many tokens the places are indexed, beside those of the last token alone
COPY_PLACES = 16  # latest places looked at in either index


class RequestText:
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
