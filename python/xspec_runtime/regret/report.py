"""The tables of a regret run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

CLOCK = ("arm", "slower samples", "slower runs", "median time", "worst sample", "speedup")
COUNTED = ("v(M)", "drafter", "policy", "rows", "cost a token", "worst loss", "of", "slower")


def clock_table(results: Mapping[str, Any]) -> Table:
    """Times of the embedded pair, relative to plain decoding."""
    config = results["config"]
    title = f"{config['samples']} scenes, {config['repeats']} repeats"
    table = _table(title, CLOCK, 1, _clock_note(results))
    for row in _clock_rows(results):
        table.add_row(*row)
    return table


def clock_markdown(results: Mapping[str, Any]) -> str:
    """The same for a document."""
    lines = [CLOCK, ("---", *["---:"] * (len(CLOCK) - 1)), *_clock_rows(results)]
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), "", _clock_note(results)])


def _clock_note(results: Mapping[str, Any]) -> str:
    low, high = results["plain_ratio"]["samples"]
    return (
        "Time relative to plain decoding of the same sample; a sample is slower where its median "
        f"exceeds that of plain decoding against itself ({low:.3f}-{high:.3f}, 95 %)."
    )


def _clock_rows(results: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    for arm in results["arms"]:
        yield (
            arm["name"],
            f"{arm['slower_samples']:.0%}",
            f"{arm['slower_runs']:.0%}",
            f"{arm['median_ratio']:.3f}",
            f"{arm['worst_sample']:.3f}",
            f"{arm['speedup']:.2f}x",
        )


def counted_table(results: Mapping[str, Any]) -> Table:
    """Costs of recorded answers, in steps of plain decoding."""
    table = _table(
        "Recorded answers in counted cost", COUNTED, 3,
        "Plain decoding costs 1 a token. Worst loss: the most an answer ever lay behind plain "
        "decoding, in its steps, and what one verify of the tallest tree would lose.",
    )  # fmt: skip
    for entry in results["counted"]:
        table.add_row(
            entry["table"],
            entry["drafter"],
            entry["policy"],
            str(entry["rows"]),
            f"{entry['cost']:.3f}",
            f"{entry['worst']:.2f}",
            f"{entry['surplus']:.2f}",
            f"{entry['slower']:.0%}",
        )
    return table


def _table(title: str, columns: tuple[str, ...], named: int, caption: str) -> Table:
    """An empty table whose first `named` columns are text."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left",
                  box=SIMPLE_HEAD, pad_edge=False)  # fmt: skip
    for number, name in enumerate(columns):
        table.add_column(name, justify="left" if number < named else "right", no_wrap=True)
    return table
