"""Tables, in Markdown and in the terminal."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

Row = Sequence[str]


def shown(form: str, value: Any) -> str:
    """`value` in a form as of `str.format`; a dash where there is none."""
    return "-" if value is None else form.format(value)


def markdown(titles: Row, rows: Iterable[Row]) -> str:
    """A table in Markdown whose first column is text, without a newline at its end."""
    rule = ["---", *["---:"] * (len(titles) - 1)]
    safe = ([cell.replace("|", "\\|") for cell in row] for row in rows)
    return "\n".join("| " + " | ".join(row) + " |" for row in (titles, rule, *safe))


def terminal_table(
    titles: Row, rows: Iterable[Row], text: Collection[int] = (0,), **look: Any
) -> Table:
    """A table for a terminal (rich).

    Args:
        text: columns of words; the others are figures.
        look: of rich, as `title` and `caption`.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(
        title_justify="left", caption_justify="left", box=SIMPLE_HEAD, pad_edge=False, **look
    )
    for i, title in enumerate(titles):
        table.add_column(title, justify="left" if i in text else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def print_wide(console: Console, table: Table, **look: bool) -> None:
    """Print a table at its full width, also where output goes to a narrow log; `look` as of rich's
    `print`.
    """
    from rich.measure import Measurement

    unbounded = console.options.update(max_width=1000)
    table.width = Measurement.get(console, unbounded, table).maximum
    console.print(table, soft_wrap=True, **look)
