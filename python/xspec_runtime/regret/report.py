"""The tables of a regret run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ..tables import markdown, terminal_table

if TYPE_CHECKING:
    from rich.table import Table

CLOCK = ("arm", "slower samples", "slower runs", "median time", "worst sample", "speedup")
COUNTED = ("v(M)", "drafter", "policy", "rows", "cost a token", "worst loss", "of", "slower")


def clock_table(results: Mapping[str, Any]) -> Table:
    """Times of the embedded pair, relative to plain decoding."""
    config = results["config"]
    title = f"{config['samples']} scenes, {config['repeats']} repeats"
    return terminal_table(CLOCK, _clock_rows(results), title=title, caption=_clock_note(results))


def clock_markdown(results: Mapping[str, Any]) -> str:
    """The same for a document."""
    return f"{markdown(CLOCK, _clock_rows(results))}\n\n{_clock_note(results)}"


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
    rows = [
        [
            entry["table"], entry["drafter"], entry["policy"], str(entry["rows"]),
            f"{entry['cost']:.3f}", f"{entry['worst']:.2f}", f"{entry['surplus']:.2f}",
            f"{entry['slower']:.0%}",
        ]
        for entry in results["counted"]
    ]  # fmt: skip
    caption = (
        "Plain decoding costs 1 a token. Worst loss: the most an answer ever lay behind plain "
        "decoding, in its steps, and what one verify of the tallest tree would lose."
    )
    title = "Recorded answers in counted cost"
    return terminal_table(COUNTED, rows, range(3), title=title, caption=caption)
