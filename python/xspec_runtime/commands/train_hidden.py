"""`xspec train hidden`, `xspec star`, `xspec score`: adapters of states and their worth."""

from __future__ import annotations

import os
import shlex
import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from ..cli import Command, app, run_cli
from .train import train

Target = Annotated[
    str, typer.Option(help="Whose head: mini, a folder with safetensors, or one such file.")
]
Pairs = Annotated[
    Path | None, typer.Option(help="JSON of the same extraction: tokens, drives for the split.")
]
Size = Annotated[int | None, typer.Option(help="As published where not given.")]
Weight = Annotated[float | None, typer.Option(help="Of the loss; as published where not given.")]
LESS_MEMORY = "lower --batch-size, or take fewer --scenes"


@train.command(cls=Command)
def hidden(
    states: Annotated[Path, typer.Option(help="Folder of states from `xspec extract --states`.")],
    output_dir: Annotated[Path, typer.Option(help="Folder of this run.")],
    level: Annotated[str, typer.Option(help="L1 to L5, L5F, B1 or EAGLE.")] = "L4",
    pairs: Pairs = None,
    target: Target = "mini",
    scenes: Annotated[
        int, typer.Option(help="Write the states of so many procedural scenes to --states first.")
    ] = 0,
    num_epochs: Annotated[int, typer.Option(help="Passes over the answers, at most.")] = 30,
    batch_size: Annotated[int, typer.Option(help="Answers a step.")] = 16,
    learning_rate: Annotated[float, typer.Option(help="The highest.")] = 1e-3,
    early_stopping: Annotated[int, typer.Option(help="Epochs without a better one.")] = 5,
    val_split: Annotated[float, typer.Option(help="Share of the answers that stop it.")] = 0.1,
    hidden_share: Annotated[float, typer.Option(help="Of answers without their draft.")] = 0.3,
    position_decay: Annotated[float, typer.Option(help="Position i weighs this power i.")] = 1.0,
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
    seed: Annotated[int, typer.Option(help="Seed of weights and batches.")] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads; 0: torch's choice.")] = 1,
    debug: Annotated[bool, typer.Option(help="Show tracebacks.")] = False,
) -> None:
    """Train an adapter of hidden states; an interrupted run goes on where it stopped."""
    weights = {"mse": mse_weight, "cos": cos_weight, "kl": kl_weight, "ce": ce_weight}
    sizes = {
        "bottleneck": bottleneck_dim, "wide": wide_dim, "blocks": num_blocks, "heads": num_heads,
        "layers": num_layers, "intermediate": ffn_dim, "width": hidden_dim, "positions": positions,
    }  # fmt: skip
    training = {
        "epochs": num_epochs, "batch": batch_size, "rate": learning_rate, "seed": seed,
        "patience": early_stopping, "held_out": val_split, "hidden_share": hidden_share,
        "decay": position_decay, "weights": _given(weights),
    }  # fmt: skip
    run_cli(
        lambda: _hidden(
            states, output_dir, level, pairs, target, scenes, training, _given(sizes), threads
        ),
        debug,
        LESS_MEMORY,
    )


def _given(values: dict) -> dict:
    return {name: value for name, value in values.items() if value is not None}


