"""`xspec report`: a profiler's recording as one table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..cli import app, command


@command(app)
def report(
    files: Annotated[
        list[Path],
        typer.Argument(
            help="Nsight Systems SQLite exports, torch.profiler traces (JSON) or our own events "
            "(JSON lines); several stand side by side."
        ),
    ],
    step_ms: Annotated[
        float | None,
        typer.Option(help="What a plain step of the target takes; by default from the file."),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the figures to this file.")
    ] = None,
) -> None:
    """Make a table of profiles: what verifies cost, what lies between, whether drafting paid."""
    from ..files import check_output, write_json
    from ..profiling.figures import figures, read_timeline
    from ..profiling.table import tables

    if json_file:
        check_output(json_file)
    found = [figures(read_timeline(path), step_ms) for path in files]
    console = Console()
    for table in tables([path.name for path in files], found):
        console.print(table)
    for path, one in zip(files, found, strict=True):
        for note in one["notes"]:
            console.print(f"{path.name}: {note}", markup=False, highlight=False, soft_wrap=True)
    if json_file:
        write_json(json_file, dict(zip(map(str, files), found, strict=True)))
