"""Trained adapters of texts and tuned drafts as arms of the embedded pair's comparison."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ...drafters.adapter import DraftText
from ...drafters.base import Drafter, Request
from ...drafters.draft_model import ModelDrafter
from ...files import existing_file
from ...models import mini
from ...targets.llama import LlamaTarget
from ..checkpoint import adapter_config
from ..network import takes
from ..training.draft_folder import DRAFT_LEVELS
from ..training.runs import find_run, levels, run_record
from ..training.text import TEXT_LEVELS, TOKEN
from .hidden import CONSTANT, state_arms, usable
from .pair import HIDDEN, TAIL, text_reader
from .states import DRAFT

LEVELS = (*TEXT_LEVELS, *DRAFT_LEVELS)


def trained_arms(
    folder: Path | None,
    chosen: str = "",
    which: str = "",
    tapped: bool = True,
    tails: bool = False,
) -> tuple[list[str], list[str]]:
    """The arms of `state_arms`, and those that the runs of `LEVELS` below `folder` give: a level's
    lower-case name and the same with the draft hidden; a constant string beside them.

    Args:
        chosen: as of `state_arms`, with `LEVELS` besides.
        which, tapped: as of `state_arms`.
        tails: a TokenAdapter of widths that kernels take is a `TAIL` arm, too.

    Raises:
        FileNotFoundError, ValueError: as `state_arms`.
    """
    names = [name.strip() for name in chosen.split(",") if name.strip()]
    own = [name for name in names if name in LEVELS]
    others = [name for name in names if name not in LEVELS]
    if folder is None:
        return state_arms(None, chosen), []
    if not folder.is_dir():
        raise FileNotFoundError(f"folder of trained adapters not found: {folder}")
    if not names and not levels(folder):
        raise FileNotFoundError(f"{folder} holds no run of `xspec train`")
    if not names:
        trained = set(levels(folder, which))
        own = [level for level in LEVELS if level in trained]
        of_states = not trained.isdisjoint(usable(tapped)) or not own
    else:
        of_states = bool(others)
    states = state_arms(folder, ",".join(others), which, tapped) if of_states else []
    arms = [] if states else [CONSTANT]
    for level in own:
        at, kinds = find_run(folder, level, which), [""]
        if level in DRAFT_LEVELS:
            existing_file(at / "config.json", "tuned draft")
        else:
            config = adapter_config(at, mini.VOCAB)
            kinds += [TAIL] if tails and level == TOKEN and takes(config) else []
        arms += [level.lower() + kind + suffix for kind in kinds for suffix in ("", HIDDEN)]
    return states, arms


def text_drafter(
    arm: str,
    gamma: int,
    folder: Path,
    which: str,
    draft: Callable[[str], PreTrainedModel],
    tuned: Callable[[str], PreTrainedModel],
    target: LlamaTarget | None = None,
) -> Drafter:
    """A fresh drafter of one of `trained_arms` that is of no states.

    Args:
        which: the run, see `find_run`.
        draft: the draft model of a name, `DRAFT` or another.
        tuned: the draft model in a folder.
        target: which a `TAIL` arm drafts for.

    Raises:
        ValueError, RuntimeError, FileNotFoundError: there is no such adapter, or it does not fit.
    """
    level, hidden = arm.removesuffix(HIDDEN).removesuffix(TAIL).upper(), arm.endswith(HIDDEN)
    at = find_run(folder, level, which)
    if level in DRAFT_LEVELS:
        kind = BlindDrafter if hidden else ModelDrafter
        return kind(tuned(str(at)), gamma, name=arm)
    text = None
    if not hidden:
        model = draft(run_record(at).get("draft") or DRAFT)
        text = DraftText(model, (mini.EOS,), mini.MAX_NEW_TOKENS)
    return text_reader(at, arm, gamma, text, target)


class BlindDrafter(ModelDrafter):
    """`ModelDrafter` that sees zeros in place of its event images: what it is worth then, it owes
    to the question and to the target's own words.
    """

    def begin(self, request: Request) -> None:
        """See `ModelDrafter.begin`."""
        blind = {
            name: torch.zeros_like(value) if value.is_floating_point() else value
            for name, value in request.draft_inputs.items()
        }
        super().begin(replace(request, draft_inputs=blind))
