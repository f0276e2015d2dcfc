"""An evaluation's results as tables, in the terminal and in Markdown, and as plots."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ..files import write_text
from ..replay.tally import mean_range
from ..tables import markdown, print_wide, shown, terminal_table
from .plan import COMBINED

if TYPE_CHECKING:
    from rich.console import Console

Entries = Sequence[Mapping[str, Any]]
DEPTHS = 8
SHARED = "means over the folds, in brackets the least and greatest fold"
NOTE = (
    "Tokens per verify after the given first token, {shared}. Columns are the rows of a verify, "
    "root included; a line with one figure is of chains of {gamma} tokens. Online: what learns "
    "does so from each answer once it is over. Rows above 64 are a ceiling: replayed only, no "
    "verify takes them."
)
AFTER_10 = "The same over the verifies that start with 10 or more known tokens."
MARGINAL = (
    "Tokens per verify that the combination loses without each source ({shared}); below 0 the "
    "source does harm. The last line is what hiding the draft costs it."
)
NEXT = (
    "One token at a time, all before it right: the token is the best, or among the best five, of "
    "those proposed; at positions from 10 on; and at the first position. Means over the folds."
)
DEPTH = (
    "Share of verifies that accept a draft at each depth, of those that accepted all above it and "
    "proposed one there. Means over the folds."
)
COST = (
    "Draft tokens the first verify of an answer accepts, accepted of all proposed, and wall time "
    "of a proposal on this machine. Means over the folds."
)
SIZES = "Tokens per verify at 16 rows by answers learned from, evenly spaced; {shared}."


@dataclass(frozen=True, slots=True)
class Table:
    """Lines of text under titles; the first column is left-aligned."""

    title: str
    note: str
    columns: list[str]
    lines: list[list[str]]


def line_name(entry: Mapping[str, Any]) -> str:
    """Drafter, whether it learns, and whether the draft is hidden from it."""
    words = [entry["drafter"]]
    words += ["online"] if entry["online"] else []
    words += ["draft hidden"] if entry["hide_draft"] else []
    return ", ".join(words)


def lines_of(results: Mapping[str, Any], part: str) -> dict[str, dict[int, list]]:
    """Entries of one part: line -> rows (of part "size": training answers) -> one entry a fold."""
    found: dict[str, dict[int, list]] = {}
    by = "size" if part == "size" else "rows"
    for entry in results["cells"]:
        if entry["part"] == part:
            line = found.setdefault(line_name(entry), {})
            line.setdefault(entry[by], []).append(entry)
    return found


def spread(entries: Entries, key: str, digits: int = 2) -> str:
    """Mean and range of a figure over folds."""
    found = mean_range(entry[key] for entry in entries)
    return _spread(found, digits)


def tables(results: Mapping[str, Any]) -> list[Table]:
    """All tables that the results hold data for."""
    verify, gamma = lines_of(results, "verify"), results["config"]["gamma"]
    found = []
    if verify:
        note = NOTE.format(shared=SHARED, gamma=gamma)
        plain = {name: line for name, line in verify.items() if not _left_out(line)}
        found.append(_by_column("Tokens per verify", note, plain, "tokens_per_verify"))
        found.append(_by_column("After the first 10 tokens", AFTER_10, plain, "after_10"))
        found += [_marginal(verify)] if any(map(_left_out, verify.values())) else []
        found += [_depths(plain), _costs(plain)]
    if ahead := lines_of(results, "next"):
        found.append(_next(ahead))
    if sizes := lines_of(results, "size"):
        note = SIZES.format(shared=SHARED)
        found.append(_by_column("By training answers", note, sizes, "tokens_per_verify"))
    return found


def evaluate_markdown(results: Mapping[str, Any], plots: Sequence[Path] = ()) -> str:
    """RESULTS.md of an evaluation of schema ``xspec.evaluate/1``."""
    parts = ["# Drafters", *_setting(results)]
    parts += [f"![{plot.stem}]({plot.name})" for plot in plots]
    for table in tables(results):
        parts += [f"## {table.title}", markdown(table.columns, table.lines), table.note]
    return "\n\n".join(parts) + "\n"


def print_evaluation(results: Mapping[str, Any], console: Console) -> None:
    """Print the first tables, see `print_wide`; RESULTS.md has them all."""
    for each in tables(results):
        if each.title != "Acceptance by depth":
            table = terminal_table(each.columns, each.lines, title=each.title, caption=each.note)
            print_wide(console, table, markup=False, highlight=False)
    for line in _setting(results):
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def write_evaluation(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write RESULTS.md and the plots the results allow, without matplotlib none; returns the files.
    ``results.json`` is there already.
    """
    from .plots import draw_evaluation

    plots = draw_evaluation(results, folder)
    text = folder / "RESULTS.md"
    write_text(text, evaluate_markdown(results, plots))
    return [text, *plots]


