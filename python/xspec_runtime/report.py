"""Results of an end-to-end run as results.json, RESULTS.md, plots, and a table in the terminal."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import write_json, write_text
from .result_schema import LEDGER, ROUND_PHASES, validate_results
from .tables import markdown, print_wide

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = [
    "check_output_dir",
    "markdown_table",
    "print_table",
    "render_table",
    "results_markdown",
    "validate_results",
    "write_results",
]

Results = Mapping[str, Any]


def _fixed(digits: int, suffix: str = "", scale: float = 1.0) -> Callable[[Any], str]:
    return lambda value: "-" if value is None else f"{value * scale:,.{digits}f}{suffix}"


_count, _ms, _two = _fixed(0), _fixed(1), _fixed(2)
_times, _percent = _fixed(2, "x"), _fixed(1, " %", 100)


@dataclass(frozen=True)
class _Column:
    title: str
    key: str
    show: Callable[[Any], str]
    meaning: str


_COLUMNS = (
    _Column("prefill ms", "prefill_ms", _ms, "until the prompt is in the KV cache; median"),
    _Column("decode ms", "decode_ms", _ms, "total less prefill, drafting included; median"),
    _Column("total ms", "total_ms", _ms, "the whole request; median over samples"),
    _Column("TTFT ms", "ttft_ms", _ms, "time to first token; median over samples"),
    _Column("acceptance", "acceptance_rate", _percent, "accepted / proposed draft tokens"),
    _Column("tokens/verify", "tokens_per_verify", _two, "tokens after the first one / verifies"),
    _Column("gain", "gain", _two, "tokens/verify divided by (time of a verify / of a plain step)"),
    _Column(
        "speedup", "speedup_total", _times, "summed total of `target` / summed total of the arm"
    ),
    _Column("decode speedup", "speedup_decode", _times, "the same of the decode times"),
    _Column("identical", "identical", _count, "samples whose tokens equal those of `target`"),
    _Column("slower", "slower", _count, "samples that took longer than with `target`"),
)


# Only of runs that start at a video file.
_PREPARE = _Column(
    "prepare ms", "prepare_ms", _ms, "until the target's prefill begins; part of TTFT and total"
)


def _columns(results: Results) -> tuple[_Column, ...]:
    from_file = any("prepare_ms" in arm for arm in results["arms"])
    return (_PREPARE, *_COLUMNS) if from_file else _COLUMNS


def _cells(arm: Mapping[str, Any], columns: Sequence[_Column] = _COLUMNS) -> list[str]:
    cells = {column.key: column.show(arm.get(column.key)) for column in columns}
    for key in ("identical", "slower"):
        if arm[key] is not None and arm["samples"] is not None:
            cells[key] += f"/{arm['samples']}"
    if arm.get("agreement"):
        cells["identical"] = "no claim"
    return [arm["name"], *cells.values()]


def render_table(results: Results) -> Table:
    """The main table for a terminal (rich); speedups above 1 and broken identity are colored.

    Raises:
        ValueError: see `validate_results`.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    validate_results(results)
    table = Table(box=SIMPLE_HEAD, header_style="bold", padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("arm", no_wrap=True, vertical="bottom")
    columns = _columns(results)
    for column in columns:
        title = column.title.replace(" ", "\n").replace("/", "/\n")
        table.add_column(title, justify="right", overflow="fold")
    titles = [column.key for column in columns]
    for arm in results["arms"]:
        name, *cells = _cells(arm, columns)
        for key in ("speedup_total", "speedup_decode"):
            if arm[key] is not None and arm[key] > 1:
                cells[titles.index(key)] = f"[green]{cells[titles.index(key)]}[/]"
        if None not in (arm["identical"], arm["samples"]) and arm["identical"] < arm["samples"]:
            at = titles.index("identical")
            cells[at] = f"[red]{cells[at]}[/]"
        table.add_row(name, *cells)
    return table


def print_table(results: Results, console: Console | None = None) -> None:
    """Print the main table at its full width, also where output goes to a narrow log.

    Raises:
        ValueError: see `validate_results`.
    """
    from rich.console import Console

    print_wide(console or Console(), render_table(results))


def markdown_table(results: Results) -> str:
    """The main table in Markdown, one row an arm, no trailing newline.

    Raises:
        ValueError: see `validate_results`.
    """
    validate_results(results)
    columns = _columns(results)
    rows = (_cells(arm, columns) for arm in results["arms"])
    return markdown(["arm", *(c.title for c in columns)], rows)


def results_markdown(results: Results, plots: Sequence[Path] = ()) -> str:
    """RESULTS.md: the main table, its glossary, and what lies behind the speedups.

    Args:
        results: schema ``xspec.e2e/1``.
        plots: image files beside RESULTS.md, shown by name.

    Raises:
        ValueError: see `validate_results`.
    """
    glossary = "\n".join(f"- **{c.title}**: {c.meaning}." for c in _columns(results))
    parts = ["# Results", _setting(results), markdown_table(results), glossary]
    parts += [f"![{plot.stem}]({plot.name})" for plot in plots]
    arms = results["arms"]
    if split := [arm for arm in arms if arm["round_split_ms"]]:
        parts += ["## A round, in milliseconds", _split_table(split)]
    if rows := results.get("temperatures"):
        parts += ["## Temperature", _TEMPERATURE_NOTE, temperature_table(rows)]
    if lines := agreement_lines(results):
        parts += ["## Not lossless", "\n\n".join(lines)]
    if overlapped := [arm for arm in arms if arm.get("stages")]:
        parts += ["## Beside the video", _STAGES_NOTE, _stages_table(overlapped)]
    if ledgers := [arm for arm in arms if arm["ledger"]]:
        parts += ["## Ledger, per sample", _LEDGER_NOTE, _ledger_table(ledgers)]
    if counted := [arm for arm in arms if arm["by_accepted"]]:
        parts += ["## By accepted tokens", _ACCEPTED_NOTE]
        for arm in counted:
            parts += [f"### {arm['name']}", _accepted_table(arm["by_accepted"])]
    return "\n\n".join(parts) + "\n"


def agreement_lines(results: Results) -> list[str]:
    """A line for each arm that does not promise the target's answers."""
    lines = []
    for arm in results["arms"]:
        if found := arm.get("agreement"):
            lines.append(
                f"{arm['name']} is not lossless: {_count(found['equal_answers'])} of "
                f"{_count(found['answers'])} answers are the target's, "
                f"{_percent(found['equal_tokens'])} of the tokens at their places, "
                f"{_two(found['prefix'])} tokens before the first other one"
            )
    return lines


_STAGES = (
    *("video_ms", "draft_ms", "window_used_ms", "hidden_tokens", "drafted_tokens", "ttft_ms"),
)
_STAGES_NOTE = (
    "The draft's own text, means over samples: what of it ran while the video was prepared or the "
    "target's prefill did. The arm without a mode in its name has no draft text before that."
)
_TEMPERATURE_NOTE = (
    "Every arm samples with the same seed, so its tokens are to be those of `target` at that "
    "temperature; `as at first` counts answers that are those of the first temperature. The tables "
    "above are of that one."
)
_LEDGER_NOTE = (
    "tokens saved x step - verify overhead - drafting = net: what one sample gains, in ms."
)
_ACCEPTED_NOTE = (
    "Samples grouped by accepted draft tokens per round (mean, rounded); the verdict is on the "
    "median speedup against `target`."
)


def _setting(results: Results) -> str:
    environment, ties = results["environment"], results["near_ties"]
    known = [f"{key} {value}" for key, value in environment.items() if value is not None]
    chosen = [f"{key} {value}" for key, value in results["config"].items() if value is not None]
    lines = [f"`{results['command']}`", "Environment: " + ", ".join(known) + "."]
    if chosen:
        lines.append("Configuration: " + ", ".join(chosen) + ".")
    if ties:
        below, steps = _count(ties["below_2_ulp"]), _count(ties["steps"])
        lines.append(f"Near ties: {below} of {steps} steps had a top-2 gap below 2 ulp.")
    if seen := results["verbatim_in_training"]:
        share = f"{_count(seen['captions'])} ({_percent(seen['share'])})"
        lines.append(f"Answers found verbatim in the training captions: {share}.")
    return "\n\n".join(lines)


def temperature_table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Arms by temperature in Markdown."""
    shown = [
        [
            row["arm"],
            f"{row['temperature']:g}",
            _percent(row["acceptance_rate"]),
            _two(row["tokens_per_verify"]),
            _times(row["speedup_total"]),
            f"{_count(row['identical'])}/{_count(row['samples'])}",
            f"{_count(row['as_first'])}/{_count(row['samples'])}",
        ]
        for row in sorted(rows, key=lambda row: row["arm"])
    ]
    titles = ["temperature", "acceptance", "tokens/verify", "speedup", "identical", "as at first"]
    return markdown(["arm", *titles], shown)


def _split_table(arms: Iterable[Mapping[str, Any]]) -> str:
    rows = []
    for arm in arms:
        split = [arm["round_split_ms"][phase] for phase in ROUND_PHASES]
        total = None if None in split else sum(split)
        rows.append([arm["name"], *(_two(value) for value in (*split, total))])
    return markdown(["arm", *ROUND_PHASES, "sum"], rows)


def _stages_table(arms: Iterable[Mapping[str, Any]]) -> str:
    rows = [[arm["name"], *(_ms(arm["stages"][key]) for key in _STAGES)] for arm in arms]
    titles = ["video ms", "draft ms", "hidden ms", "hidden tokens", "tokens", "TTFT ms"]
    return markdown(["arm", *titles], rows)


def _ledger_table(arms: Iterable[Mapping[str, Any]]) -> str:
    titles = ["tokens saved", "x step ms", "= saved ms", "- verify overhead ms", "- drafting ms"]
    rows = [[arm["name"], *(_two(arm["ledger"][key]) for key in LEDGER)] for arm in arms]
    return markdown(["arm", *titles, "= net ms"], rows)


def _accepted_table(rows: Iterable[Mapping[str, Any]]) -> str:
    shown = [
        [
            str(row["accepted"]),
            _count(row["samples"]),
            _percent(row["share"]),
            _times(row["median_speedup"]),
            _count(row["slower"]),
            row["verdict"],
        ]
        for row in rows
    ]
    return markdown(["accepted", "samples", "share", "median speedup", "slower", "verdict"], shown)


def check_output_dir(path: str | Path) -> Path:
    """Create ``path`` where needed and prove that a file can be written there.

    Raises:
        ValueError: it cannot be created or written.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path, prefix=".xspec"):
            pass
    except OSError as error:
        raise ValueError(f"cannot write to the output folder {path}: {error.strerror}") from error
    return path


def write_results(results: Results, output_dir: str | Path) -> list[Path]:
    """Write results.json, the plots the results allow, and RESULTS.md, each of them atomically.

    Without matplotlib the plots are left out.

    Returns:
        The files written.

    Raises:
        ValueError: wrong results (see `validate_results`) or an output folder that cannot be
            written; nothing has been written then.
    """
    from .plots import draw_all

    validate_results(results)
    folder = check_output_dir(output_dir)
    data, text = folder / "results.json", folder / "RESULTS.md"
    write_json(data, results)
    plots = draw_all(results, folder)
    write_text(text, results_markdown(results, plots))
    return [data, text, *plots]
