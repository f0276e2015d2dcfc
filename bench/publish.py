"""Committed results -> the tables of README.md, between their markers."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from xspec_runtime.cli import Command, run_cli
from xspec_runtime.files import read_json, read_text, write_text
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


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
TABLES = {
    "e2e": (RESULTS / "e2e_cpu.json", markdown_table),
    "replay": (RESULTS / "replay.json", replay_markdown),
    "smollm2": (RESULTS / "smollm2_cpu.json", prompts_markdown),
    "pair": (CHECKPOINTS / "training.json", training_markdown),
}


def publish(readme: Path, check: bool) -> None:
    """Rewrite the text between ``<!-- table: NAME -->`` and ``<!-- end -->``."""
    text = before = read_text(readme)
    for name, (file, render) in TABLES.items():
        table = _table(file, render)
        block = f"<!-- table: {name} -->\n{table}\n<!-- end -->"
        pattern = rf"<!-- table: {name} -->.*?<!-- end -->"
        text, found = re.subn(pattern, lambda _, b=block: b, text, flags=re.S)
        if found != 1:
            raise ValueError(
                f"{readme} must hold the markers of table {name!r} once, found {found}"
            )
    if check and text != before:
        raise ValueError(f"{readme} is not what bench/publish.py makes of bench/results; run it")
    if not check:
        write_text(readme, text)


def _table(file: Path, render: Callable[[dict], str]) -> str:
    results = read_json(file, "committed result")
    try:
        if not results.get("complete", True):
            raise ValueError("the run was interrupted")
        return f"{_source(file, results)}\n\n{render(results)}"
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} cannot be published: {type(error).__name__}: {error}") from error


def _source(file: Path, results: dict) -> str:
    env = results["environment"]
    machine = env.get("gpu") or env.get("cpu") or env["machine"]
    where = [f"`{results['command']}` on {machine}"]
    names = ("threads", "torch", "transformers", "commit")
    where += [f"{name} {env[name]}" for name in names if env.get(name)]
    return f"Measured: {', '.join(where)} ([raw]({file.relative_to(ROOT)}))."


@app.command(cls=Command)
def main(
    readme: Annotated[Path, typer.Option(help="File to rewrite.")] = ROOT / "README.md",
    check: Annotated[bool, typer.Option(help="Only say whether the file is up to date.")] = False,
    debug: Annotated[bool, typer.Option(help="Show tracebacks.")] = False,
) -> None:
    """Put the committed results into the README."""
    run_cli(lambda: publish(readme, check), debug)


if __name__ == "__main__":
    app()
