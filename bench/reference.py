"""docs/api.md and docs/commands.md, written from docstrings and from the commands' own help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from xspec_runtime.cli import command
from xspec_runtime.files import check_output, read_text, write_text
from xspec_runtime.reference.api import api_markdown
from xspec_runtime.reference.commands import commands_markdown

ROOT = Path(__file__).resolve().parent.parent
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def build(folder: Path, check: bool) -> None:
    """Write the pages, or raise unless they are up to date."""
    pages = {"api.md": api_markdown, "commands.md": lambda: commands_markdown(ROOT / "bench")}
    for name, page in pages.items():
        file = folder / name
        if not check:
            check_output(file)
            write_text(file, page())
        elif read_text(file) != page():
            raise ValueError(f"{file} is not up to date; run bench/reference.py")


@command(app)
def main(
    folder: Annotated[Path, typer.Option(help="Folder of the pages.")] = ROOT / "docs",
    check: Annotated[bool, typer.Option(help="Only say whether they are up to date.")] = False,
) -> None:
    """Write the reference pages of the API and of the commands."""
    build(folder, check)


if __name__ == "__main__":
    app()
