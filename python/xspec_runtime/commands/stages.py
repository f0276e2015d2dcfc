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
    duration: Annotated[str, typer.Option(help="Which of several: 1s, 2s, ... or all.")] = "",
    max_samples: Annotated[int, typer.Option(help="Clips of each dataset; -1: all.")] = -1,
    max_new_tokens: Annotated[str, typer.Option(help="One run each: 20,50,100,200.")] = "50",
    mode: Annotated[str, typer.Option(help="sequential, or overlapped: both at once.")] = (
        "sequential"
    ),
    questions: Annotated[Path | None, typer.Option(help="Questions, taken in turn.")] = None,
    target: Annotated[str, typer.Option(help="mini or the folder of a Video-LLaVA.")] = "mini",
    draft: Annotated[str, typer.Option(help="mini or the folder of an EventGPT.")] = "mini",
    frames: Annotated[str, typer.Option(help="uniform or first-n: frames of a video.")] = "uniform",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:0, ...")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    warmup: Annotated[int, typer.Option(help="Clips run once more before, uncounted.")] = 1,
    threads: Annotated[int, typer.Option(help="CPU threads; 0: torch's choice.")] = 1,
    output_dir: Annotated[Path, typer.Option(help="Folder for the results.")] = Path(
        "results/stages"
    ),
    debug: Annotated[bool, typer.Option(help="Show tracebacks.")] = False,
) -> None:
    """Time load, preprocess, vision, prefill and decode of both models; resumable."""
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
