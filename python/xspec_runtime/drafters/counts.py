"""What past answers taught: counts of their n-grams, and the probabilities these give.

All orders are interpolated, the longest first. An order with total weight T and U different
continuations takes the part ``share * T / (T + discount * U)`` of what the longer ones left; with
both parameters 1 this is Witten and Bell (1991). A share well below 1 averages over orders instead
of trusting the longest match, which makes the probabilities of long paths truer.

The reference of the native module's `NgramCounts`: the same counts, and probabilities of the same
bits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from threading import Lock

from .memory_file import MemorySettings
from .trie import OFFSET_BITS, Matches, SuffixTrie

LOW_ORDERS = 3  # orders 0..2 know little but are all there is when nothing longer matches


def likelihood(item: tuple[int, float]) -> tuple[float, int]:
    """Sort key of (token, probability): likelier is greater, ties by token, the lowest greatest."""
    return item[1], -item[0]


class NgramCounts:
    """N-gram counts of past answers, the oldest forgotten first.

    Attributes:
        lock: held by every public method; those that return or take `Matches` want it held.
        current_version: changes whenever the counts do; `Matches` of another version are void.
    """

    def __init__(self, settings: MemorySettings) -> None:
        self.settings = settings
        self.lock = Lock()
        self.current_version = 0
        self._shares = (settings.share, settings.low_share, settings.discount)
        self._trie = SuffixTrie(settings.order)
        self._lengths: Counter[int] = Counter()
        self._oldest = self._next = 0
        self._tokens = 0

    def extend(self, answers: Sequence[list[int]]) -> None:
        """Learn answers, oldest first, each of 1 to ``max_tokens`` tokens."""
        with self.lock:
            first = self._next
            self._next += len(answers)
            self.current_version += 1
            for age in self.settings.turning_ages():
                for known in range(max(self._oldest, first - age), min(first, self._next - age)):
                    self._trie.reweigh(known, self._weight(known))
            for number, answer in enumerate(answers, first):
                self._trie.insert(number, answer, self._weight(number))
                self._tokens += len(answer)
                self._lengths[len(answer)] += 1
                while self._tokens > self.settings.max_tokens:
                    self._forget()

    def version(self) -> int:
        """See `current_version`."""
        with self.lock:
            return self.current_version

    def statistics(self) -> list[int]:
        """Answers and tokens stored, answers forgotten, nodes; walks the whole trie."""
        with self.lock:
            stored = self._next - self._oldest
            return [stored, self._tokens, self._oldest, self._trie.nodes()]

    def answers(self) -> list[list[int]]:
        """Copies of the stored answers, oldest first."""
        with self.lock:
            return [list(answer) for answer in self._trie.answers.values()]

    def counts(self, context: Sequence[int]) -> list[list[tuple[int, int]]]:
        """Next tokens and their weights in every order that matches, order 0 first."""
        with self.lock:
            matches = self.match(context)
            found = [self._trie.continuations(node) for node in reversed(matches.nodes)]
            for _ in range(matches.singles):
                weight = self._trie.weights[matches.position >> OFFSET_BITS]
                found.append([(self._trie.after(matches.position), weight)])
            return found

    def predict(self, context: Sequence[int]) -> list[tuple[int, float]]:
        """Next tokens after `context` and their probabilities, the likeliest first."""
        with self.lock:
            found = self.distribution(self.match(context))
        return sorted(found.items(), key=likelihood, reverse=True)

    def opening(self, rows: int, enough: float) -> list[int]:
        """At most `rows` tokens that answers begin with, while the next one has at least the
        probability `enough`.
        """
        tokens: list[int] = []
        with self.lock:
            matches = self.match([])
            while len(tokens) < rows:
                found = self.distribution(matches)
                best = max(found.items(), key=likelihood, default=(0, 0.0))
                if best[1] < enough:
                    break
                tokens.append(best[0])
                matches = self.advance(matches, best[0])
        return tokens

    def usual_end(self) -> int:
        """Length at which answers are cut, 0 if they are not."""
        with self.lock:
            return self.current_end()

    def current_end(self) -> int:
        """The same for those that hold the lock."""
        if not self._lengths:
            return 0
        longest = max(self._lengths)
        shared = self._lengths[longest] >= max(4, (self._next - self._oldest) / 10)
        return longest if shared else 0

    def match(self, context: Sequence[int]) -> Matches:
        """Matches of an answer so far; an empty one is the start of an answer."""
        return self._trie.match(context)

    def advance(self, matches: Matches, token: int) -> Matches:
        """Matches of the context followed by `token`."""
        return self._trie.advance(matches, token)

    def distribution(self, matches: Matches, left: float = 1.0) -> dict[int, float]:
        """Token -> probability out of `left`, from the heaviest continuations of every order."""
        position, singles, nodes = matches
        high, low, discount = self._shares
        order = singles + len(nodes) - 1
        found: dict[int, float] = {}
        if position >= 0:
            weight = self._trie.weights[position >> OFFSET_BITS]
            trust = weight / (weight + discount)
            chance = 0.0
            # Step by step, so that a node that fell back to one occurrence gives the same bits.
            for single in range(order, order - singles, -1):
                part = left * trust * (high if single >= LOW_ORDERS else low)
                left -= part
                part /= weight
                chance += part * weight
            found[self._trie.after(position)] = chance
            order -= singles
        for node in nodes:
            total = node.total
            if total:
                trust = total / (total + discount * len(node.next))
                part = left * trust * (high if order >= LOW_ORDERS else low)
                left -= part
                part /= total
                for weight, token in node.top or self._trie.rank(node):
                    found[token] = found.get(token, 0.0) - part * weight
            order -= 1
        return found

    def _weight(self, number: int) -> int:
        return self.settings.weight(self._next - 1 - number)

    def _forget(self) -> None:
        """Take the oldest answer out."""
        length = len(self._trie.answers[self._oldest])
        self._trie.reweigh(self._oldest, 0)
        self._oldest += 1
        self._tokens -= length
        self._lengths[length] -= 1
        if not self._lengths[length]:
            del self._lengths[length]
