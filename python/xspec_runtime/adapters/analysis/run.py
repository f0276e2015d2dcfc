"""An analysis of trained adapters on one test: which ones, figures, files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...files import write_json, write_text
from ...result_schema import read_results
from ..alignment import EAGLE, STATE_LEVELS
from ..checkpoint import load_adapter
from ..hidden import READS_DRAFT
from ..mini.pair import HIDDEN
from ..scoring.report import check_test
from ..scoring.steps import StateAdapter, level_of
from ..training.runs import BEST, adapter_folder, levels, run_record
from ..training.states import States
from .chains import chains, predicted_features, replay, viability
from .plots import draw_analysis
from .published import acceptance_metrics, comparison_markdown, position_stats
from .report import SCHEMA, results_markdown
from .steps import Compared, compare, correlation, cosine_curve, split_gap

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Trained:
    """An adapter, the folder it is from and its run's results.json."""

    adapter: StateAdapter
    folder: Path
    record: Mapping[str, Any]


@dataclass(frozen=True)
class Analysis:
    """Schema ``xspec.analysis/1``, and of every level what the published form is made of."""

    results: dict[str, Any]
    compared: dict[str, Compared]


def find_adapters(
    runs: Sequence[Path], vocab_size: int, chosen: str = "", which: str = ""
) -> dict[str, Trained]:
    """One adapter a level, in the order of `STATE_LEVELS`.

    Args:
        runs: folders of runs, or folders above several.
        chosen: levels, with commas between; all that are there where empty.
        which: `latest` or `starred`, for levels with several runs.

    Raises:
        FileNotFoundError: there is no such run.
        ValueError: a level does not exist, or is found in two of the folders.
    """
    wanted = [name.strip() for name in chosen.split(",") if name.strip()]
    if unknown := [name for name in wanted if name not in STATE_LEVELS]:
        raise ValueError(f"--level must be of {', '.join(STATE_LEVELS)}, got {unknown[0]!r}")
    found: dict[str, Path] = {}
    for folder in runs:
        for level, at in _adapters_in(folder, which).items():
            if wanted and level not in wanted:
                continue
            if level in found:
                raise ValueError(f"{level} is in {found[level]} and in {at}: name one of them")
            found[level] = at
    if missing := [name for name in wanted if name not in found]:
        raise FileNotFoundError(f"no run of {missing[0]} in {', '.join(map(str, runs))}")
    if not found:
        raise FileNotFoundError(f"{', '.join(map(str, runs))} hold no run of `xspec train hidden`")
    return {
        level: Trained(load_adapter(found[level], vocab_size), found[level],
                       run_record(found[level]))
        for level in STATE_LEVELS if level in found
    }  # fmt: skip


def _adapters_in(folder: Path, which: str) -> dict[str, Path]:
    if (folder / BEST).is_dir():
        level = run_record(folder / BEST).get("level")
        return {level: folder / BEST} if level in STATE_LEVELS else {}
    trained = [level for level in levels(folder) if level in STATE_LEVELS]
    return {level: adapter_folder(which, folder, level) for level in trained}


def live_figures(path: Path | None) -> dict[str, dict[str, float | None]]:
    """Arms of an end-to-end run by name: ``speedup``, ``tokens_per_verify``, ``acceptance_rate``.

    Raises:
        FileNotFoundError, ValueError: it is no results.json of `bench/e2e.py`.
    """
    if path is None:
        return {}
    results = read_results(path)
    return {
        arm["name"]: {
            "speedup": arm["speedup_total"],
            "tokens_per_verify": arm["tokens_per_verify"],
            "acceptance_rate": arm["acceptance_rate"],
        }
        for arm in results["arms"]
    }


