"""Results of the comparison as tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ..tables import terminal_table
from .arms import ARMS, LOOKUP, PLAIN

if TYPE_CHECKING:
    from rich.table import Table

TITLES = ("arm", "group", "tokens/forward", "vs generate", "vs lookup", "per request", "identical")


def drop_in_markdown(results: Mapping[str, Any]) -> str:
    """The table, and what its arms and columns mean.

    Raises:
        ValueError: the results are of another schema.
    """
    if results.get("schema") != "xspec.drop_in/1":
        raise ValueError("expected results of schema xspec.drop_in/1")
    lines = ["| " + " | ".join(row) + " |" for row in (TITLES, *_rows(results))]
    lines.insert(1, "|---|---|" + "---:|" * (len(TITLES) - 2))
    return "\n".join([*lines, "", _notes(results)])


def drop_in_table(results: Mapping[str, Any]) -> Table:
    """The table for a terminal (rich)."""
    return terminal_table(TITLES, _rows(results), range(2))


def _rows(results: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    lookup = next((arm["groups"] for arm in results["arms"] if arm["name"] == LOOKUP), {})
    for arm in results["arms"]:
        for group, found in arm["groups"].items():
            beside = lookup.get(group)
            low, high = found["spread"]
            yield (
                arm["name"] if group == "all" else "",
                group,
                f"{found['tokens_per_forward']:.2f}",
                f"{found['speedup']:.2f}x",
                f"{beside['total_ms'] / found['total_ms']:.2f}x" if beside else "-",
                f"{found['ratio']:.3f} ({low:.3f}-{high:.3f})",
                f"{found['identical']}/{found['answers']}",
            )


def _notes(results: Mapping[str, Any]) -> str:
    names = [arm["name"] for arm in results["arms"]]
    told = [f"`{name}`: {ARMS[name]}" for name in names if name != PLAIN]
    new, rows = (results["config"][key] for key in ("max_new_tokens", "rows"))
    notes = [
        f"Answers of at most {new} tokens, {rows} rows at most. Tokens/forward counts every token "
        "and every forward pass, the prompt's included; the next two columns divide summed wall "
        "times; per request: median and quartiles of the time beside `generate`'s on the same "
        f"prompt. The first call took {results['first_call_ms'] / 1e3:.1f} s: it packs weights "
        "and, on a new machine, times verifies.",
        "; ".join(told) + ".",
    ]
    if results["lookup"]:
        tokens, ngram = results["lookup"].values()
        notes.append(f"Prompt lookup's setting: {tokens} tokens after at most {ngram} that agree.")
    return "\n\n".join(notes)
