"""A memory of the target's past answers: counted natively, or in Python with the same results."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, astuple
from operator import index
from pathlib import Path
from typing import NamedTuple

from . import growth
from .counts import NgramCounts
from .memory_file import MAX_TOKEN, MemorySettings, read_memory, write_memory
from .request_text import COPY_PRIOR, COPY_SECOND, COPY_TRUST

BACKENDS = ("auto", "python", "native")


class MemoryStatistics(NamedTuple):
    """Answers and tokens stored, answers forgotten, nodes of the trie."""

    answers: int
    tokens: int
    forgotten: int
    nodes: int


class NgramMemory:
    """N-gram counts of past answers, the oldest forgotten first; see `MemorySettings`.

    Threads may share it: a call that learns waits for those that read, and they for it. Native
    ones read at the same time, without Python's lock.

    Args:
        backend: "native" (C++), "python" (the reference: equal trees, probabilities of the same
            bits), or "auto", native where it is built.

    Attributes:
        settings: what it was made with.
        backend: "native" or "python".

    Raises:
        ValueError: a setting is out of range, or the backend's name is unknown.
        RuntimeError: the native module was asked for and is missing.
    """

    def __init__(
        self,
        order: int = MemorySettings.order,
        max_tokens: int = MemorySettings.max_tokens,
        recency: int = MemorySettings.recency,
        share: float = MemorySettings.share,
        low_share: float = MemorySettings.low_share,
        discount: float = MemorySettings.discount,
        backend: str = "auto",
    ) -> None:
        self.settings = MemorySettings(order, max_tokens, recency, share, low_share, discount)
        self.backend = _chosen(backend)
        if self.backend == "native":
            from xspec_kernels import ngram as native

            self._counts = native.counts(*astuple(self.settings))
        else:
            self._counts = NgramCounts(self.settings)

    def __len__(self) -> int:
        """Answers stored."""
        return self.statistics().answers

    @property
    def version(self) -> int:
        """Changes whenever what the memory knows does."""
        return self._counts.version()

    @property
    def answers(self) -> list[list[int]]:
        """Copies of the stored answers, oldest first."""
        return self._counts.answers()

    def statistics(self) -> MemoryStatistics:
        """How much is stored; in Python this walks the whole trie."""
        return MemoryStatistics(*self._counts.statistics())

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
        if fresh:
            self._counts.extend(fresh)

    def predict(self, context: Sequence[int]) -> list[tuple[int, float]]:
        """Likely next tokens of an answer that begins with `context`, the likeliest first.

        The probabilities sum to less than 1: the rest is what was never seen.
        """
        return self._counts.predict(context)

    def counts(self, context: Sequence[int]) -> list[dict[int, int]]:
        """Next token -> weight of every order that matches an answer so far, order 0 first."""
        return [dict(order) for order in self._counts.counts(context)]

    def opening(self, rows: int, enough: float) -> list[int]:
        """At most `rows` tokens that answers begin with, while the next one has at least the
        probability `enough`.
        """
        return self._counts.opening(rows, enough)

    def usual_end(self) -> int | None:
        """Length at which answers are cut: the longest one, if several and a tenth of all share it.

        None if the longest answer looks as if it had ended by itself.
        """
        return self._counts.usual_end() or None

    def request(self, chain: bool, copy: bool) -> growth.NgramRequest:
        """A request's text and trees on this memory; a native one has the same methods."""
        if self.backend == "python":
            return growth.NgramRequest(self._counts, chain, copy)
        from xspec_kernels import ngram as native

        copying = COPY_TRUST, COPY_PRIOR, COPY_SECOND, growth.COPY_FIRST
        limits = growth.SIBLINGS, growth.NEGLIGIBLE
        return native.request(self._counts, chain, copy, *copying, *limits)

    def save(self, path: str | Path) -> None:
        """Write answers and settings to one safetensors file, in one step."""
        write_memory(Path(path), self.settings, self.answers)

    @classmethod
    def load(cls, path: str | Path, backend: str = "auto") -> NgramMemory:
        """Read what `save` wrote, with either backend.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not a memory of this version, or its parts contradict each other.
            RuntimeError: the native module was asked for and is missing.
        """
        settings, answers = read_memory(Path(path))
        memory = cls(**asdict(settings), backend=backend)
        memory.extend(answers)
        return memory

    def _checked(self, tokens: Sequence[int]) -> list[int]:
        answer = [index(token) for token in tokens[: self.settings.max_tokens]]
        if answer and not 0 <= min(answer) <= max(answer) <= MAX_TOKEN:
            raise ValueError(
                f"token ids must be from 0 to {MAX_TOKEN}, got {min(answer)} to {max(answer)}"
            )
        return answer


def _chosen(backend: str) -> str:
    """The backend that "auto" stands for, or the named one once it is known to be there."""
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r}, expected one of {', '.join(BACKENDS)}")
    if backend == "python":
        return backend
    from xspec_kernels import ngram as native

    reason = native.unusable()
    if reason and backend == "native":
        raise RuntimeError(f"NgramMemory: {reason}")
    return "python" if reason else "native"
