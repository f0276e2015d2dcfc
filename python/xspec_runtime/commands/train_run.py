"""What the commands that train have in common: options, a progress bar, and a run's folder."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
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

# Fields of `Training` and of the networks' configurations, and the options that set them.
_OPTIONS = {
    "epochs": "--num-epochs",
    "batch": "--batch-size",
    "rate": "--learning-rate",
    "patience": "--early-stopping",
    "held_out": "--val-split",
    "hidden_share": "--hidden-share",
    "decay": "--position-decay",
    "seed": "--seed",
    "accumulation": "--gradient-accumulation",
    "smoothing": "--label-smoothing",
    "kl_weight": "--kl-weight",
    "rank": "--lora-rank",
    "bottleneck": "--bottleneck-dim",
    "wide": "--wide-dim",
    "blocks": "--num-blocks",
    "layers": "--num-layers",
    "encoder_layers": "--num-layers",
    "heads": "--num-heads",
    "intermediate": "--ffn-dim",
    "width": "--hidden-dim",
    "positions": "--positions",
}


@contextmanager
def options_named() -> Iterator[None]:
    """Errors that begin with the name of a field begin with that of its option instead."""
    try:
        yield
    except ValueError as error:
        field, _, rest = str(error).partition(" ")
        if field not in _OPTIONS:
            raise
        raise ValueError(f"{_OPTIONS[field]} {rest}") from error


def given(**values: Any) -> dict[str, Any]:
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
    record: Mapping[str, Any],
    save: Callable[[Any, Path], object] | None = None,
) -> None:
    """Train, write the run's folder and say in a line what came out; under torchrun the first
    process does so.

    Args:
        train: given the file for an unfinished run and what to call after every step, returns what
            was trained and its history.
        record: what describes the run, read when it is done.
        save: see `write_run`.
    """
    from dataclasses import asdict

    from ..adapters.checkpoint import save_adapter
    from ..adapters.training.loop import processes
    from ..adapters.training.runs import write_run
    from ..environment import environment

    console = Console(stderr=True)
    state = output_dir / "state.pt"
    with ExitStack() as stack:
        rank = stack.enter_context(processes())
        hidden = rank > 0 or not console.is_terminal
        shown = stack.enter_context(Progress(console=console, transient=True, disable=hidden))
        bar = shown.add_task(level)

        def show(step: int, steps: int, loss: float) -> None:
            shown.update(bar, completed=step, total=steps, description=f"loss {loss:.4f}")

        trained, history = train(state, show)
    if rank:
        return
    whole = {
        "command": shlex.join(["xspec", *sys.argv[1:]]),
        "level": level,
        **record,
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
