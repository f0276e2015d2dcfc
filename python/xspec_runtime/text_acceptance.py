"""How many tokens of one text stand at the same place in another: two texts, or recorded answers.

This is the token-level acceptance of the research: a share of positions, no acceptance of a verify,
which ends at its first miss (`first_divergence`). The word, character and length similarities that
it replaced are reported under `similarity`; they accept nothing.
"""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, pstdev

from transformers import PreTrainedTokenizerBase

from .files import read_json, read_text
from .metrics import consecutive_matches, published_acceptance
from .vocab import Comparison

SCHEMA = "xspec.tokens/1"
BINS = 10
# Weights of the similarity that was once called acceptance.
_WORDS, _LETTERS, _LENGTH = 0.5, 0.3, 0.2


@dataclass(frozen=True, slots=True)
class Answer:
    """A draft's and a target's answer to one question: texts, and ids where they were recorded."""

    draft_text: str
    target_text: str
    draft_ids: tuple[int, ...] = ()
    target_ids: tuple[int, ...] = ()
    question: str = ""


@dataclass(frozen=True, slots=True)
class Compared:
    """One answer, position by position.

    Attributes:
        draft, target: ids, or words where there is no tokenizer; no beginning-of-sequence.
        published: `metrics.published_acceptance` without it.
        first_divergence: tokens before the first that differ.
        similarity: word, character and length similarity and their weighted sum; no acceptance.
    """

    draft: Sequence[int | str]
    target: Sequence[int | str]
    published: dict[str, int | float | str | None]
    first_divergence: int
    similarity: dict[str, float]


def read_answers(path: Path) -> list[Answer]:
    """Answers from JSON lines, ``{"results": [...]}`` or a list: token pairs (``egpt_tokens``,
    ``vl_tokens`` and texts) or five-stage results (``eventgpt`` and ``videollava`` objects).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or holds nothing of the kind; names the row.
    """
    if path.suffix == ".jsonl":
        rows: object = []
        for number, line in enumerate(read_text(path, "recorded answers").splitlines(), 1):
            try:
                rows.extend([json.loads(line)] if line.strip() else [])
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number} is not JSON: {error}") from None
    else:
        rows = read_json(path, "recorded answers")
        rows = rows.get("results") if isinstance(rows, dict) else rows
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{path} holds no recorded answers: expected rows, or `results`")
    return [_answer(f"{path}, row {i}", row) for i, row in enumerate(rows)]


def compare_answer(answer: Answer, tokenizer: PreTrainedTokenizerBase | None = None) -> Compared:
    """Compare the texts in tokens of `tokenizer`, which should be the target's; without one the
    recorded ids, and without these words. The method is recorded.
    """
    if tokenizer is not None:
        cut: Callable = lambda text: tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
        draft, target = cut(answer.draft_text), cut(answer.target_text)
        method = "retokenized"
    elif answer.draft_ids and answer.target_ids:
        draft, target, method = answer.draft_ids, answer.target_ids, "recorded_ids"
    else:
        draft, target = answer.draft_text.split(), answer.target_text.split()
        method = "words"
    return Compared(
        draft,
        target,
        {**published_acceptance(draft, target, bos=None), "method": method},
        consecutive_matches(draft, target),
        _similarity(answer.draft_text, answer.target_text),
    )


def summarize_answers(compared: Sequence[Compared]) -> dict:
    """Statistics over answers, in the published keys and ours."""
    rates = [c.published["acceptance_rate"] or 0.0 for c in compared]
    matched = sum(c.published["matched_tokens"] for c in compared)
    total = sum(c.published["total_tokens"] for c in compared)
    bins = Counter(min(BINS - 1, int(rate * BINS)) for rate in rates)
    diverged = Counter(c.first_divergence for c in compared)
    return {
        "schema": SCHEMA,
        "answers": len(compared),
        "method": sorted({str(c.published["method"]) for c in compared}),
        "acceptance_rate_avg": mean(rates),
        "acceptance_rate_std": pstdev(rates),
        "acceptance_rate_min": min(rates),
        "acceptance_rate_median": median(rates),
        "acceptance_rate_max": max(rates),
        "matched_tokens_total": matched,
        "total_tokens_compared": total,
        "acceptance_rate_of_totals": matched / total if total else 0.0,
        "histogram": [bins[i] for i in range(BINS)],
        "first_divergence_histogram": {str(k): diverged[k] for k in sorted(diverged)},
        "similarity_not_acceptance": {
            key: mean(c.similarity[key] for c in compared) for key in compared[0].similarity
        },
    }