def analyze(
    trained: Mapping[str, Trained],
    states: States,
    head: torch.Tensor,
    gamma: int = 5,
    live: Mapping[str, Mapping[str, float | None]] | None = None,
    progress: Progress = lambda label, done, count: None,
) -> Analysis:
    """All figures of all levels.

    Args:
        head: the target's language-model head ``[V, D]``.
        gamma: drafts of a chain.
        live: see `live_figures`.
        progress: called with what is at work, answers done and all.

    Raises:
        ValueError: an adapter was trained on these states, or does not fit them.
    """
    for each in trained.values():
        check_test(each.adapter, each.record, states)
    live = live or {}
    found: dict[str, dict[str, Compared]] = {}
    entries: dict[str, Any] = {}
    for level, each in trained.items():
        reads_draft = level in READS_DRAFT or level == EAGLE
        entry: dict[str, Any] = {
            "parameters": sum(p.numel() for p in each.adapter.parameters()),
            "run": each.record.get("command"),
        }
        found[level] = {}
        for name in ("shown", "hidden") if reads_draft else ("shown",):
            arm = level.lower() + (HIDDEN if name == "hidden" else "")
            found[level][name], entry[name] = _side(
                each.adapter, states, head, gamma, name == "hidden", live.get(arm),
                lambda done, count, label=f"{level}, draft {name}": progress(label, done, count),
            )  # fmt: skip
        entries[level] = entry
    material = {
        "answers": len(states), "tokens": int(states.lengths[:, 1].sum()),
        "draft": states.draft_name, "digest": states.digest,
        "draft_width": states.draft.shape[2], "width": states.target.shape[2],
    }  # fmt: skip
    results = {"schema": SCHEMA, "material": material, "gamma": gamma, "levels": entries,
               "gap": split_gap(found)}  # fmt: skip
    return Analysis(results, {level: pair["shown"] for level, pair in found.items()})


def _side(
    adapter: StateAdapter,
    states: States,
    head: torch.Tensor,
    gamma: int,
    hide: bool,
    live: Mapping[str, float | None] | None,
    progress: Callable[[int, int], None],
) -> tuple[Compared, dict[str, Any]]:
    """An adapter with the draft shown or hidden."""
    compared = compare(adapter, states, head, hide,
                       lambda done, count: progress(done, 2 * count))  # fmt: skip
    rolled = chains(adapter, states, head, gamma, hide,
                    lambda done, count: progress(count + done, 2 * count))  # fmt: skip
    there = compared.there
    count = int(there.sum())
    replayed = replay(rolled)
    figures = {
        "tokens": count,
        "token_match": int(compared.right.sum()) / count if count else None,
        "consecutive_tokens": compared.right.int().cumprod(1).sum(1).float().mean().item(),
        "cos_sim": compared.similarity[there].mean().item() if count else None,
        "correlation": correlation(compared),
        "curve": cosine_curve(compared),
        "alpha": predicted_features(rolled, gamma),
        "replay": replayed,
        "live": dict(live) if live else None,
        "viability": viability(replayed, live["speedup"] if live else None),
    }
    if level_of(adapter) == EAGLE:
        figures["head_match"] = int(compared.through_head.sum()) / count if count else None
    return compared, figures


def write_analysis(analysis: Analysis, folder: Path) -> list[Path]:
    """Write the plots, RESULTS.md and of every level a folder in the published form, then
    results.json; each of them in one step. Without matplotlib the plots are left out.

    Returns:
        The files of `folder` itself.
    """
    results = analysis.results
    for level, compared in analysis.compared.items():
        metrics = acceptance_metrics(compared, results["material"]["width"], results["gamma"])
        live = results["levels"][level]["shown"]["live"] or {}
        write_json(folder / level / "acceptance_metrics.json", metrics)
        write_json(folder / level / "position_stats.json", position_stats(compared))
        text = comparison_markdown(metrics, live.get("speedup"))
        write_text(folder / level / "METRICS_COMPARISON.md", text)
    plots = draw_analysis(results, folder)
    write_text(folder / "RESULTS.md", results_markdown(results, plots))
    write_json(folder / "results.json", results)
    return [folder / "results.json", folder / "RESULTS.md", *plots]
