"""`xspec extract`: token pairs and hidden states of both models over a dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from ..cli import app, command
from .stages import LESS_MEMORY, DatasetDir, Draft, Dtype, Frames, Target
from .train_run import Device, Threads


@command(app, LESS_MEMORY)
def extract(
    dataset_dir: DatasetDir,
    output: Annotated[Path, typer.Option(help="Where to write the token pairs, JSON.")],
    duration: Annotated[str, typer.Option(help="Which of several datasets: 500ms, 1s, ...")] = "",
    states: Annotated[
        Path | None, typer.Option(help="Also write both models' hidden states to this folder.")
    ] = None,
    questions_file: Annotated[
        Path | None, typer.Option(help="Questions to ask of every clip, one a line.")
    ] = None,
    single_question: Annotated[
        str | None, typer.Option(help="One question to ask of every clip instead.")
    ] = None,
    max_questions: Annotated[
        int, typer.Option(help="Only so many questions of the file; 0: all.")
    ] = 0,
    max_samples: Annotated[int, typer.Option(help="Only so many clips; -1: all.")] = -1,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 50,
    chunk_size: Annotated[int, typer.Option(help="Answers in one file of states.")] = 1000,
    frames: Frames = "uniform",
    target: Target = "mini",
    draft: Draft = "mini",
    device: Device = "cpu",
    dtype: Dtype = "float32",
    threads: Threads = 1,
) -> None:
    """Answer every clip with both models and keep the tokens; an interrupted run goes on."""
    import torch

    from ..data.dsec import open_dataset
    from ..extract import ExtractOptions
    from ..extract import extract as run
    from ..files import read_lines
    from ..inputs import check_device
    from ..stages.run import StageOptions, open_pair

    if single_question is not None and questions_file:
        raise ValueError("give --single-question or --questions-file, not both")
    if single_question is not None and not single_question.strip():
        raise ValueError("--single-question is empty")
    if max_questions < 0:
        raise ValueError(f"--max-questions must be 0 (all) or more, got {max_questions}")
    if chunk_size < 1:
        raise ValueError(f"--chunk-size must be at least 1, got {chunk_size}")
    check_device(device)
    asked = [single_question] if single_question else []
    if questions_file:
        asked = read_lines(questions_file)[: max_questions or None]
    place = StageOptions(
        dataset_dir, max_samples=max_samples, max_new_tokens=str(max_new_tokens), frames=frames,
        target=target, draft=draft, device=device, dtype=dtype, threads=threads,
    )  # fmt: skip
    place.check()
    data = open_dataset(dataset_dir, duration)
    if threads:
        torch.set_num_threads(threads)
    options = ExtractOptions(
        output, states, tuple(asked), max_samples, max_new_tokens, frames, chunk_size
    )
    console = Console(stderr=True)
    columns = ("answers", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    pair = open_pair(place)
    hidden = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as progress:
        bar = progress.add_task("answers", total=None)
        record = run(
            pair, data, options,
            lambda done, total: progress.update(bar, completed=done, total=total),
        )  # fmt: skip
    failed = f", {record['error_count']} failed" if record["error_count"] else ""
    console.print(
        f"{record['total_samples']} pairs in {output}{failed}", markup=False, highlight=False
    )
