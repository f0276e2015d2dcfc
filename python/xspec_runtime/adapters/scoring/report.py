"""An adapter of states on material kept for a test, and the figures as a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from ..hidden import READS_DRAFT, HiddenAdapter
from ..training.states import States
from .steps import StateAdapter, level_of, score

if TYPE_CHECKING:
    from rich.table import Table

_LINES = (
    ("tokens", "tokens", "{:,}"),
    ("token_match", "tokens right", "{:.1%}"),
    ("consecutive_tokens", "right in a row, from the first", "{:.2f}"),
    ("top_5", "among five", "{:.1%}"),
    ("acceptance_rate", "acceptance, replayed", "{:.1%}"),
    ("tokens_per_verify", "tokens per verify, replayed", "{:.2f}"),
    ("cos_sim", "cosine", "{:.3f}"),
    ("accept_80", "cosine > 0.80", "{:.1%}"),
    ("accept_90", "cosine > 0.90", "{:.1%}"),
    ("consecutive_90", "cosine > 0.90 in a row", "{:.2f}"),
    ("match_above_90", "tokens right where cosine > 0.90", "{:.1%}"),
    ("correlation", "correlation of cosine and right token", "{:.2f}"),
)


def score_test(
    adapter: StateAdapter, record: Mapping[str, Any], states: States, head: torch.Tensor
) -> dict[str, Any]:
    """Figures with the draft shown, and hidden where the adapter reads it.

    Args:
        record: results.json of the adapter's run, or nothing.

    Raises:
        ValueError: these are the states that the adapter was trained on, or of another width.
    """
    level = check_test(adapter, record, states)
    rows = torch.arange(len(states))
    figures = {"level": level, "shown": score(adapter, states, rows, head)}
    if level in READS_DRAFT or not isinstance(adapter, HiddenAdapter):
        figures["hidden"] = score(adapter, states, rows, head, hide_draft=True)
    return figures


def check_test(adapter: StateAdapter, record: Mapping[str, Any], states: States) -> str:
    """The level of `adapter`, of which `states` can be a test. Arguments and errors as of
    `score_test`.
    """
    if record.get("digest") == states.digest:
        raise ValueError("these states trained the adapter: a test needs others")
    config, level = adapter.config, level_of(adapter)
    own = config.width if isinstance(adapter, HiddenAdapter) else config.token_width
    found = states.draft.shape[2], states.target.shape[2]
    if own != found[1] or (level != "B1" and config.draft_width != found[0]):
        raise ValueError(
            f"the adapter reads draft states of width {config.draft_width} and gives target states "
            f"of {own}, the test has {found[0]} and {found[1]}"
        )
    return level


def figures_table(figures: Mapping[str, Any]) -> Table:
    """One line a figure, one column for the draft shown and one for it hidden."""
    from rich.table import Table

    columns = [name for name in ("shown", "hidden") if name in figures]
    table = Table(title=f"{figures['level']}, {figures['shown']['answers']} answers")
    table.add_column("figure")
    for name in columns:
        table.add_column(f"draft {name}", justify="right")
    for key, title, form in (line for line in _LINES if line[0] in figures["shown"]):
        values = [figures[name][key] for name in columns]
        table.add_row(title, *("-" if v is None else form.format(v) for v in values))
    return table
