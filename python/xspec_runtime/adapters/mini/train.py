"""Training of the embedded pair's adapters, a stage of its own behind the target's answers."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from ...files import replace_file
from ...models import mini
from ...models.mini_run import Run, pad
from ..checkpoint import save_adapter
from ..prefix_adapter import PrefixAdapter, PrefixAdapterConfig
from ..token_adapter import TokenAdapter, TokenAdapterConfig
from ..training.pair_loss import pair_loss
from .pair import ADAPTERS, greedy_drafts

STEPS = {"adapter": 300, "adapter_prefix": 1000}


def build(name: str, draft_positions: int, positions: int) -> TokenAdapter | PrefixAdapter:
    """An untrained adapter, `adapter` or `adapter_prefix`, for texts of such lengths."""
    if name == "adapter":
        return TokenAdapter(TokenAdapterConfig(mini.VOCAB, 128, 1, 2, 256, positions, tied=True))
    config = PrefixAdapterConfig(mini.VOCAB, draft_positions=draft_positions, positions=positions)
    return PrefixAdapter(config)


def train_adapters(
    run: Run, drafts: torch.Tensor, targets: torch.Tensor, to: Path, steps: int | None = None
) -> None:
    """Train both adapters and write them to ``to/adapter`` and ``to/adapter_prefix``.

    Args:
        run: its folder keeps unfinished training, its record what was measured.
        drafts, targets: greedy answers of the raw draft and of the target to the same scenes, ids
            ``[scenes, L]`` and ``[scenes, T]``, padded behind.
        steps: instead of `STEPS`, for trials.
    """
    for number, name in enumerate(ADAPTERS):
        torch.manual_seed(run.plan.seed * 100 + 10 + number)
        adapter = build(name, drafts.shape[1], targets.shape[1])
        loss = pair_loss(adapter, drafts, targets)
        modules = nn.ModuleDict({"adapter": adapter})
        run.fit(name, modules, steps or STEPS[name], loss)
        save_adapter(adapter, to / name)


def draft_texts(run: Run, model) -> torch.Tensor:
    """Greedy answers of the raw draft on the first training scenes, padded ``[answers, length]``;
    as many as `target_answers` gives."""
    path = run.out / "draft_texts.pt"
    if not path.exists():
        rows = greedy_drafts(model, run.events[: run.plan.answers], run.tokenizer)
        replace_file(path, lambda temporary: torch.save(pad(rows), temporary))
    return torch.load(path, weights_only=True)
