"""The process in which the parts of one phase run: a job on standard input, events on standard
output, each behind a marker at the end of a line; all else there is log.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

from . import PHASES
from .parts import Context, Event, Options, Part, execute, parts_of

MARKER = "@xspec "


def job(parts: list[Part], context: Context) -> str:
    """What `main` reads: parts of one phase, with the same `paths`."""
    options = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(context.options).items()}
    return json.dumps(
        {
            "phase": parts[0].phase,
            "module": PHASES[parts[0].phase],
            "parts": [part.key for part in parts],
            "paths": parts[0].paths,
            "options": options,
            "left": context.left(),
            "known": context.known,
        }
    )


def parse(line: str) -> tuple[str, Event | None]:
    """The log text and the event of a line of the worker's output; a library may print without
    ending its line.
    """
    text, marker, event = line.partition(MARKER)
    return text, json.loads(event) if marker else None


def main() -> None:
    """Run the job."""
    wanted = json.loads(sys.stdin.read())
    sys.path[:0] = wanted["paths"]
    PHASES[wanted["phase"]] = wanted["module"]
    fields = wanted["options"]
    fields |= {"out": Path(fields["out"]), "bundle": Path(fields["bundle"])}
    options = Options(**fields | {"phases": tuple(fields["phases"])})

    def write(line: str) -> None:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()

    deadline = time.monotonic() + wanted["left"]
    context = Context(options, deadline, wanted["known"], log=write)
    chosen = {part.key: part for part in parts_of(wanted["phase"], options)}
    execute(
        [chosen[key] for key in wanted["parts"]],
        context,
        lambda event: write(MARKER + json.dumps(event)),
        stop_on_failure=True,
    )


if __name__ == "__main__":
    main()
