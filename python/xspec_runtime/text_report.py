"""Answers side by side: where draft and target agree, as HTML and as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape

from .text_acceptance import BINS, Answer, Compared, first_token_confusions

Spell = Callable[[int | str], str]
_STYLE = (
    "body{font:14px sans-serif;max-width:72em;margin:2em auto}"
    "code{white-space:pre-wrap;font:13px monospace;line-height:1.7}"
    ".same{background:#cdeccd}.other{background:#f5d0d0}.beyond{color:#888}"
    "td,th{padding:.1em .7em;text-align:left}"
)


def markdown(
    summary: dict, compared: Sequence[Compared], answers: Sequence[Answer], spell: Spell, show: int
) -> str:
    """Statistics, first divergences, confusions, and the first `show` answers aligned."""
    lines = [
        "# Tokens at the same place",
        "",
        f"{summary['answers']} answers, method {', '.join(summary['method'])}. A share of the "
        "target's positions; a verify stops at the first miss.",
        "",
        "| share | min | median | mean | max | std | of all tokens |",
        "|---|---|---|---|---|---|---|",
        "| |"
        + "|".join(
            f" {summary[f'acceptance_rate_{key}']:.2%} "
            for key in ("min", "median", "avg", "max", "std")
        )
        + f"| {summary['matched_tokens_total']} / {summary['total_tokens_compared']} = "
        f"{summary['acceptance_rate_of_totals']:.2%} |",
        "",
        "| share from | answers |",
        "|---|---|",
        *(f"| {i / BINS:.0%} | {n} |" for i, n in enumerate(summary["histogram"])),
        "",
        "| tokens before the first miss | answers |",
        "|---|---|",
        *(f"| {k} | {n} |" for k, n in summary["first_divergence_histogram"].items()),
        "",
        "Similarities, which are no acceptance: "
        + ", ".join(f"{k} {v:.2f}" for k, v in summary["similarity_not_acceptance"].items())
        + ".",
        "",
        "| at the first miss: draft | target | answers |",
        "|---|---|---|",
    ]
    lines += [
        f"| {_cell(spell(a))} | {_cell(spell(b))} | {count} |"
        for a, b, count in first_token_confusions(compared)
    ]
    for answer, found in list(zip(answers, compared, strict=True))[:show]:
        marks = ["=" if a == b else "x" for a, b in zip(found.draft, found.target, strict=False)]
        lines += [
            "",
            f"## {_cell(answer.question) or 'Answer'}",
            "",
            f"{found.published['matched_tokens']} of {found.published['total_tokens']} tokens, "
            f"{found.first_divergence} before the first miss: `{''.join(marks)}`",
            "",
            f"- draft: {_cell(answer.draft_text)}",
            f"- target: {_cell(answer.target_text)}",
        ]
    return "\n".join(lines) + "\n"


def html(
    summary: dict, compared: Sequence[Compared], answers: Sequence[Answer], spell: Spell, show: int
) -> str:
    """One page without scripts: equal tokens green, others red."""
    parts = [
        "<!doctype html><meta charset='utf-8'><title>Tokens at the same place</title>",
        f"<style>{_STYLE}</style><h1>Tokens at the same place</h1>",
        f"<p>{summary['answers']} answers, method {escape(', '.join(summary['method']))}: "
        f"mean {summary['acceptance_rate_avg']:.2%}, median "
        f"{summary['acceptance_rate_median']:.2%}, "
        f"{summary['matched_tokens_total']} of {summary['total_tokens_compared']} tokens.</p>",
        "<table><tr><th>tokens before the first miss<th>answers",
        *(f"<tr><td>{k}<td>{n}" for k, n in summary["first_divergence_histogram"].items()),
        "</table><table><tr><th>draft at the first miss<th>target<th>answers",
        *(
            f"<tr><td>{escape(spell(a))}<td>{escape(spell(b))}<td>{count}"
            for a, b, count in first_token_confusions(compared)
        ),
        "</table>",
    ]
    for answer, found in list(zip(answers, compared, strict=True))[:show]:
        parts += [
            f"<h2>{escape(answer.question) or 'Answer'}</h2>",
            f"<p>draft<br><code>{_colored(found.draft, found.target, spell)}</code>",
            f"<p>target<br><code>{_colored(found.target, found.draft, spell)}</code>",
        ]
    return "\n".join(parts) + "\n"


def _colored(tokens: Sequence[int | str], other: Sequence[int | str], spell: Spell) -> str:
    out = []
    for i, token in enumerate(tokens):
        kind = "beyond" if i >= len(other) else "same" if token == other[i] else "other"
        out.append(f"<span class='{kind}'>{escape(spell(token))}</span>")
    return "".join(out)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").strip()
