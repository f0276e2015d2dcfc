"""Folders of trained adapters: what a run writes, which run `latest` and `starred` stand for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...files import existing_file, read_json, write_json, write_text
from ...plots import OTHERS, OURS, new_figure, save_figure
from ..checkpoint import save_adapter

SCHEMA = "xspec.adapter_run/1"
STAR = "starred"
BEST = "best"
_TABLE = (
    ("train_loss", "train loss", "{:.4f}"),
    ("val_loss", "val loss", "{:.4f}"),
    ("token_match", "tokens right", "{:.1%}"),
    ("top_5", "among five", "{:.1%}"),
    ("consecutive_tokens", "right in a row", "{:.2f}"),
    ("token_match_hidden", "right, draft hidden", "{:.1%}"),
    ("cos_sim", "cosine", "{:.3f}"),
    ("accept_90", "cosine > 0.9", "{:.1%}"),
)


def write_run(
    folder: Path,
    adapter: Any,
    history: Sequence[Mapping[str, Any]],
    record: Mapping[str, Any],
    save: Callable[[Any, Path], object] = save_adapter,
) -> dict[str, Any]:
    """Write what was trained (`BEST`), results.json, RESULTS.md and two plots; returns the results.

    Args:
        record: the command, the level and whatever else describes the run; ``parameters`` unless
            all of `adapter` were trained.
        save: writes `adapter` to a folder.
    """
    best = min(history, key=lambda row: row["val_loss"])
    results = {
        "schema": SCHEMA, "parameters": sum(p.numel() for p in adapter.parameters()), **record,
        "best_epoch": best["epoch"], "best": dict(best), "history": [dict(row) for row in history],
    }  # fmt: skip
    save(adapter, folder / BEST)
    write_json(folder / "results.json", results)
    _curves(history, folder / "loss.png", {"train_loss": "training", "val_loss": "validation"},
            "loss")  # fmt: skip
    other = {"accept_90": "cosine above 0.9"}
    if "accept_90" not in best:
        other = {"token_match_hidden": "tokens right, draft hidden"}
    _curves(history, folder / "acceptance.png", {"token_match": "tokens right", **other},
            "share of validation positions")  # fmt: skip
    write_text(folder / "RESULTS.md", _markdown(results))
    return results


def find_run(folder: Path, level: str, which: str = "") -> Path:
    """The adapter's folder of a run below `folder`.

    Args:
        which: `latest`, `starred`, or "" for the starred run where there is one and the latest
            otherwise.

    Raises:
        FileNotFoundError: there is no such run.
        ValueError: `which` is none of these.
    """
    if which not in ("", "latest", STAR):
        raise ValueError(f"a run is latest or starred, got {which!r}")
    found = [
        (values.get("finished", ""), path)
        for path, values in _runs(folder, "")
        if values["level"] == level
    ]
    starred = [run for run in found if (run[1] / STAR).exists()]
    chosen = starred if which == STAR else (found if which else starred or found)
    if not chosen:
        raise FileNotFoundError(f"{folder} holds no {which or 'trained'} run of {level}")
    return max(chosen)[1] / BEST


def adapter_folder(named: str, folder: Path, level: str) -> Path:
    """What `--adapter latest|starred|PATH` stands for: a run below `folder`, a run's own folder, or
    an adapter's.

    Args:
        folder: of a run, of an adapter, or above several runs.
        level: "" where `folder` leaves no choice.

    Raises:
        FileNotFoundError: see `find_run`.
        ValueError: the run in `folder` is of another level, or there are several.
    """
    path = folder if named in ("", "latest", STAR) else Path(named)
    path = path / BEST if (path / BEST / "config.json").exists() else path
    if path != folder or (path / "config.json").exists():
        found = run_record(path).get("level", level)
        if level and found != level:
            raise ValueError(f"{path} is of {found}, expected {level}")
        return path
    found = [level] if level else levels(folder)
    if len(found) > 1:
        raise ValueError(f"{folder} holds runs of {', '.join(found)}: --level takes one of them")
    return find_run(folder, found[0] if found else "any level", named)


def star(folder: Path) -> str:
    """Mark a run as the one of its level to take, among those beside it; returns its level.

    Raises:
        FileNotFoundError, ValueError: the folder holds no run.
    """
    folder = folder.resolve()
    level = _record(existing_file(folder / "results.json", "run")).get("level")
    if not level:
        raise ValueError(f"{folder / 'results.json'} is not that of a trained adapter")
    for path in folder.parent.glob(f"*/{STAR}"):
        if path.parent != folder and _record(path.parent / "results.json").get("level") == level:
            path.unlink()
    write_text(folder / STAR, "")
    return level


def levels(folder: Path, which: str = "") -> list[str]:
    """Levels that have a run below `folder`, a starred one where `which` is `STAR`."""
    return sorted({record["level"] for _, record in _runs(folder, which)})


def run_record(folder: Path) -> dict[str, Any]:
    """results.json of the run that the adapter in `folder` is of; empty where there is none."""
    path = folder.parent / "results.json"
    return _record(path) if path.exists() else {}


def _runs(folder: Path, which: str) -> list[tuple[Path, dict[str, Any]]]:
    """(folder, record) of every run below `folder`, or of every one that is starred."""
    records = [(path.parent, _record(path)) for path in sorted(folder.glob("*/results.json"))]
    return [
        (run, record)
        for run, record in records
        if "level" in record and (which != STAR or (run / STAR).exists())
    ]


def _record(path: Path) -> dict[str, Any]:
    values = read_json(path, "run") if path.exists() else {}
    known = isinstance(values, dict) and values.get("schema") == SCHEMA
    return values if known else {}


def _markdown(results: Mapping[str, Any]) -> str:
    best = results["best"]
    columns = [column for column in _TABLE if column[0] in best]
    given = "true states" if "cos_sim" in best else "true texts"
    lines = [
        f"# {results['level']}: {results['parameters']:,} parameters",
        "",
        f"`{results['command']}`",
        "",
        f"{results['train_answers']:,} answers to train on, {results['val_answers']:,} to stop by "
        f"({results['split']}); best epoch {results['best_epoch']} of {len(results['history'])}. "
        f"Every prediction is a single step from {given}. Validation figures choose the epoch: "
        "they are no test.",
        "",
        "| epoch | " + " | ".join(title for _, title, _ in columns) + " |",
        "|" + "---:|" * (1 + len(columns)),
    ]
    for row in results["history"]:
        cells = [f.format(row[k]) if row[k] is not None else "-" for k, _, f in columns]
        mark = "**" if row["epoch"] == results["best_epoch"] else ""
        lines.append(f"| {mark}{row['epoch']}{mark} | " + " | ".join(cells) + " |")
    if best.get("match_above_90") is not None:
        share = best["match_above_90"]
        lines += ["", f"Where the cosine is above 0.9, {share:.1%} of the tokens are right."]
    if results.get("constant_match") is not None:
        share = results["constant_match"]
        lines += ["", f"A constant string, the commonest token of every position: {share:.1%}."]
    lines += ["", "![loss](loss.png)", "", "![acceptance](acceptance.png)", ""]
    return "\n".join(lines)


def _curves(
    history: Sequence[Mapping[str, Any]], path: Path, names: Mapping[str, str], label: str
) -> None:
    figure, axes = new_figure(6, 3.2)
    epochs = [row["epoch"] for row in history]
    for (name, title), color in zip(names.items(), (OTHERS, OURS), strict=True):
        values = [float("nan") if row.get(name) is None else row[name] for row in history]
        axes.plot(epochs, values, color=color, label=title, marker=".")
    axes.set_xlabel("epoch")
    axes.set_ylabel(label)
    axes.legend(frameon=False, fontsize=9)
    save_figure(figure, path)
