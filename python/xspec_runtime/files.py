"""Small files in and out: whole or not at all, and one line saying why not."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in place in one step.

    Raises:
        OSError: names `path` and why it cannot be written; what was there before is untouched.
    """
    try:
        path = _destination(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        # The ending stays: some writers add theirs to a name that lacks it.
        temporary = path.with_name(f".{os.getpid()}.{path.name}")
        try:
            write(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise _refusal("write", path, error) from error


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` in one step."""
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: object) -> None:
    """Replace `path` by `value` as JSON; NaN is refused."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def check_output(path: Path) -> None:
    """Raise unless a file can be written at `path`, folders above it included; creates nothing.

    Raises:
        OSError: names `path` and why it cannot be written.
    """
    try:
        room = _destination(path).parent
        while not os.path.lexists(room):
            room = room.parent
        with tempfile.TemporaryFile(dir=room):
            pass
    except OSError as error:
        raise _refusal("write to", path, error) from error


def _destination(path: Path) -> Path:
    """The file that `path` stands for. Putting a file in place removes what was there, so a device
    or a pipe must not be: that would take /dev/null from everybody.
    """
    path = Path(os.path.realpath(path))
    if path.is_dir():
        raise OSError("it is a folder, expected a file")
    if os.path.lexists(path):
        if not path.is_file():
            raise OSError("it is a device or a pipe, expected a file")
        if not os.access(path, os.W_OK):
            raise OSError("it is read-only")
    return path


def _refusal(what: str, path: Path, error: OSError) -> OSError:
    return OSError(f"cannot {what} {path}: {error.strerror or error}")


def existing_file(path: Path, what: str = "file") -> Path:
    """`path`, which must be a file.

    Raises:
        FileNotFoundError: there is nothing; the message starts with `what`.
        ValueError: it is a folder or a device.
    """
    if not path.exists():
        raise FileNotFoundError(f"{what} not found: {path}")
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "a device or a pipe"
        raise ValueError(f"{what} expected, {path} is {kind}")
    return path


def read_bytes(path: Path, what: str = "file") -> bytes:
    """Content of a file.

    Raises:
        FileNotFoundError, ValueError: see `existing_file`.
        OSError: it cannot be read; the message names it.
    """
    try:
        return existing_file(path, what).read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise _refusal("read", path, error) from error


def read_text(path: Path, what: str = "file") -> str:
    """Content of a UTF-8 text file; raises like `read_bytes`.

    Raises:
        ValueError: it is not UTF-8.
    """
    try:
        return read_bytes(path, what).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: byte {error.start} cannot be read") from None


def read_json(path: Path, what: str = "file") -> object:
    """Content of a JSON file; raises like `read_text`.

    Raises:
        ValueError: it is not JSON.
    """
    try:
        return json.loads(read_text(path, what))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {str(error) or 'it is empty'}") from None


def read_saved(path: Path) -> Any:
    """What `torch.save` wrote: tensors and plain values.

    Raises:
        ValueError: the file is damaged.
    """
    import torch

    try:
        return torch.load(path, weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}); remove it") from error


def read_lines(path: Path) -> list[str]:
    """Non-empty lines of a text file, or the strings of a JSON list (``question`` of objects).

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is no text, holds nothing, or JSON of another form.
    """
    if path.suffix == ".json":
        items = read_json(path)
        if not isinstance(items, list):
            raise ValueError(f"{path} must hold a JSON list, got {type(items).__name__}")
        lines = [item.get("question") if isinstance(item, dict) else item for item in items]
        for i, line in enumerate(lines):
            if not isinstance(line, str) or not line.strip():
                raise ValueError(
                    f"{path}: item {i} must be a non-empty string or an object with one under "
                    f"`question`, got {json.dumps(items[i])[:60]}"
                )
    else:
        lines = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{path} holds no lines")
    return lines


class JsonLines:
    """A JSON-lines file that appears under its name when the block ends without an error."""

    def __init__(self, path: Path | None) -> None:
        self.path = path

    def __enter__(self) -> JsonLines:
        if self.path:
            try:
                self._final = _destination(self.path)
                self._final.parent.mkdir(parents=True, exist_ok=True)
                self._temporary = self._final.with_name(f".{self._final.name}.{os.getpid()}")
                self._file = self._temporary.open("w", encoding="utf-8")
            except OSError as error:
                raise _refusal("write", self.path, error) from error
        return self

    def write(self, line: str) -> None:
        """Append one line."""
        try:
            self._file.write(line + "\n")
        except OSError as error:
            raise _refusal("write", self.path, error) from error

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        if not self.path:
            return
        try:
            self._file.close()
            if kind is None:
                os.replace(self._temporary, self._final)
        except OSError as failure:
            if kind is None:
                raise _refusal("write", self.path, failure) from failure
        finally:
            self._temporary.unlink(missing_ok=True)
