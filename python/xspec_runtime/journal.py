"""Finished pieces of a long run, a JSON line each, so that it can go on where it stopped."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType

from .files import read_text, write_text


class Journal:
    """Rows on disk as soon as they are written; the first line is the configuration of the run.

    Attributes:
        rows: those of an earlier run with the same configuration, and those written since. Rows
            with an `error` are tried again.

    Raises:
        ValueError: the file is of a run with another configuration.
    """

    def __init__(self, path: Path, config: dict, key: str = "sample_idx") -> None:
        self.path, self.config, self.key = path, config, key
        self.rows: list[dict] = []
        if path.is_file():
            lines = [line for line in read_text(path).splitlines() if line]
            try:
                head, *rows = [json.loads(line) for line in lines]
            except ValueError:
                # The last line of a run that was killed; what is whole before it counts.
                head, *rows = [json.loads(line) for line in lines[:-1]] or [None]
            if head != config:
                raise ValueError(f"{path} is of a run with other options; name another folder")
            self.rows = [row for row in rows if "error" not in row]

    @property
    def done(self) -> set:
        """Keys of the rows."""
        return {row[self.key] for row in self.rows}

    def __enter__(self) -> Journal:
        lines = (json.dumps(row) + "\n" for row in (self.config, *self.rows))
        write_text(self.path, "".join(lines))
        self._file = self.path.open("a", encoding="utf-8")
        return self

    def write(self, row: dict) -> None:
        """Append a row."""
        self.rows.append(row)
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._file.close()