def first_token_confusions(
    compared: Sequence[Compared], top: int = 10
) -> list[tuple[int | str, int | str, int]]:
    """(draft token, target token, count) at the first divergence, the most frequent first."""
    pairs = Counter(
        (c.draft[c.first_divergence], c.target[c.first_divergence])
        for c in compared
        if c.first_divergence < min(len(c.draft), len(c.target))
    )
    return [(*pair, count) for pair, count in pairs.most_common(top)]


def translated_acceptance(answers: Sequence[Answer], found: Comparison) -> dict[str, float]:
    """Position match of recorded draft ids, as they are and translated by `found`.

    Raises:
        ValueError: an answer has no ids, or ids that the left vocabulary has not.
    """
    before, after, table = [], [], found.left_to_right
    for i, answer in enumerate(answers):
        if not answer.draft_ids or not answer.target_ids:
            raise ValueError(f"answer {i} has no recorded ids to translate")
        if (highest := max(answer.draft_ids)) >= len(table):
            raise ValueError(
                f"answer {i} holds id {highest}, the draft's vocabulary ends at {len(table) - 1}"
            )
        # What has no counterpart keeps its place: it misses, and what follows may still match.
        moved = [table[token] for token in answer.draft_ids]
        for rates, ids in ((before, answer.draft_ids), (after, moved)):
            rates.append(published_acceptance(ids, answer.target_ids)["acceptance_rate"] or 0.0)
    return {"answers": len(answers), "before": mean(before), "after": mean(after)}


def _similarity(draft: str, target: str) -> dict[str, float]:
    a, b = set(draft.lower().split()), set(target.lower().split())
    words = len(a & b) / len(a | b) if a | b else 1.0
    letters = difflib.SequenceMatcher(None, draft.lower(), target.lower(), autojunk=False).ratio()
    longest = max(len(draft), len(target))
    length = min(len(draft), len(target)) / longest if longest else 1.0
    return {
        "word_overlap": words,
        "char_similarity": letters,
        "length_similarity": length,
        "weighted": _WORDS * words + _LETTERS * letters + _LENGTH * length,
    }


def _answer(where: str, row: object) -> Answer:
    if not isinstance(row, dict):
        raise ValueError(f"{where} must be an object, got {type(row).__name__}")
    if isinstance(row.get("eventgpt"), dict) and isinstance(row.get("videollava"), dict):
        draft, target = row["eventgpt"], row["videollava"]
        values = [m.get(key) for m in (draft, target) for key in ("output_text", "output_tokens")]
    else:
        keys = ("egpt_text", "egpt_tokens", "vl_text", "vl_tokens")
        values = [row.get(key) for key in keys]
    draft_text, draft_ids, target_text, target_ids = values
    if draft_text is None and draft_ids is None:
        raise ValueError(f"{where} has neither egpt_tokens, egpt_text nor eventgpt.output_tokens")
    for ids in (draft_ids, target_ids):
        if ids is not None and not (
            isinstance(ids, list) and all(type(i) is int and i >= 0 for i in ids)
        ):
            raise ValueError(f"{where}: token ids must be a list of integers >= 0")
    return Answer(
        str(draft_text or ""),
        str(target_text or ""),
        tuple(draft_ids or ()),
        tuple(target_ids or ()),
        str(row.get("query") or row.get("question") or ""),
    )
