"""Losses of adapters on pairs of a draft's text and the target's answer."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from .. import alignment
from ..base import PAD
from ..prefix_adapter import PrefixAdapter
from ..token_adapter import TokenAdapter
from .loop import HIDDEN_SHARE

Loss = Callable[[int, torch.Generator], torch.Tensor]
BATCH = 32


def hide(draft: torch.Tensor, share: float, generator: torch.Generator) -> torch.Tensor:
    """`draft` ids ``[B, L]`` with about `share` of its rows replaced by padding.

    A network trained so also knows what to say without a draft: its figures with the draft hidden
    then measure the draft's worth and not the surprise.
    """
    hidden = torch.rand(len(draft), 1, generator=generator) < share
    return draft.masked_fill(hidden, PAD)


def pair_loss(adapter: TokenAdapter | PrefixAdapter, drafts, targets, batch: int = BATCH) -> Loss:
    """Cross entropy of random pairs, a function of the step's generator alone.

    Args:
        drafts, targets: ids ``[pairs, L]`` and ``[pairs, T]``, `PAD` behind.

    Raises:
        ValueError: see `check_pairs`.
    """
    check_pairs(adapter.config.vocab_size, drafts, targets)

    def loss(step: int, generator: torch.Generator) -> torch.Tensor:
        # Dropout draws from the global generator; seeded here, a resumed run repeats it.
        torch.manual_seed(generator.initial_seed())
        rows = torch.randint(0, len(drafts), (batch,), generator=generator)
        draft = hide(drafts[rows], HIDDEN_SHARE, generator)
        logits, expected = predictions(adapter, draft, targets[rows])
        keep = expected != PAD
        return F.cross_entropy(logits[keep], expected[keep])

    return loss


def check_pairs(vocab_size: int, drafts: torch.Tensor, targets: torch.Tensor) -> None:
    """Raises `ValueError` unless there are pairs, as many drafts as targets, and all ids lie in the
    vocabulary.
    """
    if len(drafts) != len(targets) or not len(drafts):
        raise ValueError(
            f"training needs as many drafts as targets, got {len(drafts)} and {len(targets)}"
        )
    for name, ids in (("draft", drafts), ("target", targets)):
        if not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
            raise ValueError(
                f"{name} ids must be from 0 to {vocab_size - 1}, got {int(ids.min())} to "
                f"{int(ids.max())}"
            )


def predictions(
    adapter: TokenAdapter | PrefixAdapter, draft: torch.Tensor, target: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits ``[B, P, V]`` at every input position, and the ids ``[B, P]`` they should say."""
    if isinstance(adapter, TokenAdapter):
        logits = adapter(fit_width(draft, adapter.config.positions))
    else:
        prefix = target[:, : adapter.config.positions]
        logits = adapter(draft[:, : adapter.config.draft_positions], prefix)
    return logits, alignment.labels(target, logits.shape[1], PAD)


def fit_width(ids: torch.Tensor, width: int) -> torch.Tensor:
    """`ids` ``[B, L]`` cut or padded to ``[B, width]``."""
    return F.pad(ids[:, :width], (0, max(width - ids.shape[1], 0)), value=PAD)
