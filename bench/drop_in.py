"""The drop-in for transformers against plain `generate` and prompt lookup, in turns."""

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
from xspec_runtime.drop_in.report import drop_in_table
from xspec_runtime.drop_in.run import DropInOptions, run_drop_in
from xspec_runtime.files import check_output, write_json

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
D = DropInOptions("")


def run(options: DropInOptions, json_file: Path | None) -> None:
    """Run with a progress bar, print the table, write the file."""
    options.names()
    if json_file:
        check_output(json_file)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("loading", total=None)
        results = run_drop_in(
            options,
            lambda what, done, total: bar.update(
                task, description=what, completed=done, total=total
            ),
        )
    console = Console()
    table = drop_in_table(results)
    # As wide as it is, also where the output is a file.
    wide = console.options.update(max_width=1000)
    table.width = Measurement.get(console, wide, table).maximum
    console.print(table, soft_wrap=True)
    if json_file:
        write_json(json_file, results)
    if not results["complete"]:
        raise KeyboardInterrupt("interrupted; what is done is shown")


@app.command(cls=Command)
def main(
    target: Annotated[str, typer.Option(help="Folder of a causal LM, or `embedded`.")],
    prompts: Annotated[Path | None, typer.Option(help="JSON: group and question.")] = D.prompts,
    samples: Annotated[int, typer.Option(help="Prompts at most.")] = D.samples,
    repeats: Annotated[int, typer.Option(help="Times that each is answered.")] = D.repeats,
    arms: Annotated[str, typer.Option(help="Arms, by name; empty: all.")] = D.arms,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of an answer.")] = D.max_new_tokens,
    rows: Annotated[int, typer.Option(help="Rows of a verify at most.")] = D.rows,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = D.threads,
    json_file: Annotated[Path | None, typer.Option("--json", help="Results, JSON.")] = None,
    debug: Annotated[bool, typer.Option(help="Show tracebacks.")] = False,
) -> None:
    """Compare the drop-in with `generate` on the same model and prompts."""
    command = " ".join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]])
    values = (target, prompts, samples, repeats, arms, max_new_tokens, rows, threads, command)
    run_cli(lambda: run(DropInOptions(*values), json_file), debug, "lower --samples")


if __name__ == "__main__":
    app()
