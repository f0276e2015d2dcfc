"""`xspec convert`: published EventGPT checkpoints to ours."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from ..cli import Command, app, run_cli


@app.command(cls=Command)
def convert(
    source: Annotated[Path, typer.Argument(help="Folder of a published EventGPT checkpoint.")],
    destination: Annotated[Path, typer.Argument(help="New folder for the converted one.")],
    clip: Annotated[
        Path | None, typer.Option(help="Folder of the CLIP tower, where the checkpoint lacks it.")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Folder of the tokenizer, where the checkpoint lacks it.")
    ] = None,
    frames: Annotated[int, typer.Option(help="Event images of a request: 5 as trained, or 1.")] = 5,
    adaptor_passes: Annotated[
        int, typer.Option(help="2 applies the feature adaptor twice, as published runs did.")
    ] = 1,
    debug: Annotated[bool, typer.Option(help="Show tracebacks.")] = False,
) -> None:
    """Convert a published EventGPT checkpoint to the folder of safetensors that commands read."""
    run_cli(
        lambda: _convert(source, destination, clip, tokenizer, frames, adaptor_passes),
        debug,
        "convert on a machine with room for the largest shard",
    )


def _convert(
    source: Path,
    destination: Path,
    clip: Path | None,
    tokenizer: Path | None,
    frames: int,
    adaptor_passes: int,
) -> None:
    from ..models.eventgpt_convert import convert_eventgpt

    if frames < 1:
        raise ValueError(f"--frames must be at least 1, got {frames}")
    console = Console(stderr=True)
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("shards", total=None)
        done = convert_eventgpt(
            source,
            destination,
            clip,
            tokenizer,
            frames,
            adaptor_passes,
            lambda written, total: progress.update(bar, completed=written, total=total),
        )
    console.print(f"{done.tensors} tensors in {done.folder}", markup=False, highlight=False)
    if done.unused:
        console.print(
            f"{len(done.unused)} unused ones left out, {done.unused[0]} among them",
            markup=False,
            highlight=False,
        )
