"""`xspec convert`: published EventGPT checkpoints to ours."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..cli import app, command, progress_bar


@command(app, "convert on a machine with room for the largest shard")
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
) -> None:
    """Convert a published EventGPT checkpoint to the folder of safetensors that commands read."""
    from ..models.eventgpt_convert import convert_eventgpt

    if frames < 1:
        raise ValueError(f"--frames must be at least 1, got {frames}")
    with progress_bar("shards") as show:
        done = convert_eventgpt(source, destination, clip, tokenizer, frames, adaptor_passes, show)
    console = Console(stderr=True, markup=False, highlight=False)
    console.print(f"{done.tensors} tensors in {done.folder}")
    if done.unused:
        console.print(f"{len(done.unused)} unused ones left out, {done.unused[0]} among them")
