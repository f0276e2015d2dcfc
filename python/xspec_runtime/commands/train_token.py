"""`xspec train token`: adapters from the draft's text to the target's tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..cli import command
from . import train_run as run_of
from .train import train

Size = Annotated[int | None, typer.Option(help="As published where not given.")]


@command(train, "lower --batch-size, or raise --gradient-accumulation")
def token(
    pairs: Annotated[Path, typer.Argument(help="Recorded pairs (.jsonl, or published .json).")],
    output_dir: run_of.OutputDir,
    network: Annotated[
        str,
        typer.Option(
            help="token (as shipped), token-bias (64 positions, a bias a token), or prefix, which "
            "reads what the target has said."
        ),
    ] = "token",
    target: Annotated[str, typer.Option(help="Whose vocabulary: mini, or a model's folder.")] = (
        "mini"
    ),
    vocab_size: Annotated[int | None, typer.Option(help="In place of --target's.")] = None,
    max_train_samples: Annotated[int | None, typer.Option(help="Only the first pairs.")] = None,
    scenes: Annotated[
        int, typer.Option(help="Write the pairs of so many procedural scenes to PAIRS first.")
    ] = 0,
    num_epochs: run_of.NumEpochs = 50,
    batch_size: run_of.BatchSize = 32,
    learning_rate: run_of.LearningRate = 1e-4,
    early_stopping: run_of.EarlyStopping = 10,
    val_split: run_of.ValSplit = 0.1,
    hidden_share: run_of.HiddenShare = 0.3,
    position_decay: run_of.PositionDecay = 1.0,
    label_smoothing: Annotated[float, typer.Option(help="Share of a label spread out.")] = 0.1,
    gradient_accumulation: run_of.Accumulation = 1,
    hidden_dim: Size = None,
    num_layers: Size = None,
    num_heads: Size = None,
    ffn_dim: Size = None,
    positions: Size = None,
    dropout: Annotated[float | None, typer.Option(help="0.1 where not given.")] = None,
    device: run_of.Device = "cpu",
    seed: run_of.Seed = 0,
    threads: run_of.Threads = 1,
) -> None:
    """Train a TokenAdapter or a prefix adapter; an interrupted run goes on where it stopped."""
    from ..adapters.mini.states import scenes_missing
    from ..adapters.mini.texts import write_scene_pairs
    from ..adapters.training.loop import split_rows
    from ..adapters.training.text import (
        NETWORKS,
        TextTraining,
        build,
        constant_match,
        open_text_pairs,
        train_text,
    )
    from ..inputs import check_device

    layers = "encoder_layers" if network == "prefix" else "layers"
    sizes = run_of.given(
        width=hidden_dim, heads=num_heads, intermediate=ffn_dim, positions=positions,
        dropout=dropout, **{layers: num_layers},
    )  # fmt: skip
    with run_of.options_named():
        plan = TextTraining(
            num_epochs, batch_size, learning_rate, early_stopping, val_split, hidden_share,
            position_decay, seed, gradient_accumulation, label_smoothing,
        )  # fmt: skip
    check_device(device)
    missing = scenes_missing(pairs, scenes)
    run_of.prepare(output_dir, threads)
    size = _vocab_size(target) if vocab_size is None else vocab_size
    if missing:
        run_of.alone("write the pairs of --scenes")
        with Console(stderr=True).status(f"answers to {scenes} scenes"):
            write_scene_pairs(pairs, scenes)
    material = open_text_pairs(pairs, size, max_train_samples)
    train_rows, held = split_rows(len(material), plan.held_out, material.folds)
    with run_of.options_named():
        build(network, material, sizes)
    constant = constant_match(material.targets, train_rows, held)
    material = material.to(device)
    record = {
        "network": network,
        "pairs": str(pairs),
        "digest": material.digest,
        "draft": material.draft_name,
        "train_answers": len(train_rows),
        "val_answers": len(held),
        "split": "by drive" if material.folds else "the last answers",
        "constant_match": constant,
    }
    run_of.run_training(
        NETWORKS[network], output_dir, plan,
        lambda state, show: train_text(network, material, plan, sizes, state, show),
        record,
    )  # fmt: skip


def _vocab_size(target: str) -> int:
    """Of the model in a folder, or of the embedded pair."""
    from ..files import read_json
    from ..models import mini

    if target == "mini":
        return mini.VOCAB
    values = read_json(Path(target) / "config.json", "configuration of a model")
    values = values if isinstance(values, dict) else {}
    size = (values.get("text_config") or values).get("vocab_size")
    if type(size) is not int or size < 1:
        raise ValueError(f"{target} does not say its vocabulary: give --vocab-size")
    return size
