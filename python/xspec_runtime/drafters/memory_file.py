"""Settings of an n-gram memory, and its file: the answers in order, from which it is rebuilt."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ..files import replace_file
from .trie import OFFSET_MASK

FORMAT, VERSION = "xspec.ngram_memory", "1"
MAX_TOKEN = 2**31 - 1


@dataclass(frozen=True)
class MemorySettings:
    """What a memory counts and how it turns counts into probabilities.

    Attributes:
        order: longest context, in tokens.
        max_tokens: bound of the stored tokens; the oldest answers are forgotten whole.
        recency: levels of extra weight of the newest answers. With r levels the newest weighs
            4**r, the 4 newest 4**(r-1), the 16 newest 4**(r-2), ... and all others 1; 0 weighs all
            alike. Suits streams, where neighbors show the same scene; choose 0 for unrelated
            requests, and where nothing is learned after the first answer.
        share: largest part of the remaining probability that one order from 3 up takes.
        low_share: the same for orders 0..2.
        discount: weight held back for each different continuation of a context.
    """

    order: int = 14
    max_tokens: int = 500_000
    recency: int = 4
    share: float = 0.25
    low_share: float = 0.65
    discount: float = 1.0

    def __post_init__(self) -> None:
        _check_range("order", self.order, 1, 64, int)
        _check_range("max_tokens", self.max_tokens, 1, OFFSET_MASK, int)
        _check_range("recency", self.recency, 0, 8, int)
        _check_range("share", self.share, 0.0, 1.0, float)
        _check_range("low_share", self.low_share, 0.0, 1.0, float)
        _check_range("discount", self.discount, 0.0, 1e6, float)

    def weight(self, age: int) -> int:
        """Weight of an answer that `age` newer ones follow."""
        for level in range(self.recency):
            if age < 4**level:
                return 4 ** (self.recency - level)
        return 1

    def turning_ages(self) -> list[int]:
        """Ages at which the weight falls."""
        return [4**level for level in range(self.recency)]


def _check_range(name: str, value: object, low: float, high: float, kind: type) -> None:
    numeric = (int, float) if kind is float else kind
    if isinstance(value, bool) or not isinstance(value, numeric) or not low <= value <= high:
        raise ValueError(f"{name} must be {kind.__name__} from {low} to {high}, got {value!r}")


def write_memory(path: Path, settings: MemorySettings, answers: Collection[list[int]]) -> None:
    """Write a safetensors file in one step: int64 `tokens` and `lengths`, settings as metadata."""
    from safetensors.numpy import save_file

    tensors = {
        "tokens": np.array([token for answer in answers for token in answer], np.int64),
        "lengths": np.array([len(answer) for answer in answers], np.int64),
    }
    header = {"format": FORMAT, "version": VERSION, "settings": json.dumps(asdict(settings))}
    replace_file(path, lambda temporary: save_file(tensors, temporary, header))


def read_memory(path: Path) -> tuple[MemorySettings, list[list[int]]]:
    """Settings and answers, oldest first.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a memory of this version, or its parts contradict each other.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no n-gram memory at {path}")
    try:
        return _read(path)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is not an n-gram memory: {error}") from None


def _read(path: Path) -> tuple[MemorySettings, list[list[int]]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            meta = file.metadata() or {}
            if (meta.get("format"), meta.get("version")) != (FORMAT, VERSION):
                raise ValueError(
                    f"expected format {FORMAT} version {VERSION}, found "
                    f"{meta.get('format')} version {meta.get('version')}"
                )
            tokens, lengths = file.get_tensor("tokens"), file.get_tensor("lengths")
    except (SafetensorError, OSError) as error:
        raise ValueError(str(error)) from None
    settings = json.loads(meta.get("settings", "null"))
    if not isinstance(settings, dict):
        raise ValueError("its settings are missing")
    for name, array in (("tokens", tokens), ("lengths", lengths)):
        if array.ndim != 1 or array.dtype != np.int64:
            raise ValueError(f"{name} must be one-dimensional int64, found {array.dtype}")
    if (lengths < 1).any() or int(lengths.sum()) != len(tokens) or len(tokens) > OFFSET_MASK:
        raise ValueError("its lengths do not add up to its tokens")
    if len(tokens) and not 0 <= tokens.min() <= tokens.max() <= MAX_TOKEN:
        raise ValueError(f"its tokens must be from 0 to {MAX_TOKEN}")
    flat, ends = tokens.tolist(), np.cumsum(lengths).tolist()
    return MemorySettings(**settings), [
        flat[end - n : end] for end, n in zip(ends, lengths.tolist(), strict=True)
    ]
