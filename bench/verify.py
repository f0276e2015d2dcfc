"""v(M): the time of a target forward over M rows, against one row and against the bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from xspec_runtime.cli import command, progress_bar, script_command
from xspec_runtime.tables import print_wide
from xspec_runtime.verify_cost.measure import run_verify
from xspec_runtime.verify_cost.options import VerifyOptions
from xspec_runtime.verify_cost.report import verify_table, write_verify

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def run(options: VerifyOptions) -> None:
    """Measure with a progress bar, write the files, print the table."""
    options.plan()
    with progress_bar("reading") as show:
        results = run_verify(options, show)
    paths = write_verify(results, options.output_dir, options.json_file)
    console = Console()
    print_wide(console, verify_table(results))
    for note in results["notes"]:
        console.print(note, highlight=False)
    console.print("written:", ", ".join(map(str, paths)), highlight=False, soft_wrap=True)
    if not results["complete"]:
        raise KeyboardInterrupt(f"{len(results['verify'])} rows are measured and written")


@command(app, "take a smaller --config, shorter --prompt-tokens, fewer --backends or bfloat16")
def main(
    config: Annotated[
        str, typer.Option(help="Shape: llama-7b, llama-3-8b, smollm2, mini, or a folder.")
    ] = "mini",
    rows: Annotated[
        str, typer.Option(help="Rows M, comma-separated; 1 always.")
    ] = VerifyOptions.rows,
    prompt_tokens: Annotated[
        str, typer.Option(help="Tokens in the KV cache, comma-separated.")
    ] = VerifyOptions.prompt_tokens,
    shapes: Annotated[str, typer.Option(help="chain, tree, or both.")] = VerifyOptions.shapes,
    backends: Annotated[
        str, typer.Option(help="Ours: auto, torch, triton, tight; transformers, packed, linear.")
    ] = "",
    modes: Annotated[str, typer.Option(help="eager, graph (CUDA only), or both.")] = "",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:0, ...")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "",
    repeats: Annotated[int, typer.Option(help="Visits to every pass, three calls each.")] = 10,
    seed: Annotated[int, typer.Option(help="Seed of weights, keys and trees.")] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads; 0: one for mini, or torch's.")] = 0,
    output_dir: Annotated[Path, typer.Option(help="Folder for results.json and the plot.")] = Path(
        "results/verify"
    ),
    json_file: Annotated[Path | None, typer.Option("--json", help="Copy of results.json.")] = None,
) -> None:
    """Measure v(M) of random weights in a model's shape; writes results.json and a plot."""
    values = locals()
    run(VerifyOptions(command=script_command(), **values))


if __name__ == "__main__":
    app()
