"""Recorded answers of draft and target to the same clips, from files that are not trusted."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path

from ..files import existing_file

__all__ = ["VOCAB_SIZE", "Pair", "contiguous_folds", "drive_folds", "iter_pairs", "read_pairs"]

VOCAB_SIZE = 32_000  # LLaMA; both recorded models


@dataclass(frozen=True, slots=True)
class Pair:
    """One clip and question.

    Attributes:
        sample: the clip's number in its recording (``sample_idx``; the row's number without one).
        row: number of the row in the file, from 0.
        question: text of the question, or "".
        draft: token ids of the draft model's answer.
        target: token ids of the target's answer.
        drive: the recording that the clip was cut from, or "" where the file does not say.
    """

    sample: int
    row: int
    question: str
    draft: tuple[int, ...]
    target: tuple[int, ...]
    drive: str = ""


def read_pairs(
    path: str | Path, limit: int | None = None, vocab_size: int = VOCAB_SIZE
) -> list[Pair]:
    """All pairs of a file, or the first `limit`. Raises like `iter_pairs`, and where there is none.

    Raises:
        ValueError: the file holds no pairs, or `limit` is not positive.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    pairs = list(islice(iter_pairs(path, vocab_size), limit))
    if not pairs:
        raise ValueError(f"{path} holds no pairs")
    return pairs


def iter_pairs(path: str | Path, vocab_size: int = VOCAB_SIZE) -> Iterator[Pair]:
    """Pairs one by one, from JSON lines or from one ``{"results": [...]}`` object.

    Rows hold ``egpt_tokens`` (draft) and ``vl_tokens`` (target), lists of ids; ``sample_idx`` and
    ``query`` or ``question`` are optional, and so is ``drive``, for which the folder of
    ``event_data`` stands in; other keys are ignored. Blank lines are skipped.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: names file, line (or result) and what is wrong with it.
    """
    path = Path(path)
    existing_file(path, "recorded pairs")
    try:
        for row, (where, value) in enumerate(_rows(path)):
            yield _pair(f"{path}, {where}", row, value, vocab_size)
    except OSError as error:
        raise OSError(f"cannot read {path}: {error.strerror}") from error


def contiguous_folds(count: int, folds: int) -> list[range]:
    """`folds` runs of neighboring rows that cover `count` rows, sizes differing by at most one.

    Neighboring clips overlap, so folds of scattered rows would test on what was trained.

    Raises:
        ValueError: fewer than two folds, or more folds than rows.
    """
    if not 2 <= folds <= count:
        raise ValueError(f"folds must be from 2 to the number of rows, {count}, got {folds}")
    edges = [i * count // folds for i in range(folds + 1)]
    return [range(a, b) for a, b in pairwise(edges)]


def drive_folds(pairs: Sequence[Pair]) -> list[list[int]]:
    """Indices of each drive's pairs, drives in order of appearance.

    Raises:
        ValueError: a pair names no drive, or all name the same.
    """
    folds: dict[str, list[int]] = {}
    for i, pair in enumerate(pairs):
        if not pair.drive:
            raise ValueError(f"folds by drive need a drive in every row; row {pair.row} names none")
        folds.setdefault(pair.drive, []).append(i)
    if len(folds) < 2:
        raise ValueError(f"folds by drive need two drives or more, got {', '.join(folds)}")
    return list(folds.values())


def known_drives(pairs: Sequence[Pair]) -> list[list[int]] | None:
    """`drive_folds`, or None where a pair names no drive or all name the same."""
    known = len({pair.drive for pair in pairs}) > 1 and all(pair.drive for pair in pairs)
    return drive_folds(pairs) if known else None


def _rows(path: Path) -> Iterator[tuple[str, object]]:
    with path.open("rb") as file:
        first = True
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            if first:
                first = False
                whole = _published(path, line)
                if whole is not None:
                    yield from whole
                    return
            yield f"line {number}", _parse(line, f"{path}, line {number}")


def _published(path: Path, first_line: bytes) -> Iterator[tuple[str, object]] | None:
    """Rows of ``{"results": [...]}``; None if the file is JSON lines."""
    try:
        value = json.loads(first_line)
    except (ValueError, RecursionError):
        if not first_line.strip().startswith(b"{") or b"_tokens" in first_line:
            return None
        value = _parse(path.read_bytes(), str(path))
    if not isinstance(value, dict) or "results" not in value:
        return None
    results = value["results"]
    if not isinstance(results, list):
        raise ValueError(f"{path}: results must be a list, got {type(results).__name__}")
    return ((f"results[{i}]", item) for i, item in enumerate(results))


def _parse(text: bytes, where: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON: {error}") from None


def _pair(where: str, row: int, value: object, vocab_size: int) -> Pair:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected an object, got {type(value).__name__}")
    sample = value.get("sample_idx", row)
    if type(sample) is not int:
        raise ValueError(f"{where}: sample_idx must be an integer, got {sample!r}")
    question = value.get("query", value.get("question", ""))
    if not isinstance(question, str):
        raise ValueError(f"{where}: query must be a string, got {type(question).__name__}")
    draft, target = (_ids(where, key, value, vocab_size) for key in ("egpt_tokens", "vl_tokens"))
    return Pair(sample, row, question, draft, target, _drive(where, value))


def _drive(where: str, value: dict) -> str:
    drive = value.get("drive", "")
    clip = value.get("event_data", "")
    for key, found in (("drive", drive), ("event_data", clip)):
        if not isinstance(found, str):
            raise ValueError(f"{where}: {key} must be a string, got {found!r}")
    return drive or clip.rpartition("/")[0]


def _ids(where: str, key: str, value: dict, vocab_size: int) -> tuple[int, ...]:
    ids = value.get(key)
    if not isinstance(ids, list):
        found = "nothing" if key not in value else type(ids).__name__
        raise ValueError(f"{where}: {key} must be a list of token ids, got {found}")
    if not ids:
        raise ValueError(f"{where}: {key} is empty")
    for i, token in enumerate(ids):
        if type(token) is not int or not 0 <= token < vocab_size:
            raise ValueError(
                f"{where}: {key}[{i}] must be an id below {vocab_size}, got {str(token)[:40]}"
            )
    return tuple(ids)
