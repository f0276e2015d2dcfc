"""Small files in and out: whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in place in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # The ending stays: some writers add theirs to a name that lacks it.
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` in one step."""
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: object) -> None:
    """Replace `path` by `value` as JSON; NaN is refused."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_lines(path: Path) -> list[str]:
    """Non-empty lines of a text file, or the strings of a JSON list (``question`` of objects).

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it holds nothing, or JSON of another form.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        try:
            items = json.loads(text)
            lines = [item if isinstance(item, str) else item["question"] for item in items]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{path} must be a JSON list of strings or of objects with `question`: {error!r}"
            ) from None
    else:
        lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{path} holds no lines")
    return lines


class JsonLines:
    """A JSON-lines file that appears under its name when the block ends, however it ends."""

    def __init__(self, path: Path | None) -> None:
        self.path = path

    def __enter__(self) -> JsonLines:
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
            self._file = self._temporary.open("w", encoding="utf-8")
        return self

    def write(self, line: str) -> None:
        """Append one line."""
        self._file.write(line + "\n")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        if self.path:
            self._file.close()
            os.replace(self._temporary, self.path)
