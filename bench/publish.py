"""Committed results -> the tables of README.md and of pages of docs/, and the README's plots."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image

from xspec_runtime.adapters.analysis.report import analysis_markdown, hidden_markdown
from xspec_runtime.cli import command
from xspec_runtime.drop_in.report import drop_in_markdown
from xspec_runtime.files import read_json, read_text, write_text
from xspec_runtime.gpu.record import validate_gpu_results
from xspec_runtime.gpu.report import gpu_markdown
from xspec_runtime.plots import draw_speedups, draw_timeline, draw_verify
from xspec_runtime.regret.report import clock_markdown
from xspec_runtime.replay.run import replay_markdown
from xspec_runtime.report import markdown_table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
CHECKPOINTS = ROOT / "python" / "xspec_runtime" / "models" / "checkpoints"


def training_markdown(record: dict) -> str:
    """What training the embedded pair took and gave."""
    stages = record["stages"]
    lines = ["| stage | steps | CPU seconds | exact captions, held out |", "|---|---:|---:|---:|"]
    for name, stage in stages.items():
        exact = stage.get("held_out_exact_captions")
        share = "" if exact is None else f"{exact:.1%} of {stage.get('held_out_scenes', 500)}"
        lines.append(
            f"| {name} | {stage.get('steps', '')} | {stage.get('cpu_seconds', 0):.0f} | {share} |"
        )
    lines.append(f"| all | | {record['stages_cpu_seconds']:.0f} | |")
    return "\n".join([*lines, "", *record.get("notes", [])])


def prompts_markdown(results: dict) -> str:
    """The main table, and what it holds for each group of the prompts file."""
    prompts = read_json(ROOT / results["config"]["prompts"], "prompts file")
    spent: dict[str, dict[str, float]] = {}
    count: dict[str, int] = {}
    for sample in results["samples"]:
        group = prompts[int(sample["task"].removeprefix("prompt "))]["group"]
        arms = spent.setdefault(group, {})
        arms[sample["arm"]] = arms.get(sample["arm"], 0.0) + sample["total_ms"]
        count[group] = count.get(group, 0) + (sample["arm"] == "target")
    names = [arm["name"] for arm in results["arms"] if arm["name"] != "target"]
    lines = [
        f"| group | prompts | {' | '.join(names)} |",
        "|---|---:|" + "---:|" * len(names),
    ]
    for group, arms in spent.items():
        cells = [f"{arms['target'] / arms[name]:.2f}x" for name in names]
        lines.append(f"| {group} | {count[group]} | {' | '.join(cells)} |")
    note = "Summed total of `target` / summed total of the arm, by group:"
    return "\n".join([markdown_table(results), "", note, "", *lines])


def arms_of_adapters(results: dict) -> str:
    """Arms of adapters of states beside their draft-hidden twins."""
    return hidden_markdown(results, read_json(ANALYSIS, "committed result"))


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
ANALYSIS = RESULTS / "hidden_analysis_cpu.json"
TABLES = {
    "e2e": (RESULTS / "e2e_cpu.json", markdown_table),
    "replay": (RESULTS / "replay.json", replay_markdown),
    "smollm2": (RESULTS / "smollm2_cpu.json", prompts_markdown),
    "pair": (CHECKPOINTS / "training.json", training_markdown),
}
ADAPTER_TABLES = {
    "hidden": (RESULTS / "hidden_e2e_cpu.json", arms_of_adapters),
    "states": (ANALYSIS, analysis_markdown),
}
GUIDE_TABLES = {
    "drop_in": (RESULTS / "drop_in_cpu.json", drop_in_markdown),
    "drop_in_overhead": (RESULTS / "drop_in_overhead_cpu.json", drop_in_markdown),
    "modes": (RESULTS / "modes_cpu.json", markdown_table),
    "regret": (RESULTS / "regret_cpu.json", clock_markdown),
}
# Documents by name: the folder that their links start from, and their tables.
DOCUMENTS = {
    "README.md": (ROOT, TABLES),
    "adapters.md": (ROOT / "docs", ADAPTER_TABLES),
    "guide.md": (ROOT / "docs", GUIDE_TABLES),
}
GPU_HEAD = """# On GPUs