def _setting(results: Mapping[str, Any]) -> list[str]:
    material, config = results["material"], results["config"]
    folds = len(material["training_answers"])
    if material["kind"] == "live":
        what = f"{material['answers']} unseen scenes through the embedded pair"
    else:
        cut = "by drive" if config["by_drive"] else "contiguous"
        cut = "trained on another file" if config["train"] else f"{folds} folds, {cut}"
        what = f"{material['answers']} recorded answers, {cut}"
    said = [what + (": " if results["complete"] else ", interrupted: ") + f"`{results['command']}`"]
    said += [f"Left out: {name} ({reason})." for name, reason in results["missing"].items()]
    return said


def _left_out(line: Mapping[int, Entries]) -> str:
    return next(iter(line.values()))[0]["left_out"]


def _by_column(title: str, note: str, lines: Mapping[str, dict[int, list]], key: str) -> Table:
    columns = sorted({column for line in lines.values() for column in line})
    body = [
        [name, *(spread(line[c], key) if c in line else "" for c in columns)]
        for name, line in lines.items()
    ]
    return Table(title, note, ["drafter", *map(str, columns)], body)


def _marginal(verify: Mapping[str, dict[int, list]]) -> Table:
    """What each source adds to the others, from folds that both were measured on."""
    whole = _line(verify, lambda e: e["drafter"] == COMBINED and not e["hide_draft"])
    hidden = _line(verify, lambda e: e["drafter"] == COMBINED and e["hide_draft"])
    lines = {_left_out(line): line for line in verify.values() if _left_out(line)}
    lines |= {"the draft's text": hidden} if hidden else {}
    columns = sorted(whole)
    body = [
        [name, *(_spread(_lost(whole[c], line.get(c, [])), 3) for c in columns)]
        for name, line in lines.items()
    ]
    note = MARGINAL.format(shared=SHARED)
    return Table("Marginal gain of each source", note, ["without", *map(str, columns)], body)


def _lost(whole: Entries, without: Entries) -> dict[str, float] | None:
    other = {entry["fold"]: entry["tokens_per_verify"] for entry in without}
    return mean_range(
        entry["tokens_per_verify"] - other[entry["fold"]] if entry["fold"] in other else None
        for entry in whole
    )


def _line(lines: Mapping[str, dict[int, list]], is_it: Callable[[Mapping], bool]) -> dict:
    return next((line for line in lines.values() if is_it(next(iter(line.values()))[0])), {})


def _depths(lines: Mapping[str, dict[int, list]]) -> Table:
    body = []
    for name, line in lines.items():
        for rows, entries in line.items():
            found = [entry["by_depth"] or [] for entry in entries]
            columns = [[one[d] for one in found if d < len(one)] for d in range(DEPTHS)]
            body.append([name, str(rows), *(f"{fmean(c):.0%}" if c else "" for c in columns)])
    titles = ["drafter", "rows", *(str(d + 1) for d in range(DEPTHS))]
    return Table("Acceptance by depth", DEPTH, titles, body)


def _costs(lines: Mapping[str, dict[int, list]]) -> Table:
    body = []
    for name, line in lines.items():
        for rows, entries in line.items():
            rate, time = (_mean(entries, key) for key in ("acceptance_rate", "propose_us"))
            body.append([name, str(rows), spread(entries, "accepted_prefix"), shown("{:.1%}", rate),
                         f"{time:,.0f}"])  # fmt: skip
    titles = ["drafter", "rows", "accepted prefix", "accepted", "us a proposal"]
    return Table("First verify and cost", COST, titles, body)


def _next(lines: Mapping[str, dict[int, list]]) -> Table:
    keys = ("top_1", "top_5", "top_1_after_10", "first_token")
    body = [
        [name, *(shown("{:.1%}", _mean(next(iter(line.values())), key)) for key in keys)]
        for name, line in lines.items()
    ]
    return Table("Next token", NEXT, ["drafter", "top 1", "top 5", "top 1 after 10", "first"], body)


def _mean(entries: Entries, key: str) -> float | None:
    found = mean_range(entry[key] for entry in entries)
    return found and found["mean"]


def _spread(found: Mapping[str, float] | None, digits: int) -> str:
    if found is None:
        return "-"
    mean, low, high = (f"{found[key]:.{digits}f}" for key in ("mean", "min", "max"))
    return mean if low == high else f"{mean} [{low}, {high}]"
