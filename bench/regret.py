"""Bounded regret: drafted answers against plain decoding, by the clock and in counted cost."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.measure import Measurement
from rich.progress import Progress

from xspec_runtime.cli import Command, run_cli
from xspec_runtime.files import check_output, write_json
from xspec_runtime.regret.report import clock_table, counted_table
from xspec_runtime.regret.run import RegretOptions, run_regret

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
D = RegretOptions()


def run(options: RegretOptions, json_file: Path | None) -> None:
    """Run with a progress bar, print the tables, write the file."""
    options.names()
    if json_file:
        check_output(json_file)
    steps = (options.repeats + 1) * options.samples
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("loading", total=steps)
        results = run_regret(
            options,
            lambda what, done, total: bar.update(
                task, description=what, completed=done, total=total or steps
            ),
        )
    console = Console()
    unbounded = console.options.update(max_width=1000)
    for table in (clock_table(results), counted_table(results)):
        if table.row_count:
            # As wide as it is, also where the output is a file.
            table.width = Measurement.get(console, unbounded, table).maximum
            console.print(table, soft_wrap=True)
    if json_file:
        write_json(json_file, results)


@app.command(cls=Command)
def main(
    samples: Annotated[int, typer.Option(help="Test scenes.")] = D.samples,
    repeats: Annotated[int, typer.Option(help="How often each scene is answered.")] = D.repeats,
    arms: Annotated[str, typer.Option(help="Arms with drafts, comma-separated.")] = D.arms,
    gamma: Annotated[int, typer.Option(help="Draft tokens of a chain.")] = D.gamma,
    rows: Annotated[int, typer.Option(help="Rows of a tree, root included.")] = D.rows,
    prefill_fused: Annotated[
        str, typer.Option(help="Drafts in the target's prefill: off, exact or fast.")
    ] = D.prefill_fused,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = D.threads,
    pairs: Annotated[
        Path | None, typer.Option(help="Recorded pairs; adds a table in counted cost.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only so many pairs, from the first.")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the results here.")
    ] = None,
    debug: Annotated[bool, typer.Option(help="Show tracebacks.")] = False,
) -> None:
    """Count answers that drafting made slower than plain decoding, beyond its own spread: drafters
    as they are, and priced by what this machine was measured to take.
    """
    command = " ".join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]])
    values = {k: v for k, v in locals().items() if k not in ("debug", "json_file")}
    run_cli(lambda: run(RegretOptions(**values), json_file), debug)


if __name__ == "__main__":
    app()