def _hidden(
    states: Path,
    output_dir: Path,
    level: str,
    pairs: Path | None,
    target: str,
    scenes: int,
    training: dict,
    sizes: dict,
    threads: int,
) -> None:
    import torch

    from ..adapters.mini_states import write_scene_states
    from ..adapters.runs import write_run
    from ..adapters.states import open_states, read_head
    from ..adapters.train_hidden import HiddenTraining, processes, train_hidden
    from ..environment import environment
    from ..files import check_output

    plan = HiddenTraining(**training)
    if scenes < 0:
        raise ValueError(f"--scenes must be 0 or more, got {scenes}")
    for name in ("results.json", "state.pt"):
        check_output(output_dir / name)
    if threads:
        torch.set_num_threads(threads)
    console = Console(stderr=True)
    if scenes and not (states / "index.json").exists():
        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise ValueError("write the states of --scenes with one process first")
        with console.status(f"answers to {scenes} scenes"):
            write_scene_states(states, scenes)
    head = read_head(target)
    material = open_states(states, head, pairs)
    state = output_dir / "state.pt"
    with processes() as rank, Progress(console=console, transient=True, disable=rank > 0) as shown:
        bar = shown.add_task(level)

        def show(step: int, steps: int, loss: float) -> None:
            shown.update(bar, completed=step, total=steps, description=f"loss {loss:.4f}")

        adapter, history = train_hidden(level, material, head, plan, sizes, state, show)
    if rank:
        return
    kept = [len(rows) for rows in material.split(plan.held_out)]
    record = {
        "command": shlex.join(["xspec", *sys.argv[1:]]),
        "level": level,
        "states": str(states),
        "digest": material.digest,
        "draft": material.draft_name,
        "train_answers": kept[0],
        "val_answers": kept[1],
        "split": "by drive" if material.folds else "the last answers",
        "terms": plan.terms(level),
        "training": {**training, "rate": plan.rate},
        "environment": environment(),
        "finished": datetime.now().isoformat(timespec="microseconds"),
    }
    best = write_run(output_dir, adapter, history, record)["best"]
    state.unlink(missing_ok=True)
    console.print(
        f"{level}: epoch {best['epoch']} of {len(history)}, {best['token_match']:.1%} of the "
        f"validation tokens right, cosine {best['cos_sim']:.3f}; {output_dir / 'RESULTS.md'}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


@app.command(cls=Command)
def star(
    run: Annotated[Path, typer.Argument(help="Folder of a training run.")],
    debug: Annotated[bool, typer.Option(help="Show tracebacks.")] = False,
) -> None:
    """Mark a run as the one of its level that `starred` stands for."""

    def work() -> None:
        from ..adapters.runs import star as mark

        Console().print(f"{mark(run)}: {run}", markup=False, highlight=False)

    run_cli(work, debug)


@app.command(cls=Command)
def score(
    states: Annotated[Path, typer.Argument(help="States that were kept for a test.")],
    run: Annotated[Path, typer.Option(help="A run's folder, or the folder above several.")],
    level: Annotated[str, typer.Option(help="Of the run, where the folder holds several.")] = "",
    adapter: Annotated[str, typer.Option(help="latest, starred, or an adapter's folder.")] = "",
    pairs: Pairs = None,
    target: Target = "mini",
    scenes: Annotated[
        int, typer.Option(help="Write the states of so many other scenes there first.")
    ] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="File for the figures.")] = None,
    debug: Annotated[bool, typer.Option(help="Show tracebacks.")] = False,
) -> None:
    """Score an adapter of states on a test, with the draft shown and hidden."""
    run_cli(lambda: _score(states, run, level, adapter, pairs, target, scenes, json_file), debug)


def _score(
    states: Path,
    run: Path,
    level: str,
    adapter: str,
    pairs: Path | None,
    target: str,
    scenes: int,
    json_file: Path | None,
) -> None:
    from ..adapters.checkpoint import load_adapter
    from ..adapters.mini_states import SCORE_SEED, write_scene_states
    from ..adapters.runs import adapter_folder, run_record
    from ..adapters.state_scores import figures_table, score_test
    from ..adapters.states import open_states, read_head
    from ..files import check_output, write_json

    if json_file:
        check_output(json_file)
    folder = adapter_folder(adapter or (str(run) if not level else ""), run, level)
    if scenes < 0:
        raise ValueError(f"--scenes must be 0 or more, got {scenes}")
    if scenes and not (states / "index.json").exists():
        write_scene_states(states, scenes, SCORE_SEED)
    head = read_head(target)
    loaded = load_adapter(folder, head.shape[0])
    figures = score_test(loaded, run_record(folder), open_states(states, head, pairs), head)
    Console().print(figures_table(figures))
    if json_file:
        write_json(json_file, figures)
