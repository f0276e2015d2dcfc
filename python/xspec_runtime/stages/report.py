"""Five-stage results as RESULTS.md and a plot, in the form in which they were published."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..plots import new_figure, save_figure
from .clock import STAGES

_COLORS = ("#A6A6A6", "#56B4E9", "#E69F00", "#009E73", "#0072B2")
_TITLES = ("Data loading", "Preprocessing", "Vision encoding", "LLM prefill", "LLM decode")


def markdown(record: Mapping[str, Any], plots: Sequence[str]) -> str:
    """The page."""
    found, config = record["statistics"], record["config"]
    parallel, place = found["parallel"], record["environment"]
    lines = [
        f"# Five stages: {record['dataset_name']}",
        "",
        f"{found['n_samples']} samples, at most {config['max_new_tokens']} tokens, "
        f"{config['mode']}; {place['gpu'] or place['cpu']}, torch {place['torch']}, commit "
        f"{place['commit']}. Milliseconds, mean and standard deviation.",
        "",
        "| Stage | Description | EventGPT | Video-LLaVA | Ratio |",
        "|---|---|---|---|---|",
    ]
    for i, title in enumerate((*_TITLES, "End to end"), 1):
        key = f"stage{i}_time" if i <= len(STAGES) else "total_time"
        draft, target = (_pair(found[model], key) for model in ("eventgpt", "videollava"))
        ratio = f"{target[0] / draft[0]:.1f}x" if draft[0] else "-"
        label = f"Stage {i}" if i <= len(STAGES) else "**Total**"
        lines.append(f"| {label} | {title} | {_ms(draft)} | {_ms(target)} | {ratio} |")
    measured = parallel["hidden_tokens_measured_avg"]
    kind = record["results"][0]["parallel"]["wall_clock_is"]
    lines += [
        "",
        "| | |",
        "|---|---|",
        f"| tokens at the same place | {found['matched_tokens_total']} of "
        f"{found['total_tokens_compared']}, per sample {100 * found['acceptance_rate_avg']:.2f} "
        f"+- {100 * found['acceptance_rate_std']:.2f} % |",
        f"| accepted before the first miss | {found['accepted_prefix_avg']:.2f} tokens |",
        f"| window before the target's first token, computed | "
        f"{1e3 * parallel['overlap_window_avg']:.1f} ms |",
        f"| draft tokens in it, computed | {parallel['hidden_tokens_avg']:.1f} |",
        f"| draft tokens in it, measured | {'-' if measured is None else f'{measured:.1f}'} |",
        f"| both models at once, {kind} | {1e3 * parallel['wall_clock_total_avg']:.1f} ms |",
        f"| one after the other | {1e3 * parallel['sequential_total_avg']:.1f} ms |",
        f"| the latter over the former (published as parallel speedup) | "
        f"{parallel['parallel_speedup_avg']:.2f}x |",
        f"| **against the target alone** | **{parallel['speedup_against_target_alone']:.2f}x** |",
        "",
    ]
    if record["errors"]:
        lines += [f"{len(record['errors'])} samples failed: {record['errors'][0]['error']}", ""]
    lines += [f"![{name}]({name})" for name in plots]
    return "\n".join(lines) + "\n"


def draw(record: Mapping[str, Any], folder: Path) -> list[Path]:
    """stages.png: both models' stages on one time axis; acceptance.png: the shares that match."""
    paths = folder / "stages.png", folder / "acceptance.png"
    figure, axes = new_figure(7, 2.6)
    for row, model in enumerate(("eventgpt", "videollava")):
        left = 0.0
        for i, (title, color) in enumerate(zip(_TITLES, _COLORS, strict=True), 1):
            width = 1e3 * record["statistics"][model][f"stage{i}_time_avg"]
            axes.barh(row, width, left=left, color=color, label=None if row else title)
            left += width
    axes.set_yticks([0, 1], ["EventGPT", "Video-LLaVA"])
    axes.set_xlabel("ms from the start of the request")
    axes.legend(fontsize=7, ncols=5, loc="upper center", bbox_to_anchor=(0.5, -0.3))
    save_figure(figure, paths[0])
    figure, axes = new_figure(5, 2.6)
    axes.hist(
        [100 * (r["acceptance"]["acceptance_rate"] or 0.0) for r in record["results"]], bins=20
    )
    axes.set_xlabel("% of tokens at the same place")
    axes.set_ylabel("samples")
    save_figure(figure, paths[1])
    return list(paths)


def _pair(values: Mapping[str, float], key: str) -> tuple[float, float]:
    return values[f"{key}_avg"], values[f"{key}_std"]


def _ms(value: tuple[float, float]) -> str:
    return f"{1e3 * value[0]:.1f} +- {1e3 * value[1]:.1f}"
