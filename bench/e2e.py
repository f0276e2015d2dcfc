"""End to end: plain decoding, transformers' own arms and ours, interleaved on the same prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from xspec_runtime.cli import Command, run_cli, script_command
from xspec_runtime.e2e import Options, run_e2e

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
LESS_MEMORY = "lower --rows, --gamma or --max-new-tokens, or take --dtype bfloat16"


def run(options: Options) -> None:
    """Run; an interrupted run has written the samples it finished."""
    results = run_e2e(options)
    if not results["complete"]:
        raise KeyboardInterrupt(f"{results['config']['interrupted']}, which are written")


@app.command(cls=Command)
def main(
    gamma: Annotated[int, typer.Option(help="Draft tokens of a chain.")] = 5,
    rows: Annotated[int, typer.Option(help="Rows of the merged tree, root included.")] = 16,
    arms: Annotated[
        str,
        typer.Option(
            help="Comma-separated arms; empty runs all but draft_alone, parallel_prefill, "
            "self_nf4, self_skip and cascade."
        ),
    ] = "",
    samples: Annotated[int, typer.Option(help="Test scenes.")] = 24,
    warmup: Annotated[int, typer.Option(help="Samples run once more before, uncounted.")] = 2,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 128,
    target: Annotated[str, typer.Option(help="'mini' or a folder with a causal LM.")] = "mini",
    draft: Annotated[
        str, typer.Option(help="'draft', 'draft_raw' (mini), or a model's folder.")
    ] = "",
    middle: Annotated[
        str, typer.Option(help="Folder of the cascade's middle model; default: the target in NF4.")
    ] = "",
    prompts: Annotated[
        Path | None, typer.Option(help="Prompts of a text target, one a line.")
    ] = None,
    questions: Annotated[
        Path | None, typer.Option(help="Questions of the pair, one a line.")
    ] = None,
    events: Annotated[
        Path | None, typer.Option(help="Event stream (.npy) instead of scenes.")
    ] = None,
    video: Annotated[Path | None, typer.Option(help="Video that goes with --events.")] = None,
    dataset_dir: Annotated[
        Path | None, typer.Option(help="Clips in the DSEC layout instead of scenes.")
    ] = None,
    duration: Annotated[str, typer.Option(help="Which of several datasets: 1s, 2s, ...")] = "",
    overlap: Annotated[
        str,
        typer.Option(
            help="Count from the video file on, the draft's text in the window, concurrent, off, "
            "or several of them. Default: window with --video. Scenes are written to files first."
        ),
    ] = "",
    engine: Annotated[
        str, typer.Option(help="The target's kernels: transformers' own, or llama for ours.")
    ] = "transformers",
    weights: Annotated[
        str, typer.Option(help="float as they are stored, or nf4: every model in 4 bits.")
    ] = "float",
    prefill_fused: Annotated[
        str, typer.Option(help="Drafts in the target's prefill: off, exact or fast.")
    ] = "exact",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:0, ...")] = "cpu",
    target_device: Annotated[str, typer.Option(help="The target's, if another.")] = "",
    draft_device: Annotated[str, typer.Option(help="The draft's, if another.")] = "",
    adapters: Annotated[
        Path | None,
        typer.Option(help="Folder of `xspec train` runs; each level there is an arm more."),
    ] = None,
    adapter_level: Annotated[
        str,
        typer.Option(
            help="Only these levels: TOKEN, PREFIX, L1 to L5, L5F, L6, L6HEAD, B1, EAGLE, "
            "comma-separated; L4+B1: two phases, TREE+L4: merged with memory."
        ),
    ] = "",
    adapter: Annotated[
        str, typer.Option(help="Of several runs of a level: latest or starred; default: starred.")
    ] = "",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    backend: Annotated[str, typer.Option(help="auto, torch, triton or cuda.")] = "auto",
    seed: Annotated[int, typer.Option(help="Selects the test scenes, and the draws.")] = 0,
    temperature: Annotated[
        str,
        typer.Option(help="Sample at these, as 0,0.3,0.7,1: acceptance by temperature, plotted."),
    ] = "",
    threads: Annotated[
        int, typer.Option(help="CPU threads; 0: one for the pair, torch's choice otherwise.")
    ] = 0,
    output_dir: Annotated[Path, typer.Option(help="Folder for results and plots.")] = Path(
        "results/e2e"
    ),
    json_file: Annotated[Path | None, typer.Option("--json", help="Copy of results.json.")] = None,
    trace: Annotated[Path | None, typer.Option(help="JSON lines, one a round.")] = None,
    debug: Annotated[bool, typer.Option(help="Show tracebacks.")] = False,
) -> None:
    """Compare lossless decoding arms; writes results.json, RESULTS.md and plots."""
    command = script_command()
    values = {k: v for k, v in locals().items() if k not in ("debug", "json_file", "json")}
    run_cli(lambda: run(Options(json_file=json_file, **values)), debug, LESS_MEMORY)


if __name__ == "__main__":
    app()
