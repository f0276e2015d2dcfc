"""What a request should take: closed forms over measured parts, or a card's modelled verify."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from xspec_runtime.cli import command, script_command
from xspec_runtime.cost.report import (
    cost_results,
    fill_page,
    modelled_markdown,
    points_markdown,
    projected_markdown,
    write_cost,
)
from xspec_runtime.cost.spot import modelled_for, numbers, read_verify, spot_e2e, spot_verify
from xspec_runtime.result_schema import read_results

ROOT = Path(__file__).resolve().parent.parent
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@command(app)
def main(
    e2e: Annotated[
        Path | None, typer.Option(help="results.json of bench/e2e.py; without it, a short run.")
    ] = None,
    verify: Annotated[
        Path | None, typer.Option(help="results.json of bench/verify.py for the same model.")
    ] = None,
    backend: Annotated[str, typer.Option(help="Which of --verify; default: its first.")] = "",
    gamma: Annotated[str, typer.Option(help="Chain lengths to project, comma-separated.")] = "",
    samples: Annotated[int, typer.Option(help="Test scenes of the short run.")] = 4,
    card: Annotated[
        str, typer.Option(help="Model cards instead, measure nothing: h200,h100,a100,4090,3090.")
    ] = "",
    config: Annotated[str, typer.Option(help="With --card: shape, as in verify.py.")] = "llama-7b",
    prompt_tokens: Annotated[
        str, typer.Option(help="With --card: tokens in the KV cache.")
    ] = "2076,4124",
    rows: Annotated[str, typer.Option(help="With --card: rows M.")] = "1,22,64",
    page: Annotated[
        Path | None, typer.Option(help="With --card: rewrite the tables of this page.")
    ] = None,
    check: Annotated[bool, typer.Option(help="Only say whether --page is up to date.")] = False,
    measured: Annotated[Path, typer.Option(help="Folder of measured results for --page.")] = ROOT
    / "bench"
    / "results",
    output_dir: Annotated[Path, typer.Option(help="Folder for results and plot.")] = Path(
        "results/cost"
    ),
    json_file: Annotated[Path | None, typer.Option("--json", help="Copy of results.json.")] = None,
) -> None:
    """Project speedups from measured parts; with --card, model v(M) of a model's shape."""
    said = script_command()
    if (page or check) and not (card and page):
        raise ValueError("--page goes with --card, and --check with --page")
    if card:
        results = modelled_for(said, config, card, prompt_tokens, rows)
        shown = f"Modelled, not measured.\n\n{modelled_markdown(results)}"
        if page:
            fill_page(page, measured, results, check)
    else:
        gammas = numbers("--gamma", gamma, 63) if gamma else ()
        whole, tall = e2e and read_results(e2e), verify and read_verify(verify)
        if whole is None:
            tall = tall or spot_verify(output_dir)
            whole = spot_e2e(output_dir, samples)
        results = cost_results(said, whole, tall, backend, gammas)
        shown = f"{points_markdown(results)}\n\n{projected_markdown(results)}"
    written = [] if check else write_cost(results, output_dir, json_file)
    console = Console()
    console.print(shown, markup=False, highlight=False, soft_wrap=True)
    console.print("written:", ", ".join(map(str, written)), highlight=False, soft_wrap=True)


if __name__ == "__main__":
    app()
