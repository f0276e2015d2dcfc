"""Endurance: random requests and faults; identity with plain decoding, memory that stays flat."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from xspec_runtime.cli import command, script_command
from xspec_runtime.soak.bench import ENGINES
from xspec_runtime.soak.report import summary
from xspec_runtime.soak.run import SoakOptions, run_soak

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def run(options: SoakOptions) -> None:
    """Run; what an interrupted run has done is written and shown."""
    console = Console()
    # The models are tiny: threads would wait for each other longer than they compute.
    torch.set_num_threads(1)
    results = run_soak(options, console)
    for line in summary(results):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if not results["complete"]:
        raise KeyboardInterrupt(f"after {results['requests']} requests, which are written")
    if results["wrong"] or results["memory"]["flat"] is False:
        raise RuntimeError(f"the soak of seed {options.seed} failed")


@command(app)
def main(
    minutes: Annotated[float, typer.Option(help="Ends after so long.")] = SoakOptions.minutes,
    requests: Annotated[
        int, typer.Option(help="Ends after so many requests.")
    ] = SoakOptions.requests,
    seed: Annotated[int, typer.Option(help="The same one repeats a run, call by call.")] = 0,
    engines: Annotated[
        str, typer.Option(help="Decoders that take turns, comma-separated.")
    ] = ",".join(ENGINES),
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the results here.")
    ] = None,
) -> None:
    """Send random requests and faults to decoders; check answers, and that memory stays flat."""
    run(SoakOptions(script_command(), minutes, requests, seed, engines, json_file))


if __name__ == "__main__":
    app()
