"""Plots of the cost model: projected speedups among measured arms, and modelled cards."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..plots import OTHERS, OURS, PLAIN, SPARE, new_figure, save_figure

CURVES = {"free_drafts": (OURS, "-"), "own_draft": ("#E69F00", "-")}
CURVES |= {"separate": ("#D55E00", ":"), "fused": ("#009E73", ":")}
TITLES = {
    "free_drafts": "rounds, drafts free",
    "own_draft": "rounds, with the draft model",
    "separate": "one verify before decoding",
    "fused": "the same inside the prefill",
}


def draw_cost(results: Mapping[str, Any], path: Path) -> bool:
    """Projected speedup by acceptance with the measured chains, a panel a chain length."""
    gammas = sorted({row["gamma"] for row in results["projected"]})
    figure, grid = new_figure(4.2 * len(gammas) + 0.6, 3.8, 1, len(gammas))
    for axes, gamma in zip(grid.flat, gammas, strict=True):
        rows = [row for row in results["projected"] if row["gamma"] == gamma]
        shares = [100 * row["acceptance"] for row in rows]
        for key, (color, style) in CURVES.items():
            axes.plot(shares, [row[key] for row in rows], style, color=color, label=TITLES[key])
        axes.axhline(results["ceiling"], color=OTHERS, linestyle="--", label="decoding for nothing")
        axes.axhline(1, color=PLAIN, linewidth=0.8)
        for point in results["points"]:
            if point["acceptance"] is not None and point["rows"] == gamma + 1:
                at = (100 * point["acceptance"], point["measured_speedup"])
                axes.plot(*at, "o", color=PLAIN, markersize=4)
                axes.annotate(point["arm"], at, (4, -3), textcoords="offset points", fontsize=7)
        axes.set_title(f"chains of {gamma}", fontsize=9)
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter("{x:g}x")
    figure.supxlabel("chance that one more draft token is right (%)", fontsize=10)
    figure.supylabel("speedup (curves: projected, dots: measured)", fontsize=10)
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, ncols=3, fontsize=8, frameon=False, loc="outside upper left")
    return save_figure(figure, path)


def draw_modelled(results: Mapping[str, Any], path: Path) -> bool:
    """v(M) over its floor by rows, a panel a card, with the range that launches leave open."""
    cards = list(results["cards"])
    figure, grid = new_figure(3.4 * len(cards) + 0.6, 3.6, 1, len(cards))
    lines = dict.fromkeys((r["weights"], r["prompt_tokens"]) for r in results["modelled"])
    colors = dict(zip(lines, (OURS, "#D55E00", "#009E73", "#E69F00", *SPARE), strict=False))
    for axes, card in zip(grid.flat, cards, strict=True):
        for (weights, prompt), color in colors.items():
            rows = [
                row
                for row in results["modelled"]
                if (row["card"], row["weights"], row["prompt_tokens"]) == (card, weights, prompt)
            ]
            counts = [row["rows"] for row in rows]
            label = f"{weights}, {prompt:,} tokens"
            axes.plot(counts, [r["modelled_floor_ratio"] for r in rows], ".-", color=color,
                      label=label)  # fmt: skip
            low, high = (
                [row[key] / row["modelled_floor_ms"] for row in rows]
                for key in ("modelled_least_ms", "modelled_most_ms")
            )
            axes.fill_between(counts, low, high, color=color, alpha=0.15, linewidth=0)
        axes.axhline(1, color=PLAIN, linewidth=0.8)
        axes.set_title(f"{results['cards'][card]['title']}: modelled", fontsize=9)
    figure.supxlabel("rows of the verify, M", fontsize=10)
    figure.supylabel("modelled v(M) / modelled floor", fontsize=10)
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, ncols=4, fontsize=8, frameon=False, loc="outside upper left")
    return save_figure(figure, path)
