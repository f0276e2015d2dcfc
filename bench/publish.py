"""Committed results -> the tables of README.md, between their markers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated

import typer
from xspec_runtime.replay import replay_markdown
from xspec_runtime.report import markdown_table

from xspec_runtime.cli import run_cli
from xspec_runtime.files import write_text

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
TABLES = {"e2e": ("e2e_cpu.json", markdown_table), "replay": ("replay.json", replay_markdown)}


def publish(readme: Path, check: bool) -> None:
    """Rewrite the text between ``<!-- table: NAME -->`` and ``<!-- end -->``."""
    text = before = readme.read_text(encoding="utf-8")
    for name, (file, render) in TABLES.items():
        results = json.loads((RESULTS / file).read_text(encoding="utf-8"))
        block = (
            f"<!-- table: {name} -->\n{_source(file, results)}\n\n{render(results)}\n<!-- end -->"
        )
        pattern = rf"<!-- table: {name} -->.*?<!-- end -->"
        text, found = re.subn(pattern, lambda _, b=block: b, text, flags=re.S)
        if found != 1:
            raise ValueError(
                f"{readme} must hold the markers of table {name!r} once, found {found}"
            )
    if check and text != before:
        raise ValueError(f"{readme} is not what bench/publish.py makes of bench/results; run it")
    if not check:
        write_text(readme, text)


def _source(file: str, results: dict) -> str:
    env = results["environment"]
    machine = env.get("gpu") or f"{env.get('cpu')}, {env.get('threads')} threads"
    return (
        f"Measured: `{results['command']}` on {machine}; torch {env['torch']}, transformers "
        f"{env['transformers']}, commit {env['commit']} ([raw](bench/results/{file}))."
    )


def main(
    readme: Annotated[Path, typer.Option(help="File to rewrite.")] = ROOT / "README.md",
    check: Annotated[bool, typer.Option(help="Only say whether the file is up to date.")] = False,
) -> None:
    """Put the committed results into the README."""
    run_cli(lambda: publish(readme, check))


if __name__ == "__main__":
    typer.run(main)
