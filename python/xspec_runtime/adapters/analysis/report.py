"""Tables of an analysis, and of an end-to-end run of adapters, in Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...evaluate.report import Table
from ...tables import markdown, print_wide, shown, terminal_table
from ..mini.pair import HIDDEN

if TYPE_CHECKING:
    from rich.console import Console

SCHEMA = "xspec.analysis/1"
Lines = tuple[list[str], list[list[str]]]
SHOWN_TAUS = (0.80, 0.90, 0.95, 0.99)
PARTS = {
    "unread": "without the draft",
    "network": "larger network",
    "draft": "the draft's states",
    "modality": "draft for target",
    "capacity": "wrong all the same",
}
GOALS = {
    "consecutive_match_rate": ("drafts accepted", "{:.1%}", ">= 50%"),
    "tokens_accepted": ("accepted a verify", "{:.2f}", ">= 3.0"),
    "first_token": ("first draft right", "{:.1%}", ">= 70%"),
    "speedup": ("speedup", "{:.2f}x", ">= 1.5x"),
}
COSINE_NOTE = (
    "Single steps from true states. Similarity is not acceptance: *above* is the share of states "
    "whose cosine with the target's is greater, *right* the share of these whose token is right "
    "through the target's frozen head, *run* how many such states follow one another; *right at "
    "most 0.90* is the share of right tokens among the other states."
)
ALPHA_NOTE = (
    "Chains of {gamma} drafts from every position, counted where all drafts before were accepted. "
    "n of the features before a draft are the adapter's own predictions: B1 and L5F read them. L1 "
    "to L5 read the draft's states alone and EAGLE tokens, so that their n is the place in the "
    "chain. Accepted a verify: the same chains in the rounds of greedy decoding, replayed; live: "
    "tokens per verify measured end to end, on other requests."
)
GAP_NOTE = (
    "Tokens right, in points of 100, over the {positions:,} positions that all levels predict; "
    "each line adds up to 100. *Without the draft*: L1 to L5 and EAGLE with the draft hidden; B1 "
    "itself; for L5F, B1. *Larger network*: L5F with the draft hidden, less B1. *The draft's "
    "states*: shown less hidden. *Draft for target*, the modality gap: B1 less the level; B1 also "
    "reads what the target has said so far, the level a text that may be out of step with it. "
    "*Wrong all the same*, capacity: also from the target's own states, by B1 or by this level."
)
GOAL_NOTE = (
    "The research's four targets. Drafts accepted: of all that rounds of greedy decoding propose, "
    "{gamma} a round; first draft right: of an answer; speedup: whole requests end to end, against "
    "the target alone."
)


def tables(results: Mapping[str, Any]) -> list[Table]:
    """The four tables, each with what it counts."""
    names = {"gamma": results["gamma"], "positions": results["gap"]["positions"]}
    return [
        Table("Cosine and token", COSINE_NOTE, *_cosines(results)),
        Table("Acceptance by predicted features", ALPHA_NOTE.format(**names), *_alphas(results)),
        Table("Where tokens are lost", GAP_NOTE.format(**names), *_gap(results)),
        Table("Viability targets", GOAL_NOTE.format(**names), *_goals(results)),
    ]


def analysis_markdown(results: Mapping[str, Any]) -> str:
    """The tables in Markdown, without headings."""
    return "\n\n".join(
        f"**{table.title}.** {table.note}\n\n{markdown(table.columns, table.lines)}"
        for table in tables(results)
    )


def print_analysis(results: Mapping[str, Any], console: Console) -> None:
    """Print the tables at their full width, also where output goes to a narrow log."""
    for table in tables(results):
        shown = terminal_table(table.columns, table.lines, title=table.title)
        print_wide(console, shown, markup=False, highlight=False)
        console.print(table.note.replace("*", ""), markup=False, highlight=False)


def results_markdown(results: Mapping[str, Any], plots: Sequence[Path] = ()) -> str:
    """RESULTS.md."""
    material = results["material"]
    said = (
        f"{material['answers']:,} answers, {material['tokens']:,} tokens, kept for a test; draft "
        f"{material['draft'] or 'not named'}. The adapters were trained on others."
    )
    parts = ["# States and tokens", f"`{results['command']}`", said, analysis_markdown(results)]
    parts += [f"![{plot.stem}]({plot.name})" for plot in plots]
    folders = ", ".join(f"`{level}/`" for level in results["levels"])
    return "\n\n".join([*parts, f"In the published form: {folders}."]) + "\n"


def hidden_markdown(e2e: Mapping[str, Any], analysis: Mapping[str, Any]) -> str:
    """Any arms of an end-to-end run beside their draft-hidden twins.

    Args:
        e2e: schema ``xspec.e2e/1``.
        analysis: schema ``xspec.analysis/1``; its levels have the parameters.
    """
    arms = {arm["name"]: arm for arm in e2e["arms"]}
    body = []
    for name, arm in arms.items():
        if name == "target" or (name.endswith(HIDDEN) and name.removesuffix(HIDDEN) in arms):
            continue
        twin = arms.get(name + HIDDEN, {})
        body.append([
            f"`{name}`",
            shown("{:,}", _parameters(arm, analysis["levels"])),
            shown("{:.1%}", arm["acceptance_rate"]),
            shown("{:.2f}", arm["tokens_per_verify"]),
            shown("{:.2f}", twin.get("tokens_per_verify")),
            shown("{:.2f}x", arm["speedup_total"]),
            shown("{}", arm["identical"]) + f"/{arm['samples']}",
        ])  # fmt: skip
    titles = ["arm", "parameters", "acceptance", "tokens per verify", "draft hidden", "speedup",
              "identical"]  # fmt: skip
    return markdown(titles, body)


def _parameters(arm: Mapping[str, Any], levels: Mapping[str, Any]) -> int | None:
    """Of the adapters that an arm's name is put together from: `b1`, `l4_b1`, `tree_eagle`."""
    if arm.get("parameters") is not None:
        return arm["parameters"]
    parts = [levels[part]["parameters"] for part in arm["name"].upper().split("_")
             if part in levels]  # fmt: skip
    return sum(parts) if parts else None


