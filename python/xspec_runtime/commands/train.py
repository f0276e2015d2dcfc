"""`xspec train`: networks that draft, trained on recorded answers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..cli import Group, app, command, progress_bar
from .train_run import options_named

train = typer.Typer(cls=Group, no_args_is_help=True, help="Train drafters on recorded answers.")
app.add_typer(train, name="train")


@command(train, "lower --width or --limit")
def head(
    pairs: Annotated[Path, typer.Argument(help="Recorded pairs (.jsonl, or published .json).")],
    destination: Annotated[Path, typer.Argument(help="File for the head (.safetensors).")],
    width: Annotated[int, typer.Option(help="Of the recurrent layer.")] = 128,
    num_epochs: Annotated[int, typer.Option(help="Passes over the answers.")] = 14,
    val_split: Annotated[
        float, typer.Option(help="Share of the answers, the last ones, that only calibrate.")
    ] = 0.1,
    seed: Annotated[int, typer.Option(help="Seed of weights and batches.")] = 0,
    limit: Annotated[int | None, typer.Option(help="Only the first pairs.")] = None,
) -> None:
    """Train a text head on the target's answers; an interrupted run goes on where it stopped."""
    from ..adapters.text_head import save_text_head
    from ..adapters.training.head import HeadTraining, train_text_head
    from ..data.pairs import VOCAB_SIZE, read_pairs
    from ..files import check_output

    with options_named():
        plan = HeadTraining(num_epochs, held_out=val_split, seed=seed)
    answers = [pair.target for pair in read_pairs(pairs, limit)]
    state = destination.with_suffix(".state.pt")
    for path in (destination, state):
        check_output(path)
    with progress_bar("text head") as show:
        trained, score = train_text_head(
            answers, VOCAB_SIZE, width, plan, state,
            lambda step, steps, loss: show(step, steps, f"loss {loss:.3f}"),
        )  # fmt: skip
    save_text_head(trained, destination)
    state.unlink(missing_ok=True)
    if score:
        Console(stderr=True).print(
            f"{score.tokens} tokens kept out: {score.nats:.3f} nats a token, "
            f"{score.calibrated_nats:.3f} at temperature {float(trained.temperature):.2f}, "
            f"{score.top_1:.1%} foreseen; {score.unseen} more that training never saw",
            markup=False,
            highlight=False,
        )
