"""`xspec evaluate`: what every source of drafts is worth, alone and with the others."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..cli import app, command, progress_bar


@command(app, "lower --limit or --rows")
def evaluate(
    pairs: Annotated[
        Path | None,
        typer.Argument(help="Recorded pairs; without them the embedded pair runs live."),
    ] = None,
    train: Annotated[
        Path | None, typer.Option(help="Pairs to learn from, in place of folds.")
    ] = None,
    folds: Annotated[int, typer.Option(help="Parts that take turns as the test.")] = 5,
    by_drive: Annotated[bool, typer.Option(help="One part a drive that the pairs name.")] = False,
    gamma: Annotated[
        int, typer.Option(help="Draft tokens a round of drafters that propose chains.")
    ] = 5,
    rows: Annotated[
        str, typer.Option(help="Rows of a verify, several in turn; above 64 as a ceiling only.")
    ] = "6,16,32,64",
    sources: Annotated[
        str, typer.Option(help="Only these sources, comma-separated; a wrong name lists all.")
    ] = "",
    sizes: Annotated[
        str, typer.Option(help="Numbers of training answers to compare: 0,50,200.")
    ] = "",
    limit: Annotated[
        int | None, typer.Option(help="Only so many pairs of each file, from the first.")
    ] = None,
    scenes: Annotated[int, typer.Option(help="Without pairs: unseen scenes to answer.")] = 24,
    seed: Annotated[int, typer.Option(help="Without pairs: which scenes.")] = 0,
    backend: Annotated[str, typer.Option(help="Of the ops: auto, torch, triton or cuda.")] = "auto",
    output_dir: Annotated[
        Path, typer.Option(help="Folder for results.json, RESULTS.md and plots.")
    ] = Path("results/evaluate"),
    resume: Annotated[
        bool, typer.Option(help="Go on with the unfinished run in the output folder.")
    ] = False,
) -> None:
    """Compare all sources of drafts, alone, together, and with the draft hidden."""
    from ..evaluate.report import print_evaluation, write_evaluation
    from ..evaluate.run import EvaluateOptions
    from ..evaluate.run import evaluate as measure

    words = (os.path.relpath(word) if os.path.isabs(word) else word for word in sys.argv[1:])
    options = EvaluateOptions(
        pairs, train, folds, by_drive, gamma, rows, sources, sizes, limit, scenes, seed, backend,
        output_dir, resume, shlex.join(["xspec", *words]),
    )  # fmt: skip
    with progress_bar("reading") as show:
        results = measure(options, show)
    console = Console()
    print_evaluation(results, console)
    files = [options.folder / "results.json", *write_evaluation(results, options.folder)]
    console.print("written:", ", ".join(map(str, files)), highlight=False, soft_wrap=True)
    if not results["complete"]:
        raise KeyboardInterrupt(
            f"{len(results['cells'])} cells are done and written; --resume goes on"
        )
