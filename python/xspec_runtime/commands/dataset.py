"""`xspec dataset`: check a dataset in the DSEC layout, or write a miniature one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..cli import Group, app, command, progress_bar

dataset = typer.Typer(cls=Group, no_args_is_help=True, help="Event and video clips on disk.")
app.add_typer(dataset, name="dataset")
SHOWN = 10


@command(dataset)
def generate(
    root: Annotated[
        Path, typer.Argument(help="Folder to write to: one dataset below it a duration.")
    ],
    durations: Annotated[
        str, typer.Option(help="Lengths of clips, comma-separated: 500ms,1s,2s, ...")
    ] = "1s",
    drives: Annotated[int, typer.Option(help="Drives in each dataset.")] = 2,
    clips: Annotated[int, typer.Option(help="Clips in each drive.")] = 3,
    split: Annotated[
        str, typer.Option(help="Which part to imitate: seq (the test) or train.")
    ] = "seq",
) -> None:
    """Write a miniature of procedural scenes in the DSEC layout; clips that exist are kept."""
    from ..data.dsec_miniature import write_miniature

    names = tuple(name.strip() for name in durations.split(","))
    with progress_bar("clips") as show:
        folders = write_miniature(root, names, drives, clips, split, show)
    console = Console(stderr=True, markup=False, highlight=False)
    for folder in folders:
        console.print(f"{drives * clips} clips in {folder}")


@command(dataset)
def check(
    folder: Annotated[
        Path, typer.Argument(help="A dataset in the DSEC layout, or the folder above several.")
    ],
    duration: Annotated[
        str, typer.Option(help="Which of several datasets: 500ms, 1s, 2s, ...")
    ] = "",
    read: Annotated[
        bool, typer.Option("--read", help="Also read every event stream and video to its end.")
    ] = False,
) -> None:
    """Say what a dataset holds and which of its files are missing or damaged."""
    from ..data.dsec import check as faults_of
    from ..data.dsec import open_dataset

    found = open_dataset(folder, duration)
    console = Console(soft_wrap=True, markup=False, highlight=False)
    each = f", {found.duration} each" if found.duration else ""
    console.print(f"{found.folder}: {len(found.clips)} clips of {len(found.drives)} drives{each}")
    faults = faults_of(found, read)
    for fault in faults[:SHOWN]:
        console.print(fault)
    if faults:
        raise ValueError(f"{len(faults)} faults in {found.folder}")
