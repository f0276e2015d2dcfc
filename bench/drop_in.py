"""The drop-in for transformers against plain `generate` and prompt lookup, in turns."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from xspec_runtime.cli import command, progress_bar, script_command
from xspec_runtime.drop_in.report import drop_in_table
from xspec_runtime.drop_in.run import DropInOptions, run_drop_in
from xspec_runtime.files import check_output, write_json
from xspec_runtime.tables import print_wide

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
D = DropInOptions("")


def run(options: DropInOptions, json_file: Path | None) -> None:
    """Run with a progress bar, print the table, write the file."""
    options.names()
    if json_file:
        check_output(json_file)
    with progress_bar("loading") as show:
        results = run_drop_in(options, show)
    print_wide(Console(), drop_in_table(results))
    if json_file:
        write_json(json_file, results)
    if not results["complete"]:
        raise KeyboardInterrupt("interrupted; what is done is shown")


@command(app, "lower --samples")
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
) -> None:
    """Compare the drop-in with `generate` on the same model and prompts."""
    options = DropInOptions(
        target, prompts, samples, repeats, arms, max_new_tokens, rows, threads, script_command()
    )
    run(options, json_file)


if __name__ == "__main__":
    app()