Measured by `python bench/gpu_suite.py`, one section a run; what is modelled for cards that were not
measured is in [performance.md](performance.md). `v(M)`: one target forward over M rows; floor:
weights, K and V over the bandwidth of a copy in the same run. `bench/results` has the logs."""

# Plots of the end-to-end run, by file.
IMAGES = ROOT / "docs" / "images"
PLOTS = {"speedups.png": draw_speedups, "timeline.png": draw_timeline}


def publish(document: Path, check: bool) -> None:
    """Rewrite the text between ``<!-- table: NAME -->`` and ``<!-- end -->``.

    Raises:
        ValueError: `document` has no such tables, lacks their markers, or, under `check`, another
            text.
    """
    text = before = read_text(document)
    if document.name not in DOCUMENTS:
        raise ValueError(f"{document} has no tables; {' and '.join(DOCUMENTS)} have")
    home, tables = DOCUMENTS[document.name]
    for name, (file, render) in tables.items():
        table = _table(file, render, home)
        block = f"<!-- table: {name} -->\n{table}\n<!-- end -->"
        pattern = rf"<!-- table: {name} -->.*?<!-- end -->"
        text, found = re.subn(pattern, lambda _, b=block: b, text, flags=re.S)
        if found != 1:
            raise ValueError(
                f"{document} must hold the markers of table {name!r} once, found {found}"
            )
    if check and text != before:
        raise ValueError(f"{document} is not what bench/publish.py makes of bench/results; run it")
    if not check:
        write_text(document, text)


def suites() -> list[Path]:
    """Committed results of `bench/gpu_suite.py`."""
    return sorted(RESULTS.glob("gpu_*.json"))


def publish_gpu(page: Path, files: Sequence[Path], check: bool) -> None:
    """Write the page of the suite's results, a section a file; no file, no page.

    Raises:
        ValueError: a result cannot be published; or, under `check`, the page has another text.
    """
    if not files:
        return
    sections = [GPU_HEAD]
    for file in files:
        sections += [f"## {file.stem}", _table(file, _suite, page.parent)]
        shown = (f"![v(M) of {file.stem}](images/{name})" for name in _verify_plots(file))
        sections += shown
    text = "\n\n".join(sections) + "\n"
    if not check:
        write_text(page, text)
    elif not page.is_file() or read_text(page) != text:
        raise ValueError(f"{page} is not what bench/publish.py makes of bench/results; run it")


def _suite(results: dict) -> str:
    validate_gpu_results(results)
    if results["dry_run"]:
        raise ValueError("a dry run measures nothing")
    return gpu_markdown(results)


def _verify_plots(file: Path) -> dict[str, Callable[[Path], bool]]:
    """Plots of v(M) in graphs by file name, one for each kind of weights in a suite's results."""
    rows = [row for row in read_json(file, "committed result")["verify"] if row["mode"] == "graph"]
    return {
        f"{file.stem}_{weights}.png": partial(
            draw_verify, {"verify": [row for row in rows if row["weights"] == weights]}
        )
        for weights in dict.fromkeys(row["weights"] for row in rows)
    }


def draw(folder: Path, check: bool) -> None:
    """Draw `PLOTS`, and those of the suite's results, into the folder, or compare the files there
    pixel by pixel.

    Raises:
        ValueError: under `check`, a file is missing or shows something else.
    """
    results = read_json(TABLES["e2e"][0], "committed result")
    plots = {name: partial(plot, results) for name, plot in PLOTS.items()}
    for file in suites():
        plots |= _verify_plots(file)
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch) if check else folder
        home.mkdir(parents=True, exist_ok=True)
        for name, plot in plots.items():
            plot(home / name)
            if check and not _same_picture(home / name, folder / name):
                raise ValueError(f"{folder / name} is not what bench/publish.py draws; run it")


def _same_picture(one: Path, other: Path) -> bool:
    if not other.is_file():
        return False
    with Image.open(one) as left, Image.open(other) as right:
        return left.size == right.size and left.tobytes() == right.tobytes()


def _table(file: Path, render: Callable[[dict], str], home: Path) -> str:
    results = read_json(file, "committed result")
    try:
        if not results.get("complete", True):
            raise ValueError("the run was interrupted")
        return f"{_source(file, results, home)}\n\n{render(results)}"
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} cannot be published: {type(error).__name__}: {error}") from error


def _source(file: Path, results: dict, home: Path) -> str:
    env = results["environment"]
    machine = env.get("gpu") or env.get("cpu") or env["machine"]
    # Of a path outside the project only the name says something to a reader.
    command = re.sub(r"(?<=\s)/\S*/", "", results["command"])
    where = [f"`{command}` on {machine}"]
    names = ("threads", "torch", "transformers", "commit")
    where += [f"{name} {env[name]}" for name in names if env.get(name)]
    return f"Measured: {', '.join(where)} ([raw]({os.path.relpath(file, home)}))."


@command(app)
def main(
    document: Annotated[
        Path | None, typer.Option(help="File to rewrite; all that have tables where not given.")
    ] = None,
    check: Annotated[bool, typer.Option(help="Only say whether they are up to date.")] = False,
) -> None:
    """Put the committed results into the README, its plots and the page on adapters."""
    places = [document] if document else [home / name for name, (home, _) in DOCUMENTS.items()]
    for place in places:
        publish(place, check)
    if not document:
        publish_gpu(ROOT / "docs" / "gpu.md", suites(), check)
        draw(IMAGES, check)


if __name__ == "__main__":
    app()
