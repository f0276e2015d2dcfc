"""A memory of the target's past answers, and the probabilities it gives to the next token.

All orders are interpolated, the longest first. An order with total weight T and U different
continuations takes the part ``share * T / (T + discount * U)`` of what the longer ones left; with
both parameters 1 this is Witten and Bell (1991). A share well below 1 averages over orders instead
of trusting the longest match, which makes the probabilities of long paths truer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from operator import index
from pathlib import Path
from typing import NamedTuple

from .memory_file import MAX_TOKEN, MemorySettings, read_memory, write_memory
from .trie import OFFSET_BITS, Matches, SuffixTrie

LOW_ORDERS = 3  # orders 0..2 know little but are all there is when nothing longer matches


class MemoryStatistics(NamedTuple):
    """Answers and tokens stored, answers forgotten, nodes of the trie."""

    answers: int
    tokens: int
    forgotten: int
    nodes: int


class NgramMemory:
    """N-gram counts of past answers, the oldest forgotten first; see `MemorySettings`.

    Attributes:
        settings: what it was made with.
        version: changes whenever what it knows does; `Matches` of another version are void.

    Raises:
        ValueError: a setting is out of range.
    """

    def __init__(
        self,
        order: int = MemorySettings.order,
        max_tokens: int = MemorySettings.max_tokens,
        recency: int = MemorySettings.recency,
        share: float = MemorySettings.share,
        low_share: float = MemorySettings.low_share,
        discount: float = MemorySettings.discount,
    ) -> None:
        self.settings = MemorySettings(order, max_tokens, recency, share, low_share, discount)
        self.version = 0
        self._shares = (share, low_share, discount)
        self._trie = SuffixTrie(order)
        self._lengths: Counter[int] = Counter()
        self._oldest = self._next = 0
        self._tokens = 0

    def __len__(self) -> int:
        """Answers stored."""
        return self._next - self._oldest

    @property
    def answers(self) -> list[list[int]]:
        """Copies of the stored answers, oldest first."""
        return [list(answer) for answer in self._trie.answers.values()]

    def statistics(self) -> MemoryStatistics:
        """How much is stored; walks the whole trie."""
        return MemoryStatistics(len(self), self._tokens, self._oldest, self._trie.nodes())

    def add(self, tokens: Sequence[int]) -> None:
        """Learn one answer; an empty one is ignored, one longer than `max_tokens` is cut.

        Raises:
            ValueError: a token is negative or does not fit 31 bits.
            TypeError: a token is not an integer.
        """
        self.extend([tokens])

    def extend(self, answers: Iterable[Sequence[int]]) -> None:
        """Learn answers, oldest first; the same as `add` of each, but faster. Raises like `add`."""
        fresh = [answer for answer in map(self._checked, answers) if answer]
        if not fresh:
            return
        first = self._next
        self._next += len(fresh)
        self.version += 1
        for age in self.settings.turning_ages():
            for known in range(max(self._oldest, first - age), min(first, self._next - age)):
                self._trie.reweigh(known, self._weight(known))
        for number, answer in enumerate(fresh, first):
            self._trie.insert(number, answer, self._weight(number))
            self._tokens += len(answer)
            self._lengths[len(answer)] += 1
            while self._tokens > self.settings.max_tokens:
                self._forget()

    def predict(self, context: Sequence[int]) -> list[tuple[int, float]]:
        """Likely next tokens of an answer that begins with `context`, the likeliest first.

        The probabilities sum to less than 1: the rest is what was never seen.
        """
        found = self.distribution(self.match(context))
        return sorted(found.items(), key=lambda item: (-item[1], item[0]))

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

    def usual_end(self) -> int | None:
        """Length at which answers are cut: the longest one, if several and a tenth of all share it.

        None if the longest answer looks as if it had ended by itself.
        """
        if not self._lengths:
            return None
        longest = max(self._lengths)
        return longest if self._lengths[longest] >= max(4, len(self) / 10) else None

    def save(self, path: str | Path) -> None:
        """Write answers and settings to one safetensors file, in one step."""
        write_memory(Path(path), self.settings, self._trie.answers.values())

    @classmethod
    def load(cls, path: str | Path) -> NgramMemory:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not a memory of this version, or its parts contradict each other.
        """
        settings, answers = read_memory(Path(path))
        memory = cls(**asdict(settings))
        memory.extend(answers)
        return memory

    def _weight(self, number: int) -> int:
        return self.settings.weight(self._next - 1 - number)

    def _checked(self, tokens: Sequence[int]) -> list[int]:
        answer = [index(token) for token in tokens[: self.settings.max_tokens]]
        if answer and not 0 <= min(answer) <= max(answer) <= MAX_TOKEN:
            raise ValueError(
                f"token ids must be from 0 to {MAX_TOKEN}, got {min(answer)} to {max(answer)}"
            )
        return answer

    def _forget(self) -> None:
        """Take the oldest answer out."""
        length = len(self._trie.answers[self._oldest])
        self._trie.reweigh(self._oldest, 0)
        self._oldest += 1
        self._tokens -= length
        self._lengths[length] -= 1
        if not self._lengths[length]:
            del self._lengths[length]
