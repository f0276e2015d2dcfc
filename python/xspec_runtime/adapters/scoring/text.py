"""An adapter of texts on pairs kept for a test."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ...data.pairs import read_pairs
from ...drafters.adapter import AdapterDrafter
from ..mini.pair import recorded_text, replay_figures
from ..prefix_adapter import PrefixAdapter
from ..token_adapter import TokenAdapter
from ..training.text import PREFIX, TOKEN, TextAdapter, open_text_pairs, score_texts

GAMMA = 5


def is_text_adapter(adapter: object) -> bool:
    """Whether it reads texts and not states."""
    return isinstance(adapter, TokenAdapter | PrefixAdapter)


def score_text_test(
    adapter: TextAdapter, record: Mapping[str, Any], path: Path, gamma: int = GAMMA
) -> dict[str, Any]:
    """Figures with the draft shown and hidden: single steps from true texts, and the rounds of
    greedy decoding with `gamma` drafts, replayed.

    Args:
        record: results.json of the adapter's run, or nothing.
        path: file of pairs.

    Raises:
        ValueError: these are the pairs that the adapter was trained on, or one is damaged.
    """
    vocab_size = adapter.config.vocab_size
    texts = open_text_pairs(path, vocab_size)
    if record.get("digest") == texts.digest:
        raise ValueError("these pairs trained the adapter: a test needs others")
    pairs = read_pairs(path, vocab_size=vocab_size)
    single = score_texts(adapter, texts, torch.arange(len(texts)))
    blind = {**dict.fromkeys(single), "token_match": single["token_match_hidden"]}
    figures = {"level": TOKEN if isinstance(adapter, TokenAdapter) else PREFIX, "gamma": gamma}
    for name, hidden, values in (("shown", False, single), ("hidden", True, blind)):
        drafter = AdapterDrafter(adapter, gamma, recorded_text, hide_draft=hidden)
        figures[name] = values | replay_figures(drafter, pairs, gamma)
    return figures
