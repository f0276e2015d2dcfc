"""Adapters of texts, trained on recorded pairs: the draft's text in, the target's tokens out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from ...data.pairs import known_drives, read_pairs
from ...files import read_json
from .. import alignment
from ..base import PAD
from ..prefix_adapter import PrefixAdapter, PrefixAdapterConfig
from ..token_adapter import CONFIGURABLE, TokenAdapter, TokenAdapterConfig
from .loop import Progress, Training, fit, run_key, split_rows
from .pair_loss import check_pairs, predictions

TOKEN, PREFIX = "TOKEN", "PREFIX"
TEXT_LEVELS = (TOKEN, PREFIX)
# The published network as shipped and as configurable, and one that reads the verified prefix.
NETWORKS = {"token": TOKEN, "token-bias": TOKEN, "prefix": PREFIX}
ROWS = 64
TextAdapter = TokenAdapter | PrefixAdapter


@dataclass(frozen=True)
class TextTraining(Training):
    """How an adapter of texts is trained; a hidden draft is nothing but padding.

    Attributes:
        smoothing: share of the label that is spread over the vocabulary.
    """

    smoothing: float = 0.1

    def __post_init__(self) -> None:
        """Raises `ValueError` naming the first value out of range."""
        super().__post_init__()
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"smoothing must be from 0 to below 1, got {self.smoothing}")


@dataclass(frozen=True)
class TextPairs:
    """Texts of both models.

    Attributes:
        drafts, targets: ids ``[N, L]`` and ``[N, T]``, `PAD` behind.
        folds: rows of one drive each, or None where drives are not known.
        digest: of all ids of their file.
        draft_name: the draft model as the file calls it, or "".
        vocab_size: of both.
    """

    drafts: torch.Tensor
    targets: torch.Tensor
    folds: list[list[int]] | None
    digest: str
    draft_name: str
    vocab_size: int

    def __len__(self) -> int:
        return len(self.drafts)

    def to(self, device: str | torch.device) -> TextPairs:
        """The same on a device."""
        return replace(self, drafts=self.drafts.to(device), targets=self.targets.to(device))


def open_text_pairs(path: Path, vocab_size: int, limit: int | None = None) -> TextPairs:
    """The pairs of a file, as `xspec extract` writes them, or its first `limit`.

    The digest is of the whole file: none of it is a test of what some of it trained.

    Raises:
        ValueError: names the row and what is wrong with it, an id of `vocab_size` or above among
            that.
    """
    whole = read_pairs(path, vocab_size=vocab_size)
    pairs = whole if limit is None else read_pairs(path, limit, vocab_size)
    return TextPairs(
        padded([pair.draft for pair in pairs]),
        padded([pair.target for pair in pairs]),
        known_drives(pairs),
        sha256(repr([(pair.draft, pair.target) for pair in whole]).encode()).hexdigest(),
        str(header(path).get("draft") or ""),
        vocab_size,
    )


def header(path: Path) -> dict[str, Any]:
    """What a file of pairs says beside its rows; nothing where it is JSON lines."""
    try:
        values = read_json(path)
    except (ValueError, json.JSONDecodeError):
        return {}
    return values if isinstance(values, dict) and "results" in values else {}


def padded(texts: Sequence[Sequence[int]]) -> torch.Tensor:
    """Ids ``[N, longest]``, `PAD` behind."""
    out = torch.full((len(texts), max(map(len, texts))), PAD)
    for row, text in zip(out, texts, strict=True):
        row[: len(text)] = torch.tensor(text)
    return out


def build(network: str, pairs: TextPairs, sizes: Mapping[str, Any]) -> TextAdapter:
    """An untrained adapter, one of `NETWORKS`, of published sizes where `sizes` gives no others.

    Raises:
        ValueError: there is no such network or size, or a size is out of range.
    """
    if network not in NETWORKS:
        raise ValueError(f"network must be one of {', '.join(NETWORKS)}, got {network!r}")
    given = {"vocab_size": pairs.vocab_size, **sizes}
    try:
        if network == "prefix":
            reach = {"draft_positions": pairs.drafts.shape[1], "positions": pairs.targets.shape[1]}
            return PrefixAdapter(PrefixAdapterConfig(**reach | given))
        flags = CONFIGURABLE if network == "token-bias" else {}
        return TokenAdapter(TokenAdapterConfig(**flags | given))
    except TypeError as error:
        raise ValueError(f"{network} has no such size: {error}") from None


@dataclass(frozen=True)
class TextLesson:
    """An adapter and the texts it learns from, see `loop.Lesson`."""

    module: TextAdapter
    pairs: TextPairs
    plan: TextTraining
    reads_draft: bool = True

    def loss(self, rows: torch.Tensor, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross entropy of the target's tokens."""
        draft = self.pairs.drafts[rows]
        draft = draft.masked_fill(hidden[:, None].to(draft.device), PAD)
        logits, expected = predictions(self.module, draft, self.pairs.targets[rows])
        keep = expected != PAD
        weight = self.plan.position_weights(expected.shape[1]).to(keep.device)
        weight = weight.expand_as(keep)[keep]
        loss = F.cross_entropy(
            logits[keep], expected[keep], reduction="none", label_smoothing=self.plan.smoothing
        )
        return (weight * loss).sum(), weight.sum()

    def figures(self, rows: torch.Tensor) -> dict[str, Any]:
        """See `score_texts`."""
        return score_texts(self.module, self.pairs, rows)


