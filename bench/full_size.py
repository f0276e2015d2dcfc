"""Both 7B models at full size with random weights; accepted lengths imposed from a recording."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from xspec_runtime.cli import command, script_command
from xspec_runtime.files import check_output, write_json
from xspec_runtime.full_size.options import Options
from xspec_runtime.full_size.run import run_full_size

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def run(options: Options, json_file: Path | None) -> None:
    """Run, print, and keep the figures."""
    console = Console()
    if json_file:
        check_output(json_file)
    results = run_full_size(
        options, lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True)
    )
    if json_file:
        write_json(json_file, results)


@command(app, "use --weights nf4, or --no-peers")
def main(
    weights: Annotated[str, typer.Option(help="nf4 or bf16.")] = Options.weights,
    shape: Annotated[
        str, typer.Option(help="full: Llama-7B's, on a GPU; tiny: on the CPU.")
    ] = Options.shape,
    pairs: Annotated[
        Path | None, typer.Option(help="Recorded answers of both models, in place of both oracles.")
    ] = None,
    oracle: Annotated[
        Path | None, typer.Option(help="Accepted lengths of the memory tree: a --trace of e2e.py.")
    ] = None,
    draft_oracle: Annotated[
        Path | None,
        typer.Option(help="Those of the draft's first chain: lines, or counts by length."),
    ] = None,
    rows: Annotated[int, typer.Option(help="Rows of the memory tree.")] = Options.rows,
    gamma: Annotated[
        int, typer.Option(help="Draft tokens written before the prefill.")
    ] = Options.gamma,
    window_ms: Annotated[float, typer.Option(help="How long the CPU prepares the video.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of weights and prompts.")] = 0,
    peers: Annotated[bool, typer.Option(help="Run transformers' arms too.")] = True,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the results here.")
    ] = None,
) -> None:
    """Time every way of answering one request at the sizes of the 7B pair."""
    device = "cpu" if shape == "tiny" else "cuda"
    options = Options(
        weights, shape, pairs, oracle, draft_oracle, rows, gamma, window_ms, device, seed, peers,
        script_command(),
    )  # fmt: skip
    run(options, json_file)


if __name__ == "__main__":
    app()
