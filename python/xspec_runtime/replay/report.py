"""A replay's results as a table, in the terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..tables import shown, terminal_table

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = ("drafter", "rows", "memory", "tok/verify", "after 10", "accepted", "folds")
LEGEND = (
    "Tokens per verify after the given first token, means over the folds (ranges at the right); "
    '"after 10": the same over the verifies that start with 10 or more known tokens; online '
    "memories learn each answer once it is over."
)


def replay_table(results: Mapping[str, Any]) -> Table:
    """Results of schema ``xspec.replay/1`` for the terminal."""
    caption = LEGEND if results["complete"] else f"Interrupted. {LEGEND}"
    rows = map(_cells, results["replay"])
    return terminal_table(COLUMNS, rows, (0, 2), title=_title(results), caption=caption)


def replay_markdown(results: Mapping[str, Any]) -> str:
    """Results of schema ``xspec.replay/1`` as a Markdown table and its legend."""
    lines = [
        "| " + " | ".join(COLUMNS) + " |",
        "|---|---:|---|---:|---:|---:|---:|",
        *("| " + " | ".join(_cells(entry)) + " |" for entry in results["replay"]),
    ]
    return "\n".join([*lines, "", f"{_title(results)}. {LEGEND}"])


def _title(results: Mapping[str, Any]) -> str:
    config = results["config"]
    kind = "trained on another file" if config["train"] else f"{config['folds']} contiguous folds"
    return f"{config['samples']} recorded answers, {kind}"


def _cells(entry: Mapping[str, Any]) -> list[str]:
    spread = [fold["tokens_per_verify"] for fold in entry["folds"]]
    learns = "online" if entry["online"] else "static"
    return [
        entry["drafter"],
        str(entry["rows"]),
        learns if entry["drafter"].startswith("memory") else "-",
        f"{entry['tokens_per_verify']:.2f}",
        shown("{:.2f}", entry["after_10"]),
        shown("{:.1%}", entry["acceptance_rate"]),
        f"{min(spread):.2f}-{max(spread):.2f}" if len(spread) > 1 else "-",
    ]
