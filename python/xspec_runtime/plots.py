"""Plots of an end-to-end run: speedups, accepted tokens per round, a timeline of one sample; and of
what a verify costs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import replace_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

# Okabe and Ito's colors, told apart by color-blind readers.
OURS, PLAIN, OTHERS = "#0072B2", "#333333", "#A6A6A6"
PHASES = {
    "prefill": "#A6A6A6",
    "video": "#56B4E9",
    "draft text": "#F0E442",
    "begin": "#CC79A7",
    "propose": "#E69F00",
    "forward": "#0072B2",
    "verify": "#0072B2",
    "accept": "#D55E00",
    "commit": "#009E73",
}
SPARE = ("#000000", "#8C6D31", "#7F3C8D", "#80BA5A")
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "figure.dpi": 150,
}


def draw_plots(
    results: Mapping[str, Any], folder: Path, **plots: Callable[[Mapping[str, Any], Path], bool]
) -> list[Path]:
    """Draw those of `plots`, by the names of their files, that the results hold data for; returns
    the files. Without matplotlib there are none.
    """
    try:
        files = {folder / f"{name}.png": draw for name, draw in plots.items()}
        return [file for file, draw in files.items() if draw(results, file)]
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        return []


def draw_all(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """The plots of an end-to-end run, see `draw_plots`."""
    plots = {"speedups": draw_speedups, "histogram": draw_histogram, "timeline": draw_timeline}
    if results.get("temperatures"):
        from .temperature import draw_temperatures

        plots["temperature"] = draw_temperatures
    return draw_plots(results, folder, **plots)


def draw_speedups(results: Mapping[str, Any], path: Path) -> bool:
    """Bars of the speedup against ``target``: the whole request, and thinner the decode phase.

    Returns:
        False, with nothing drawn, where no arm has a speedup.
    """
    arms = results["arms"]
    if all(arm["speedup_total"] is None for arm in arms):
        return False
    figure, axes = new_figure(7.5, 0.9 + 0.5 * len(arms))
    axes.axvline(1, color=PLAIN, linewidth=1, linestyle="--")
    for row, arm in enumerate(arms):
        color, hatch = _look(arm["name"])
        total, decode = arm["speedup_total"], arm["speedup_decode"]
        solid = {"color": color, "hatch": hatch, "edgecolor": "white", "linewidth": 0, "zorder": 2}
        axes.barh(row - 0.1, total or 0, 0.46, **solid)
        _value(axes, total or 0, row - 0.1, "-" if total is None else f"{total:.2f}x", 9)
        if decode is not None:
            axes.barh(row + 0.25, decode, 0.18, color=color, alpha=0.45, linewidth=0, zorder=2)
            _value(axes, decode, row + 0.25, f"{decode:.2f}x", 7)
    axes.set_yticks(range(len(arms)), [arm["name"] for arm in arms])
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.margins(x=0.08)
    axes.set_xlabel("speedup of summed times against target (x)")
    _legend(axes, _speedup_entries([arm["name"] for arm in arms]))
    return save_figure(figure, path)


def _value(axes: Axes, x: float, y: float, label: str, size: int) -> None:
    """A figure at the end of a bar, on a white ground so that no line crosses it."""
    axes.annotate(
        label,
        (x, y),
        (4, 0),
        textcoords="offset points",
        va="center",
        fontsize=size,
        color=PLAIN,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
    )


def _speedup_entries(names: list[str]) -> list[tuple[str, dict[str, Any]]]:
    looks = {_look(name)[0] for name in names}
    entries: list[tuple[str, dict[str, Any]]] = []
    if OURS in looks:
        entries.append(("ours", {"color": OURS}))
    if OTHERS in looks:
        hatched = {"facecolor": OTHERS, "hatch": "///", "edgecolor": "white"}
        entries.append(("transformers", hatched))
    return [*entries, ("thin: decode phase alone", {"color": PLAIN, "alpha": 0.45})]


def draw_histogram(results: Mapping[str, Any], path: Path) -> bool:
    """Share of rounds by accepted draft tokens, one panel an arm, on common axes.

    Returns:
        False, with nothing drawn, where no arm has a histogram.
    """
    counted = [arm for arm in results["arms"] if sum((arm["accept_histogram"] or {}).values())]
    if not counted:
        return False
    longest = max(int(key) for arm in counted for key in arm["accept_histogram"])
    columns = len(counted) if len(counted) <= 4 else 3
    rows = -(-len(counted) // columns)
    figure, grid = new_figure(3.0 * columns + 0.6, 2.2 * rows + 0.6, rows, columns)
    panels = list(grid.flat)
    for axes, arm in zip(panels, counted, strict=False):
        _histogram_panel(axes, arm, longest)
    for axes in panels[len(counted) :]:
        axes.set_visible(False)
    figure.supxlabel("accepted draft tokens in a round", fontsize=10)
    figure.supylabel("share of rounds (%)", fontsize=10)
    return save_figure(figure, path)


def _histogram_panel(axes: Axes, arm: Mapping[str, Any], longest: int) -> None:
    histogram = {int(key): count for key, count in arm["accept_histogram"].items()}
    rounds = sum(histogram.values())
    shares = [100 * histogram.get(accepted, 0) / rounds for accepted in range(longest + 1)]
    mean = sum(accepted * count for accepted, count in histogram.items()) / rounds
    bars = axes.bar(range(longest + 1), shares, 0.8, color=_look(arm["name"])[0])
    if longest <= 8:
        labels = [f"{share:.0f}" if share >= 0.5 else "" for share in shares]
        axes.bar_label(bars, labels, fontsize=8, padding=1)
    axes.set_title(f"{arm['name']}: mean {mean:.2f} of {rounds:,.0f} rounds", fontsize=9)
    axes.set_xticks(range(0, longest + 1, 1 if longest <= 8 else -(-longest // 8)))
    axes.tick_params(labelbottom=True)
    axes.margins(y=0.12)


def draw_timeline(results: Mapping[str, Any], path: Path) -> bool:
    """Phases of one sample in time, a lane an arm.

    Returns:
        False, with nothing drawn, where no arm has a timeline.
    """
    arms = [arm for arm in results["arms"] if arm.get("timeline")]
    if not arms:
        return False
    colors = _phase_colors([span["name"] for arm in arms for span in arm["timeline"]])
    figure, axes = new_figure(9, 1.2 + 0.45 * len(arms))
    for lane, arm in enumerate(arms):
        beside = any(span.get("beside") for span in arm["timeline"])
        for span in arm["timeline"]:
            # What ran beside the rest has the lower half of the lane.
            low, height = (
                (lane, 0.32) if span.get("beside") else (lane - 0.32, 0.64 - 0.32 * beside)
            )
            width = span["end_ms"] - span["start_ms"]
            axes.broken_barh(
                [(span["start_ms"], width)], (low, height), color=colors[span["name"]], lw=0
            )
        end = max(span["end_ms"] for span in arm["timeline"])
        _value(axes, end, lane, f"{end:,.0f} ms", 9)
    axes.set_yticks(range(len(arms)), [arm["name"] for arm in arms])
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("time since the request (ms), one sample")
    axes.margins(x=0.08)
    axes.set_xlim(left=0)
    _legend(axes, [(name, {"color": color}) for name, color in colors.items()])
    return save_figure(figure, path)


def draw_verify(results: Mapping[str, Any], path: Path) -> bool:
    """v(M)/v(1) by rows, one line a backend, dashed for trees; a panel a prompt length and mode.

    Returns:
        False, with nothing drawn, where no backend was timed at two numbers of rows.
    """
    from .verify_cost.report import groups

    lines = {key: rows for key, rows in groups(results).items() if len(rows) > 1}
    if not lines:
        return False
    prompts = sorted({prompt for prompt, *_ in lines})
    modes = sorted({mode for _, _, mode, _ in lines})
    names = list(dict.fromkeys(backend for _, backend, _, _ in lines))
    colors = dict(zip(names, (OURS, PLAIN, "#D55E00", "#009E73", *SPARE), strict=False))
    figure, grid = new_figure(3.4 * len(prompts) + 0.6, 2.6 * len(modes) + 0.8, len(modes),
                           len(prompts))  # fmt: skip
    for (prompt, backend, mode, shape), rows in lines.items():
        axes = grid[modes.index(mode)][prompts.index(prompt)]
        counts = sorted(rows)
        style = {"linestyle": "--" if shape == "tree" else "-", "marker": ".", "linewidth": 1.4}
        axes.plot(counts, [rows[m]["ratio"] for m in counts], color=colors[backend], **style)
        axes.set_title(f"{prompt:,} tokens, {mode}", fontsize=9)
        axes.set_xticks([m for m in (1, 16, 32, 48, 64) if m == 1 or m <= max(counts)])
    for axes in grid.flat:
        axes.set_ylim(bottom=0)
        axes.grid(axis="y", color="#E5E5E5", linewidth=0.8)
    figure.supxlabel("rows of the verify, M (dashed: trees)", fontsize=10)
    figure.supylabel("v(M) / v(1)", fontsize=10)
    entries = [(name, {"color": colors[name]}) for name in names]
    columns = min(len(entries), 2 * len(prompts))
    figure.legend(handles=_patches(entries), ncols=columns, fontsize=9, frameon=False,
                  loc="outside upper left")  # fmt: skip
    return save_figure(figure, path)


def _phase_colors(names: list[str]) -> dict[str, str]:
    """A color for each phase in order of first appearance; ``target.prefill`` counts as prefill."""
    colors: dict[str, str] = {}
    spare = iter(SPARE * len(names))
    for name in names:
        if name not in colors:
            colors[name] = PHASES.get(name.rsplit(".", 1)[-1]) or next(spare)
    return colors


def _look(name: str) -> tuple[str, str]:
    """Color and hatching of an arm: the plain target, an arm of transformers, or one of ours."""
    if name == "target":
        return PLAIN, ""
    return (OTHERS, "///") if name.startswith("hf_") else (OURS, "")


def _legend(axes: Axes, entries: list[tuple[str, dict[str, Any]]]) -> None:
    """One line of colored patches above the axes."""
    handles = _patches(entries)
    place = {"loc": "lower left", "bbox_to_anchor": (0, 1.0), "borderaxespad": 0.2}
    look = {"ncols": len(handles), "fontsize": 9, "columnspacing": 1.4, "frameon": False}
    axes.legend(handles=handles, **look, **place)


def _patches(entries: list[tuple[str, dict[str, Any]]]) -> list[Patch]:
    from matplotlib.patches import Patch

    return [Patch(label=label, linewidth=0, **look) for label, look in entries]


def new_figure(width: float, height: float, rows: int = 0, columns: int = 0) -> tuple[Figure, Any]:
    """A figure that needs no display; with ``rows`` a grid of axes on common scales."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        shared = {"sharex": True, "sharey": True, "squeeze": False}
        return figure, figure.subplots(rows, columns, **shared) if rows else figure.subplots()


def save_figure(figure: Figure, path: Path) -> bool:
    replace_file(path, lambda temporary: figure.savefig(temporary, format="png"))
    return True
