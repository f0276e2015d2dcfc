"""Plots of an evaluation: tokens per verify by rows and training answers, acceptance by depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..plots import OTHERS, OURS, PLAIN, SPARE, draw_plots, new_figure, save_figure
from ..replay.tally import mean_range
from .report import lines_of

COLORS = (OURS, "#D55E00", "#009E73", "#CC79A7", "#E69F00", *SPARE, OTHERS)
DEPTHS = 16
DEPTH_ROWS = 16


def draw_evaluation(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """Tokens per verify by rows and by training answers, acceptance by depth; see `draw_plots`."""
    rows = partial(draw_lines, "verify", "rows of a verify")
    sizes = partial(draw_lines, "size", "answers learned from")
    return draw_plots(results, folder, rows=rows, training_size=sizes, depths=draw_depths)


def draw_lines(part: str, label: str, results: Mapping[str, Any], path: Path) -> bool:
    """Tokens per verify, a color a drafter, a band from the least to the greatest fold; dotted
    where it does not learn, dashed where the draft is hidden.

    Returns:
        False, with nothing drawn, where no drafter was measured at two places.
    """
    lines = {
        name: line
        for name, line in lines_of(results, part).items()
        if not next(iter(line.values()))[0]["left_out"]
    }
    if all(len(line) < 2 for line in lines.values()):
        return False
    figure, axes = new_figure(8.5, 4.6)
    for color, (name, line) in zip(_colors(lines), lines.items(), strict=True):
        columns = sorted(line)
        found = [mean_range(e["tokens_per_verify"] for e in line[c]) for c in columns]
        means = [f["mean"] for f in found]
        axes.plot(columns, means, _style(line), marker=".", color=color, label=name)
        low, high = ([f[end] for f in found] for end in ("min", "max"))
        axes.fill_between(columns, low, high, color=color, alpha=0.12, linewidth=0)
    if part == "verify":
        axes.set_xscale("log", base=2)
        columns = sorted({column for line in lines.values() for column in line})
        axes.set_xticks(columns, [str(column) for column in columns])
    axes.axhline(1, color=PLAIN, linewidth=0.8)
    axes.set_ylim(bottom=0)
    axes.set_xlabel(label)
    axes.set_ylabel("tokens per verify")
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return save_figure(figure, path)


def draw_depths(results: Mapping[str, Any], path: Path) -> bool:
    """Share of verifies that accept at each depth what is proposed there, chains at their length
    and trees at 16 rows, or the next greater that was measured.

    Returns:
        False, with nothing drawn, where nothing was measured.
    """
    lines, styles = {}, {}
    for name, line in lines_of(results, "verify").items():
        styles[name] = _style(line)
        entries = line[min(line, key=lambda rows: (rows < DEPTH_ROWS, abs(rows - DEPTH_ROWS)))]
        found = [entry["by_depth"] for entry in entries if entry["by_depth"]]
        if found and not entries[0]["left_out"]:
            lines[name] = found
    if not lines:
        return False
    figure, axes = new_figure(8.5, 4.2)
    for color, (name, found) in zip(_colors(lines), lines.items(), strict=True):
        depths = range(min(DEPTHS, max(map(len, found))))
        means = [mean_range(f[d] if d < len(f) else None for f in found)["mean"] for d in depths]
        axes.plot([d + 1 for d in depths], [100 * m for m in means], styles[name], marker=".",
                  color=color, label=name)  # fmt: skip
    axes.set_ylim(0, 100)
    axes.set_xlabel("depth in the tree")
    axes.set_ylabel("accepted where all above was (%)")
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return save_figure(figure, path)


def _style(line: Mapping[int, Sequence[Mapping[str, Any]]]) -> str:
    entry = next(iter(line.values()))[0]
    if entry["hide_draft"]:
        return "--"
    return ":" if entry["learns"] and not entry["online"] else "-"


def _colors(lines: Mapping[str, Any]) -> Sequence[str]:
    """One color for all lines of a drafter."""
    drafters = list(dict.fromkeys(name.split(", ")[0] for name in lines))
    return [COLORS[drafters.index(name.split(", ")[0]) % len(COLORS)] for name in lines]
