"""Recorded token pairs through the drafters and the accept op: no model needed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from xspec_runtime.cli import command, progress_bar, script_command
from xspec_runtime.files import check_output, write_json
from xspec_runtime.replay.report import replay_table
from xspec_runtime.replay.run import ReplayOptions, run_replay

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def run(options: ReplayOptions, json_file: Path | None, trace: Path | None) -> None:
    """Replay with a progress bar, print the table, write the files."""
    for file in filter(None, (json_file, trace)):
        check_output(file)
    with progress_bar("reading") as show:
        results = run_replay(options, trace, show)
    Console().print(replay_table(results))
    if json_file:
        write_json(json_file, results)
    if not results["complete"]:
        done = len(results["replay"])
        raise KeyboardInterrupt(f"{done} arms are done{' and written' if json_file else ''}")


@command(app, "lower --limit")
def main(
    pairs: Annotated[Path, typer.Argument(help="Recorded pairs (.jsonl, or published .json).")],
    train: Annotated[
        Path | None, typer.Option(help="Pairs that fill the memories, in place of folds.")
    ] = None,
    folds: Annotated[int, typer.Option(help="Parts that take turns as the test.")] = 5,
    gamma: Annotated[
        int, typer.Option(help="Draft tokens a round of raw draft and constant string.")
    ] = 5,
    rows: Annotated[
        str, typer.Option(help="Rows of a verify of the memories, comma-separated.")
    ] = "6,16,32,64",
    limit: Annotated[int | None, typer.Option(help="Only so many pairs, from the first.")] = None,
    backend: Annotated[
        str, typer.Option(help="Of the accept op: auto, torch, triton or cuda.")
    ] = "auto",
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the results here.")
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(help="Write a JSON line a verify to this file.")
    ] = None,
) -> None:
    """Compare drafters on recorded answers; runs no model."""
    options = ReplayOptions(pairs, train, folds, gamma, rows, limit, backend, script_command())
    run(options, json_file, trace)


if __name__ == "__main__":
    app()
