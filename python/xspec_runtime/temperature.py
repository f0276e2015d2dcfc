"""Acceptance by temperature: the same arms, sampling at one temperature after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import Any

from .arms import Arm
from .measure import Sample, summarize
from .plots import PLAIN as GRAY
from .plots import SPARE, new_figure, save_figure
from .workloads import PLAIN, Workload
from .workloads.modes import DRAFT_ALONE

DEFAULT_ARMS = (PLAIN, "draft", "ngram_tree", "tree")
FIGURES = (
    *("acceptance_rate", "tokens_per_verify", "speedup_total", "identical", "samples", "tokens"),
)
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", *SPARE)


def parse_temperatures(text: str) -> list[float]:
    """Numbers separated by commas.

    Raises:
        ValueError: one is no number in 0..10, or named twice; it says so of ``--temperature``.
    """
    found: list[float] = []
    for name in filter(None, (part.strip() for part in text.split(","))):
        try:
            value = float(name)
        except ValueError:
            value = -1.0
        if not isfinite(value) or not (value == 0 or 1e-3 <= value <= 10):
            raise ValueError(f"--temperature must be 0 or numbers in 0.001..10, got {name!r}")
        if value in found:
            raise ValueError(f"--temperature names {name} more than once")
        found.append(value)
    return found


def check_sampling(names: Sequence[str]) -> None:
    """Raise `ValueError` if an arm of `names` cannot sample as ours do."""
    for name in names:
        if name.startswith("hf_") or name == DRAFT_ALONE:
            raise ValueError(f"--temperature: the arm {name!r} is greedy here; leave it out")


def sampling(workload: Workload, temperature: float, seed: int) -> Workload:
    """`workload` with arms that sample, every one with the same draws."""

    def at(make: Callable[[], Arm]) -> Callable[[], Arm]:
        def made() -> Arm:
            arm = make()
            decoder = arm.decoder
            decoder.config = replace(decoder.config, temperature=temperature, seed=seed)
            return arm

        return made

    return replace(workload, arms={name: at(make) for name, make in workload.arms.items()})


def temperature_rows(
    runs: Sequence[tuple[float, list[Sample]]], names: Sequence[str], workload: Workload
) -> list[dict[str, Any]]:
    """A row an arm and temperature, for a result file; `as_first` counts the answers that are those
    of the first temperature.
    """
    rows = []
    first = {(s.arm, s.task): s.outcome.tokens for s in runs[0][1]}
    for temperature, samples in runs:
        same = [s.arm for s in samples if s.outcome.tokens == first.get((s.arm, s.task))]
        for arm in summarize(samples, names, workload, {}, "")["arms"]:
            figures = {key: arm[key] for key in FIGURES}
            rows.append({"temperature": temperature, "arm": arm["name"], **figures})
            rows[-1]["as_first"] = same.count(arm["name"])
    return rows


def add_temperatures(
    results: dict,
    runs: Sequence[tuple[float, list[Sample]]],
    planned: Sequence[float],
    names: Sequence[str],
    workload: Workload,
) -> None:
    """Add the rows of `runs` to a result file, and whether all that was `planned` is there."""
    results["temperatures"] = temperature_rows(runs, names, workload)
    whole = sum(len(samples) == len(runs[0][1]) for _, samples in runs)
    if results["complete"] and whole < len(planned):
        results["complete"] = False
        results["config"]["interrupted"] = f"after {whole} of {len(planned)} temperatures"


def draw_temperatures(results: Mapping[str, Any], path: Path) -> bool:
    """Acceptance and tokens per verify by temperature, one line an arm.

    Returns:
        False, with nothing drawn, where no arm drafted.
    """
    rows = [r for r in results.get("temperatures", ()) if r["acceptance_rate"] is not None]
    if not rows:
        return False
    names = list(dict.fromkeys(row["arm"] for row in rows))
    figure, first = new_figure(8.0, 3.2)
    first.remove()
    axes = figure.subplots(1, 2)
    panels = (("acceptance_rate", 100, "accepted of drafted tokens (%)"),
              ("tokens_per_verify", 1, "tokens per verify"))  # fmt: skip
    for panel, (key, scale, title) in zip(axes, panels, strict=True):
        panel.spines[["top", "right"]].set_visible(False)
        for name, color in zip(names, _COLORS, strict=False):
            own = sorted((r["temperature"], scale * r[key]) for r in rows if r["arm"] == name)
            panel.plot(*zip(*own, strict=True), color=color, marker="o", linewidth=1.6, label=name)
        panel.set_title(title)
        panel.set_xlabel("temperature")
        panel.set_ylim(bottom=0)
        panel.grid(axis="y", color="#E5E5E5", linewidth=0.8)
    axes[1].axhline(1, color=GRAY, linewidth=1, linestyle="--")
    axes[0].legend(fontsize=9, frameon=False)
    return save_figure(figure, path)
