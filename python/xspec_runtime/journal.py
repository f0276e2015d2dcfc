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
        ValueError: the file is of a run with another configuration, or damaged.
    """

    def __init__(self, path: Path, config: dict, key: str = "sample_idx") -> None:
        self.path, self.config, self.key = path, config, key
        self.rows: list[dict] = []
        if path.is_file():
            lines = [line for line in read_text(path).splitlines() if line]
            head, *rows = [self._row(i, line, lines) for i, line in enumerate(lines)] or [config]
            if head != config:
                raise ValueError(f"{path} is of a run with other options; name another folder")
            self.rows = [row for row in rows if "error" not in row]

    def _row(self, number: int, line: str, lines: list[str]) -> dict:
        """Line `number`, 0 being the configuration; the rows of an `error` are not counted."""
        try:
            row = json.loads(line)
        except ValueError as error:
            # The last line of a run that was killed; what is whole before it counts.
            if number and line is lines[-1]:
                return {"error": str(error)}
            row = None
        if not isinstance(row, dict) or (number and not {self.key, "error"} & row.keys()):
            raise ValueError(f"{self.path}, line {number + 1} is damaged; name another folder")
        return row

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
