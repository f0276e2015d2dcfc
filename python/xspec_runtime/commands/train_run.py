"""What the commands that train have in common: options, a progress bar, and a run's folder."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

if TYPE_CHECKING:
    from ..adapters.training.loop import Progress as OnStep
    from ..adapters.training.loop import Training

OutputDir = Annotated[Path, typer.Option(help="Folder of this run.")]
NumEpochs = Annotated[int, typer.Option(help="Passes over the answers, at most.")]
BatchSize = Annotated[int, typer.Option(help="Answers a step.")]
LearningRate = Annotated[float, typer.Option(help="The highest.")]
EarlyStopping = Annotated[int, typer.Option(help="Epochs without a better one.")]
ValSplit = Annotated[float, typer.Option(help="Share of the answers that stop it.")]
HiddenShare = Annotated[float, typer.Option(help="Of answers without their draft.")]
PositionDecay = Annotated[float, typer.Option(help="Position i weighs this power i.")]
Accumulation = Annotated[int, typer.Option(help="Parts of a batch, one after the other.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:0, ...")]
Seed = Annotated[int, typer.Option(help="Seed of weights and batches.")]
Threads = Annotated[int, typer.Option(help="CPU threads; 0: torch's choice.")]
Debug = Annotated[bool, typer.Option(help="Show tracebacks.")]


def given(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those that were given."""
    return {name: value for name, value in values.items() if value is not None}


def prepare(output_dir: Path, threads: int) -> None:
    """Say now whether the run's folder can be written, and take so many threads."""
    import torch

    from ..files import check_output

    if threads < 0:
        raise ValueError(f"--threads must be 0 or more, got {threads}")
    for name in ("results.json", "state.pt"):
        check_output(output_dir / name)
    if threads:
        torch.set_num_threads(threads)


def alone(what: str) -> None:
    """Raises `ValueError` under torchrun, where every process would do `what`."""
    import os

    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ValueError(f"{what} with one process first")


def run_training(
    level: str,
    output_dir: Path,
    plan: Training,
    train: Callable[[Path, OnStep], tuple[Any, list[dict[str, Any]]]],
    record: Callable[[], Mapping[str, Any]],
    save: Callable[[Any, Path], object] | None = None,
) -> None:
    """Train, write the run's folder and say in a line what came out; under torchrun the first
    process does so.

    Args:
        train: given the file for an unfinished run and what to call after every step, returns what
            was trained and its history.
        record: what describes the run, asked for when it is done.
        save: see `write_run`.
    """
    from dataclasses import asdict

    from ..adapters.checkpoint import save_adapter
    from ..adapters.training.loop import processes
    from ..adapters.training.runs import write_run
    from ..environment import environment

    console = Console(stderr=True)
    state = output_dir / "state.pt"
    with processes() as rank, Progress(console=console, transient=True, disable=rank > 0) as shown:
        bar = shown.add_task(level)

        def show(step: int, steps: int, loss: float) -> None:
            shown.update(bar, completed=step, total=steps, description=f"loss {loss:.4f}")

        trained, history = train(state, show)
    if rank:
        return
    whole = {
        "command": shlex.join(["xspec", *sys.argv[1:]]),
        "level": level,
        **record(),
        "training": asdict(plan),
        "environment": environment(),
        "finished": datetime.now().isoformat(timespec="microseconds"),
    }
    best = write_run(output_dir, trained, history, whole, save or save_adapter)["best"]
    state.unlink(missing_ok=True)
    alike = f", cosine {best['cos_sim']:.3f}" if best.get("cos_sim") is not None else ""
    console.print(
        f"{level}: epoch {best['epoch']} of {len(history)}, {best['token_match'] or 0:.1%} of the "
        f"validation tokens right{alike}; {output_dir / 'RESULTS.md'}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
