"""`xspec stages`: the five-stage benchmark of both models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..cli import app, command
from .train_run import Device, Threads

DatasetDir = Annotated[
    Path, typer.Option(help="A dataset in the DSEC layout, or the folder above several.")
]
Target = Annotated[str, typer.Option(help="mini (the embedded one) or a folder of Video-LLaVA.")]
Draft = Annotated[str, typer.Option(help="mini (the embedded one) or a folder of xspec convert.")]
Frames = Annotated[str, typer.Option(help="Which 8 frames of a video: uniform or first-n.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
LESS_MEMORY = "lower --max-new-tokens, or take --dtype bfloat16"


@command(app, LESS_MEMORY)
def stages(
    dataset_dir: DatasetDir,
    duration: Annotated[
        str, typer.Option(help="Which of several datasets: 1s, 2s, ..., or all.")
    ] = "",
    max_samples: Annotated[
        int, typer.Option(help="Only so many clips of each dataset; -1: all.")
    ] = -1,
    max_new_tokens: Annotated[
        str, typer.Option(help="Longest answer; several, one run each: 20,50,100,200.")
    ] = "50",
    mode: Annotated[str, typer.Option(help="sequential, or overlapped: both models at once.")] = (
        "sequential"
    ),
    questions: Annotated[
        Path | None, typer.Option(help="Questions, one a line, taken in turn.")
    ] = None,
    target: Target = "mini",
    draft: Draft = "mini",
    frames: Frames = "uniform",
    device: Device = "cpu",
    dtype: Dtype = "float32",
    warmup: Annotated[int, typer.Option(help="Clips run before the count, to warm up.")] = 1,
    threads: Threads = 1,
    output_dir: Annotated[Path, typer.Option(help="Folder for JSON, tables and plots.")] = Path(
        "results/stages"
    ),
) -> None:
    """Time loading, preprocessing, vision, prefill and decoding of both models over a dataset; an
    interrupted run goes on.
    """
    values = locals()
    from ..inputs import check_device
    from ..stages.run import StageOptions, run_stages

    check_device(device)
    run_stages(StageOptions(**values))


def main() -> None:
    """Entry point of ``bench/stages.py``."""
    alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    command(alone, LESS_MEMORY)(stages)
    alone()
