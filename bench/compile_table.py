"""Machine code of every kernel of the verify path, per model and card, compiled without a GPU.

Entries whose source and compiler are unchanged are kept. Writes the table that the tests compare
with the present sources, and a page that shows it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from xspec_runtime.cli import command, progress_bar, script_command
from xspec_runtime.files import check_output, read_text, write_json, write_text
from xspec_runtime.gpu import compile_table

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "bench" / "results" / "compile_table.json"
PAGE = ROOT / "docs" / "compile_table.md"


def build(table: Path, page: Path, everything: bool) -> None:
    """Compile what is out of date, write table and page, name what breaks a limit."""
    for file in (table, page):
        check_output(file)
    old = compile_table.read_table(table) if table.exists() and not everything else None
    with progress_bar("reading") as show:
        made = compile_table.build_table(script_command(), old, show)
    write_json(table, made)
    write_text(page, compile_table.document(made))
    broken = [f"{e['kernel']} {e['model']} sm_{e['arch']} {fault}"
              for e in made["entries"] for fault in compile_table.faults(e)]  # fmt: skip
    if broken:
        raise ValueError("; ".join(broken))


def check_page(table: Path, page: Path) -> None:
    """Raise unless the page shows the table."""
    if read_text(page) != compile_table.document(compile_table.read_table(table)):
        raise ValueError(f"{page} does not show {table}; run bench/compile_table.py")


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@command(app)
def main(
    table: Annotated[Path, typer.Option(help="Table, JSON.")] = TABLE,
    page: Annotated[Path, typer.Option(help="The same to read, Markdown.")] = PAGE,
    everything: Annotated[bool, typer.Option("--all", help="Compile every entry anew.")] = False,
    check: Annotated[bool, typer.Option(help="Only compare the page with the table.")] = False,
) -> None:
    """Compile the kernels for cards that are not here."""
    if check:
        check_page(table, page)
    else:
        build(table, page, everything)


if __name__ == "__main__":
    app()
