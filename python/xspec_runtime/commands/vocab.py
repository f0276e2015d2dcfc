"""`xspec vocab`: two tokenizers compared, and recorded drafts before and after translation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..cli import app, command


@command(app)
def vocab(
    left: Annotated[str, typer.Argument(help="Folder of the draft's tokenizer, or mini.")],
    right: Annotated[str, typer.Argument(help="Folder of the target's tokenizer, or mini.")],
    texts: Annotated[
        Path | None, typer.Option(help="Texts, one a line, to encode with both.")
    ] = None,
    apply: Annotated[
        Path | None, typer.Option(help="Recorded pairs or five-stage results to translate.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the comparison to this file.")
    ] = None,
) -> None:
    """Compare two vocabularies: shared tokens, ids that agree, what drafts lose in translation."""
    from ..files import check_output, read_lines, write_json
    from ..text_acceptance import read_answers, translated_acceptance
    from ..vocab import compare, load_tokenizer, render, same_ids

    lines = read_lines(texts) if texts else []
    answers = read_answers(apply) if apply else []
    if json_file:
        check_output(json_file)
    tokenizers = load_tokenizer(left), load_tokenizer(right)
    found = compare(*tokenizers)
    record = {"left": left, "right": right, **found.as_dict()}
    console = Console(soft_wrap=True, markup=False, highlight=False)
    console.print(render(found, (left, right)))
    if lines:
        record["same_ids_share"] = share = same_ids(*tokenizers, lines)
        console.print(f"{len(lines)} texts with the same ids: {share:.1%}")
    if answers:
        record["applied"] = applied = translated_acceptance(answers, found)
        console.print(
            f"{applied['answers']} answers of {apply}: position match "
            f"{applied['before']:.2%} before translation, {applied['after']:.2%} after"
        )
    if json_file:
        write_json(json_file, record)
