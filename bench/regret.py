"""Bounded regret: drafted answers against plain decoding, by the clock and in counted cost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from xspec_runtime.cli import command, progress_bar, script_command
from xspec_runtime.files import check_output, write_json
from xspec_runtime.regret.report import clock_table, counted_table
from xspec_runtime.regret.run import RegretOptions, run_regret
from xspec_runtime.tables import print_wide

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
D = RegretOptions()


def run(options: RegretOptions, json_file: Path | None) -> None:
    """Run with a progress bar, print the tables, write the file."""
    options.names()
    if json_file:
        check_output(json_file)
    with progress_bar("loading") as show:
        results = run_regret(options, show)
    for table in (clock_table(results), counted_table(results)):
        if table.row_count:
            print_wide(Console(), table)
    if json_file:
        write_json(json_file, results)


@command(app)
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
) -> None:
    """Count answers that drafting made slower than plain decoding, beyond its own spread: drafters
    as they are, and priced by what this machine was measured to take.
    """
    options = RegretOptions(
        samples, repeats, arms, gamma, rows, prefill_fused, threads, pairs, limit, script_command()
    )
    run(options, json_file)


if __name__ == "__main__":
    app()