def _sides(results: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for level, entry in results["levels"].items():
        for name in ("shown", "hidden"):
            if name in entry:
                yield level + (", draft hidden" if name == "hidden" else ""), entry[name]


def _cosines(results: Mapping[str, Any]) -> Lines:
    titles = ["level", "right", "cosine", "correlation"]
    titles += [f"> {tau:.2f}: above, right, run" for tau in SHOWN_TAUS]
    titles += ["right at most 0.90"]
    body = []
    for name, side in _sides(results):
        points = {point["tau"]: point for point in side["curve"]}
        cells = [
            ", ".join((shown("{:.1%}", points[tau]["share"]),
                       shown("{:.1%}", points[tau]["token_match"]),
                       shown("{:.1f}", points[tau]["run"])))
            for tau in SHOWN_TAUS
        ]  # fmt: skip
        body.append([name, shown("{:.1%}", side["token_match"]), shown("{:.3f}", side["cos_sim"]),
                     shown("{:.2f}", side["correlation"]), *cells,
                     shown("{:.1%}", points[0.90]["token_match_below"])])  # fmt: skip
    return titles, body


def _alphas(results: Mapping[str, Any]) -> Lines:
    titles = ["level", *(f"{n}-alpha" for n in range(results["gamma"])), "accepted a verify",
              "tokens per verify", "live"]  # fmt: skip
    body = [
        [name, *(shown("{:.1%}", point["alpha"]) for point in side["alpha"]),
         shown("{:.2f}", side["replay"]["tokens_accepted"]),
         shown("{:.2f}", side["replay"]["tokens_per_verify"]),
         shown("{:.2f}", (side["live"] or {}).get("tokens_per_verify"))]
        for name, side in _sides(results)
    ]  # fmt: skip
    return titles, body


def _gap(results: Mapping[str, Any]) -> Lines:
    body = [
        [level, *(shown("{:.1f}", None if parts.get(key) is None else 100 * parts[key])
                  for key in PARTS)]
        for level, parts in results["gap"]["levels"].items()
    ]  # fmt: skip
    return ["level", *PARTS.values()], body


def _goals(results: Mapping[str, Any]) -> Lines:
    body = []
    for name, side in _sides(results):
        cells = []
        for key, (_, form, _) in GOALS.items():
            goal = side["viability"][key]
            verdict = {True: ", met", False: ", not met", None: ""}[goal["met"]]
            cells.append(shown(form, goal["value"]) + verdict)
        body.append([name, *cells])
    return ["level", *(f"{title} {goal}" for title, _, goal in GOALS.values())], body
