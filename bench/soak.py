"""Endurance: random requests and faults; identity with plain decoding, memory that stays flat."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from xspec_runtime.cli import Command, run_cli
from xspec_runtime.soak.bench import ENGINES
from xspec_runtime.soak.report import summary
from xspec_runtime.soak.run import SoakOptions, one_thread, run_soak

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def run(options: SoakOptions) -> None:
    """Run; what an interrupted run has done is written and shown."""
    console = Console()
    one_thread()
    results = run_soak(options, console)
    for line in summary(results):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if not results["complete"]:
        raise KeyboardInterrupt(f"after {results['requests']} requests, which are written")
    if results["wrong"] or results["memory"]["flat"] is False:
        raise RuntimeError(f"the soak of seed {options.seed} failed")


@app.command(cls=Command)
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
    debug: Annotated[bool, typer.Option(help="Show tracebacks.")] = False,
) -> None:
    """Send random requests and faults to decoders; check answers, and that memory stays flat."""
    command = " ".join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]])
    options = SoakOptions(command, minutes, requests, seed, engines, json_file)
    run_cli(lambda: run(options), debug)


if __name__ == "__main__":
    app()
