"""`xspec stages`: the five-stage benchmark of both models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..cli import Command, app, run_cli

LESS_MEMORY = "lower --max-new-tokens, or take --dtype bfloat16"


@app.command(cls=Command)
def stages(
    dataset_dir: Annotated[
        Path, typer.Option(help="A dataset in the DSEC layout, or the folder above several.")
    ],
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
    target: Annotated[
        str, typer.Option(help="mini (the embedded one) or a folder of Video-LLaVA.")
    ] = "mini",
    draft: Annotated[
        str, typer.Option(help="mini (the embedded one) or a folder of xspec convert.")
    ] = "mini",
    frames: Annotated[
        str, typer.Option(help="Which 8 frames of a video: uniform or first-n.")
    ] = "uniform",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:0, ...")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    warmup: Annotated[int, typer.Option(help="Clips run before the count, to warm up.")] = 1,
    threads: Annotated[int, typer.Option(help="CPU threads; 0: torch's choice.")] = 1,
    output_dir: Annotated[Path, typer.Option(help="Folder for JSON, tables and plots.")] = Path(
        "results/stages"
    ),
    debug: Annotated[bool, typer.Option(help="Show tracebacks.")] = False,
) -> None:
    """Time loading, preprocessing, vision, prefill and decoding of both models over a dataset; an
    interrupted run goes on.
    """
    values = {key: value for key, value in locals().items() if key != "debug"}

    def work() -> None:
        from ..inputs import check_device
        from ..stages import StageOptions, run_stages

        check_device(device)
        run_stages(StageOptions(**values))

    run_cli(work, debug, LESS_MEMORY)


def main() -> None:
    """Entry point of ``bench/stages.py``."""
    alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    alone.command(cls=Command)(stages)
    alone()
