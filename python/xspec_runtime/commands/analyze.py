"""`xspec analyze`: what similar states are worth in tokens, and where the rest is lost."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from ..cli import app, command
from .train_run import Threads


@command(app, "analyze fewer levels at once with --level, or fewer answers")
def analyze(
    states: Annotated[Path, typer.Argument(help="States that were kept for a test.")],
    run: Annotated[
        list[Path], typer.Option(help="A run's folder, or the folder above several; repeatable.")
    ],
    level: Annotated[str, typer.Option(help="Only these, as in L4,B1.")] = "",
    adapter: Annotated[str, typer.Option(help="Of several runs of a level: latest, starred.")] = "",
    pairs: Annotated[
        Path | None, typer.Option(help="JSON of the same extraction, for its tokens.")
    ] = None,
    target: Annotated[
        str, typer.Option(help="Whose head: mini, a folder with safetensors, or one such file.")
    ] = "mini",
    scenes: Annotated[
        int, typer.Option(help="Write the states of so many other scenes there first.")
    ] = 0,
    gamma: Annotated[int, typer.Option(help="Draft tokens of a chain.")] = 5,
    e2e: Annotated[
        Path | None, typer.Option(help="results.json of bench/e2e.py: speedups of these runs.")
    ] = None,
    output_dir: Annotated[
        Path, typer.Option(help="For results.json, RESULTS.md, plots and a folder a level.")
    ] = Path("results/analyze"),
    threads: Threads = 1,
) -> None:
    """Analyze adapters of states: cosine against tokens, acceptance by predicted features, where
    tokens are lost, and which targets of the research are met.
    """
    import torch

    from ..adapters.analysis.report import print_analysis
    from ..adapters.analysis.run import analyze as measure
    from ..adapters.analysis.run import find_adapters, live_figures, write_analysis
    from ..adapters.mini.states import SCORE_SEED, scenes_missing, write_scene_states
    from ..adapters.training.states import open_states, read_head
    from ..environment import environment
    from ..files import check_output

    for name, value, least in (("threads", threads, 0), ("gamma", gamma, 1)):
        if value < least:
            raise ValueError(f"--{name} must be {least} or more, got {value}")
    check_output(output_dir / "results.json")
    missing = scenes_missing(states / "index.json", scenes, SCORE_SEED)
    live = live_figures(e2e)
    if threads:
        torch.set_num_threads(threads)
    head = read_head(target)
    trained = find_adapters(run, head.shape[0], level, adapter)
    if missing:
        with Console(stderr=True).status(f"answers to {scenes} scenes"):
            write_scene_states(states, scenes, SCORE_SEED)
    material = open_states(states, head, pairs)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as shown:
        bars: dict[str, int] = {}

        def show(label: str, done: int, count: int) -> None:
            if label not in bars:
                bars[label] = shown.add_task(label, total=count)
            shown.update(bars[label], completed=done)

        analysis = measure(trained, material, head, gamma, live, show)
    said = shlex.join(["xspec", *sys.argv[1:]])
    analysis.results.update(command=said, complete=True, environment=environment())
    files = write_analysis(analysis, output_dir)
    console = Console()
    print_analysis(analysis.results, console)
    console.print("written:", ", ".join(map(str, files)), highlight=False, soft_wrap=True)