def train_text(
    network: str,
    pairs: TextPairs,
    plan: TextTraining | None = None,
    sizes: Mapping[str, Any] | None = None,
    state: Path | None = None,
    progress: Progress = lambda step, steps, loss: None,
) -> tuple[TextAdapter, list[dict[str, Any]]]:
    """The adapter of the best validation loss, and what every epoch measured.

    Args:
        network: one of `NETWORKS`.
        pairs: on the device that trains.
        sizes: of the configuration, in place of the published ones.
        state, progress: see `fit`.

    Raises:
        ValueError: see `build`, `check_pairs`, `split_rows`, `fit`.
    """
    plan, sizes = plan or TextTraining(), dict(sizes or {})
    rows = split_rows(len(pairs), plan.held_out, pairs.folds)
    torch.manual_seed(plan.seed)
    adapter = build(network, pairs, sizes).to(pairs.drafts.device)
    lesson = TextLesson(adapter, pairs, plan)
    check_pairs(adapter.config.vocab_size, pairs.drafts, pairs.targets)
    key = run_key(plan, network, pairs.digest, sizes)
    history = fit(lesson, rows, plan, key, state, progress)
    return adapter.requires_grad_(False), history


@torch.inference_mode()
def score_texts(adapter: TextAdapter, pairs: TextPairs, rows: torch.Tensor) -> dict[str, Any]:
    """Figures of `adapter`, which sees the target's true prefix where it reads one; None where
    nothing was counted.

    Returns:
        ``answers``, ``tokens``, ``token_match``, ``top_5``, ``consecutive_tokens`` (right ones from
        the first predicted on, a mean over answers), and ``token_match_hidden``, without the draft.
    """
    was_training = adapter.training
    adapter.eval()
    tally = Tally(len(rows))
    for part in rows.split(ROWS):
        drafts, targets = pairs.drafts[part], pairs.targets[part]
        logits, expected = predictions(adapter, drafts, targets)
        blind = predictions(adapter, torch.full_like(drafts, PAD), targets)[0]
        tally.add(logits, blind, expected, expected != PAD)
    adapter.train(was_training)
    return tally.figures()


@dataclass
class Tally:
    """How often the right token was foretold, over `answers` answers."""

    answers: int
    tokens: int = 0
    first: int = 0
    five: int = 0
    in_a_row: int = 0
    blind: int | None = None

    def add(
        self,
        logits: torch.Tensor,
        blind: torch.Tensor | None,
        expected: torch.Tensor,
        there: torch.Tensor,
    ) -> None:
        """Count logits ``[B, P, V]``, with the draft hidden `blind`, of the ids ``[B, P]`` where
        `there` (bool).
        """
        ranked = logits.topk(min(5, logits.shape[2]), -1).indices
        hits = (ranked == expected[..., None]) & there[..., None]
        self.tokens += int(there.sum())
        self.first += int(hits[..., 0].sum())
        self.five += int(hits.sum())
        self.in_a_row += int(hits[..., 0].int().cumprod(1).sum())
        if blind is not None:
            self.blind = (self.blind or 0) + int(((blind.argmax(-1) == expected) & there).sum())

    def figures(self) -> dict[str, Any]:
        """See `score_texts`; no ``token_match_hidden`` where nothing was hidden."""

        def share(count: int) -> float | None:
            return count / self.tokens if self.tokens else None

        figures = {
            "answers": self.answers,
            "tokens": self.tokens,
            "token_match": share(self.first),
            "top_5": share(self.five),
            "consecutive_tokens": self.in_a_row / self.answers,
        }
        blind = {} if self.blind is None else {"token_match_hidden": share(self.blind)}
        return figures | blind


def constant_match(targets: torch.Tensor, train: torch.Tensor, held: torch.Tensor) -> float | None:
    """Share of the tokens of ``targets[held]`` that the commonest token of each position of
    ``targets[train]`` foretells, over the positions that adapters predict.
    """
    expected = alignment.labels(targets, targets.shape[1], PAD)
    spoken = expected[train].masked_fill(expected[train] == PAD, -1)
    told = torch.tensor([column[column >= 0].mode().values.item() if (column >= 0).any() else -1
                         for column in spoken.T])  # fmt: skip
    there = expected[held] != PAD
    right = (expected[held] == told) & there
    return int(right.sum()) / int(there.sum()) if there.any() else None
