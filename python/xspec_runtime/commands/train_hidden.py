"""`xspec train hidden`, `xspec star`, `xspec score`: adapters of states, and what all are worth."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..cli import app, command
from . import train_run as run_of
from .train import train

Target = Annotated[
    str, typer.Option(help="Whose head: mini, a folder with safetensors, or one such file.")
]
Pairs = Annotated[
    Path | None, typer.Option(help="JSON of the same extraction: tokens, drives for the split.")
]
Size = Annotated[int | None, typer.Option(help="As published where not given.")]
Weight = Annotated[float | None, typer.Option(help="Of the loss; as published where not given.")]


@command(train, "lower --batch-size, or take fewer --scenes")
def hidden(
    states: Annotated[Path, typer.Option(help="Folder of states from `xspec extract --states`.")],
    output_dir: run_of.OutputDir,
    level: Annotated[str, typer.Option(help="L1 to L5, L5F, B1 or EAGLE.")] = "L4",
    pairs: Pairs = None,
    target: Target = "mini",
    scenes: Annotated[
        int, typer.Option(help="Write the states of so many procedural scenes to --states first.")
    ] = 0,
    num_epochs: run_of.NumEpochs = 30,
    batch_size: run_of.BatchSize = 16,
    learning_rate: run_of.LearningRate = 1e-3,
    early_stopping: run_of.EarlyStopping = 5,
    val_split: run_of.ValSplit = 0.1,
    hidden_share: run_of.HiddenShare = 0.3,
    position_decay: run_of.PositionDecay = 1.0,
    mse_weight: Weight = None,
    cos_weight: Weight = None,
    kl_weight: Weight = None,
    ce_weight: Weight = None,
    bottleneck_dim: Size = None,
    wide_dim: Size = None,
    num_blocks: Size = None,
    num_heads: Size = None,
    num_layers: Size = None,
    ffn_dim: Size = None,
    hidden_dim: Size = None,
    positions: Size = None,
    seed: run_of.Seed = 0,
    threads: run_of.Threads = 1,
) -> None:
    """Train an adapter of hidden states; an interrupted run goes on where it stopped."""
    from ..adapters.mini.states import scenes_missing, write_scene_states
    from ..adapters.training.hidden import HiddenTraining, train_hidden
    from ..adapters.training.states import open_states, read_head

    weights = run_of.given(mse=mse_weight, cos=cos_weight, kl=kl_weight, ce=ce_weight)
    sizes = run_of.given(
        bottleneck=bottleneck_dim, wide=wide_dim, blocks=num_blocks, heads=num_heads,
        layers=num_layers, intermediate=ffn_dim, width=hidden_dim, positions=positions,
    )  # fmt: skip
    with run_of.options_named():
        plan = HiddenTraining(
            num_epochs, batch_size, learning_rate, early_stopping, val_split, hidden_share,
            position_decay, seed, weights=weights,
        )  # fmt: skip
    terms = plan.terms(level)
    missing = scenes_missing(states / "index.json", scenes)
    run_of.prepare(output_dir, threads)
    if missing:
        run_of.alone("write the states of --scenes")
        with Console(stderr=True).status(f"answers to {scenes} scenes"):
            write_scene_states(states, scenes)
    head = read_head(target)
    material = open_states(states, head, pairs)
    kept = [len(rows) for rows in material.split(plan.held_out)]
    record = {
        "states": str(states),
        "digest": material.digest,
        "draft": material.draft_name,
        "train_answers": kept[0],
        "val_answers": kept[1],
        "split": "by drive" if material.folds else "the last answers",
        "terms": terms,
    }
    run_of.run_training(
        level, output_dir, plan,
        lambda state, show: train_hidden(level, material, head, plan, sizes, state, show),
        record,
    )  # fmt: skip


@command(app)
def star(run: Annotated[Path, typer.Argument(help="Folder of a training run.")]) -> None:
    """Mark a run as the one of its level that `starred` stands for."""
    from ..adapters.training.runs import star as mark

    Console().print(f"{mark(run)}: {run}", markup=False, highlight=False)


@command(app)
def score(
    states: Annotated[
        Path, typer.Argument(help="Kept for a test: states, or the pairs of an adapter of texts.")
    ],
    run: Annotated[Path, typer.Option(help="A run's folder, or the folder above several.")],
    level: Annotated[str, typer.Option(help="Of the run, where the folder holds several.")] = "",
    adapter: Annotated[str, typer.Option(help="latest, starred, or an adapter's folder.")] = "",
    pairs: Pairs = None,
    target: Target = "mini",
    scenes: Annotated[
        int, typer.Option(help="Write the states or pairs of so many other scenes there first.")
    ] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="File for the figures.")] = None,
) -> None:
    """Score an adapter on a test, with the draft shown and hidden."""
    from ..adapters.checkpoint import load_adapter
    from ..adapters.mini.states import SCORE_SEED, scenes_missing, write_scene_states
    from ..adapters.mini.texts import write_scene_pairs
    from ..adapters.scoring.report import figures_table, score_test
    from ..adapters.scoring.text import is_text_adapter, score_text_test
    from ..adapters.training.draft_folder import DRAFT_LEVELS
    from ..adapters.training.runs import adapter_folder, run_record
    from ..adapters.training.states import open_states, read_head
    from ..files import check_output, write_json

    if json_file:
        check_output(json_file)
    folder = adapter_folder(adapter, run, level)
    if (found := run_record(folder).get("level")) in DRAFT_LEVELS:
        raise ValueError(f"{folder} is a tuned draft ({found}), no adapter: bench/e2e.py runs it")
    head = read_head(target)
    loaded = load_adapter(folder, head.shape[0])
    texts = is_text_adapter(loaded)
    if scenes_missing(states if texts else states / "index.json", scenes, SCORE_SEED):
        (write_scene_pairs if texts else write_scene_states)(states, scenes, SCORE_SEED)
    if texts:
        figures = score_text_test(loaded, run_record(folder), states)
    else:
        figures = score_test(loaded, run_record(folder), open_states(states, head, pairs), head)
    Console().print(figures_table(figures))
    if json_file:
        write_json(json_file, figures)
