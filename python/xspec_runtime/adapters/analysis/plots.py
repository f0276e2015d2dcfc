"""Plots of an analysis: cosine and token, acceptance by predicted features, the gap in parts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...plots import OTHERS, OURS, PLAIN, SPARE, draw_plots, new_figure, save_figure
from .report import PARTS

COLORS = (OURS, "#D55E00", "#009E73", "#CC79A7", "#E69F00", *SPARE)
PART_COLORS = dict(zip(PARTS, (OTHERS, "#56B4E9", OURS, "#E69F00", "#E5E5E5"), strict=True))


def draw_analysis(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """All three, see `draw_plots`."""
    return draw_plots(results, folder, cosine_match=draw_cosines, predicted_features=draw_alphas,
                      gap=draw_gap)  # fmt: skip


def draw_cosines(results: Mapping[str, Any], path: Path) -> bool:
    """By cosine: the share of states above it, how many of their tokens are right, and dashed how
    many of the other states'.
    """
    figure, panels = new_figure(9, 3.6, 1, 2)
    above, right = panels.flat
    for color, (level, entry) in zip(_colors(results), results["levels"].items(), strict=True):
        curve = entry["shown"]["curve"]
        taus = [point["tau"] for point in curve]
        for axes, key, style in ((above, "share", "-"), (right, "token_match", "-"),
                                 (right, "token_match_below", "--")):  # fmt: skip
            values = [float("nan") if p[key] is None else 100 * p[key] for p in curve]
            axes.plot(taus, values, style, marker=".", color=color, label=level)
    above.set_title("states above it", fontsize=10)
    right.set_title("tokens right of these; dashed: of the others", fontsize=10)
    for axes in panels.flat:
        axes.set_ylim(-3, 103)
        axes.tick_params(labelleft=True)
    figure.supxlabel("cosine with the target's state", fontsize=10)
    figure.supylabel("%", fontsize=10)
    figure.legend(*above.get_legend_handles_labels(), loc="outside right upper",
                  fontsize=8, frameon=False)  # fmt: skip
    return save_figure(figure, path)


def draw_alphas(results: Mapping[str, Any], path: Path) -> bool:
    """n-alpha by n; dashed where the draft is hidden."""
    figure, axes = new_figure(7, 3.8)
    for color, (level, entry) in zip(_colors(results), results["levels"].items(), strict=True):
        for name, style in (("shown", "-"), ("hidden", "--")):
            points = entry.get(name, {}).get("alpha", [])
            values = [float("nan") if p["alpha"] is None else 100 * p["alpha"] for p in points]
            axes.plot([p["n"] for p in points], values, style, marker=".", color=color,
                      label=level if name == "shown" else None)  # fmt: skip
    axes.set_xticks(range(results["gamma"]))
    axes.set_ylim(0, 103)
    axes.set_xlabel("predicted features before the draft, n (L1 to L5, EAGLE: place in the chain)")
    axes.set_ylabel("accepted (%), dashed: draft hidden")
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return save_figure(figure, path)


def draw_gap(results: Mapping[str, Any], path: Path) -> bool:
    """Parts of 100 % as bars, losses to the left of zero.

    Returns:
        False, with nothing drawn, where no position was compared.
    """
    levels = results["gap"]["levels"]
    if not levels:
        return False
    figure, axes = new_figure(8, 1.2 + 0.45 * len(levels))
    for row, parts in enumerate(levels.values()):
        gained = lost = 0.0
        for key, color in PART_COLORS.items():
            value = 100 * (parts.get(key) or 0.0)
            axes.barh(row, value, 0.6, left=gained if value >= 0 else lost, color=color)
            gained, lost = gained + max(value, 0), lost + min(value, 0)
    axes.axvline(0, color=PLAIN, linewidth=0.8)
    axes.set_yticks(range(len(levels)), list(levels))
    axes.invert_yaxis()
    axes.set_xlabel(f"% of {results['gap']['positions']:,} tokens, single steps from true states")
    handles = [axes.barh(0, 0, color=color) for color in PART_COLORS.values()]
    figure.legend(handles, PARTS.values(), loc="outside upper left", ncols=3, fontsize=8,
                  frameon=False)  # fmt: skip
    return save_figure(figure, path)


def _colors(results: Mapping[str, Any]) -> tuple[str, ...]:
    return (COLORS * len(results["levels"]))[: len(results["levels"])]
