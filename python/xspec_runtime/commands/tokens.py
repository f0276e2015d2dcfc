"""`xspec tokens`: token-level acceptance of two texts, two files of texts, or recorded answers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..cli import app, command


@command(app)
def tokens(
    draft: Annotated[
        str, typer.Argument(help="A text, a file of texts, one a line, or recorded answers (JSON).")
    ],
    target: Annotated[
        str, typer.Argument(help="The target's text or file; recorded answers hold both.")
    ] = "",
    tokenizer: Annotated[
        str, typer.Option(help="Of the target: a folder or mini; without it, ids as recorded.")
    ] = "",
    inspect: Annotated[
        Path | None,
        typer.Option(help="Folder for INSPECT.html and INSPECT.md: answers side by side."),
    ] = None,
    show: Annotated[int, typer.Option(help="Answers shown side by side.")] = 50,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the statistics to this file.")
    ] = None,
) -> None:
    """Count the tokens of a draft's text that stand where the target has them; runs no model."""
    from ..files import check_output, write_json, write_text
    from ..text_acceptance import compare_answer, summarize_answers
    from ..text_report import html, markdown
    from ..vocab import load_tokenizer

    if show < 0:
        raise ValueError(f"--show must be at least 0, got {show}")
    answers = _answers(draft, target)
    pages = [inspect / f"INSPECT.{end}" for end in ("html", "md")] if inspect else []
    for path in filter(None, (json_file, *pages)):
        check_output(path)
    words = load_tokenizer(tokenizer) if tokenizer else None
    if words and not any(answer.draft_text for answer in answers):
        raise ValueError("the recorded answers hold ids only; leave out --tokenizer")
    compared = [compare_answer(answer, words) for answer in answers]
    summary = summarize_answers(compared)

    def spell(token: int | str) -> str:
        return words.decode([token]) if words else f"{token} "

    console = Console(soft_wrap=True)
    console.print(
        f"{summary['answers']} answers ({', '.join(summary['method'])}): "
        f"{summary['matched_tokens_total']} of {summary['total_tokens_compared']} tokens at the "
        f"same place; per answer mean {summary['acceptance_rate_avg']:.2%}, median "
        f"{summary['acceptance_rate_median']:.2%}, {summary['acceptance_rate_min']:.2%} to "
        f"{summary['acceptance_rate_max']:.2%}",
        highlight=False,
    )
    for path, page in zip(pages, (html, markdown), strict=False):
        write_text(path, page(summary, compared, answers, spell, show))
    if json_file:
        write_json(json_file, summary)


def _answers(draft: str, target: str):
    from ..files import read_lines
    from ..text_acceptance import Answer, read_answers

    if not target:
        if not _is_file(draft):
            raise ValueError(f"{draft!r} is no file of recorded answers; for a text, give two")
        return read_answers(Path(draft))
    if _is_file(draft) != _is_file(target):
        raise ValueError("give two texts or two files, not one of each")
    if not _is_file(draft):
        if not draft.strip() or not target.strip():
            raise ValueError(f"the {'target' if draft.strip() else 'draft'}'s text is empty")
        return [Answer(draft, target)]
    left, right = read_lines(Path(draft)), read_lines(Path(target))
    if len(left) != len(right):
        raise ValueError(f"{draft} has {len(left)} texts, {target} has {len(right)}")
    return [Answer(a, b) for a, b in zip(left, right, strict=True)]


def _is_file(text: str) -> bool:
    """Whether `text` names a file; a whole answer is longer than a name may be."""
    try:
        return Path(text).is_file()
    except OSError:
        return False
