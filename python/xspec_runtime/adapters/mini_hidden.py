"""Trained adapters of states as arms of the embedded pair's end-to-end comparison."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from transformers import PreTrainedModel

from ..data.pairs import Pair
from ..drafters.base import Drafter
from ..drafters.hidden import DraftStates, HiddenDrafter
from ..models import mini
from ..replay.arms import SOURCES, Training, Variant
from ..targets.tapped import TappedTarget
from .alignment import STATE_LEVELS
from .checkpoint import load_adapter
from .hidden import HiddenAdapter
from .mini_pair import HIDDEN
from .mini_states import DRAFT
from .runs import find_run, levels, run_record

CONSTANT = "constant"
# B1 reads no draft, so there is nothing to hide from it.
WITHOUT_DRAFT = ("B1",)


def state_arms(folder: Path | None, chosen: str = "") -> list[str]:
    """The arms that the runs below `folder` give: a level's lower-case name, the same with the
    draft hidden, and a constant string beside them.

    Args:
        chosen: levels, separated by commas; all that were trained where empty.

    Raises:
        FileNotFoundError: a level has no run, or there is none at all.
        ValueError: a level does not exist.
    """
    if folder is None:
        if chosen:
            raise ValueError("--adapter-level needs --adapters, the folder of trained adapters")
        return []
    names = [name.strip() for name in chosen.split(",") if name.strip()]
    if unknown := set(names) - set(STATE_LEVELS):
        raise ValueError(
            f"--adapter-level must be of {', '.join(STATE_LEVELS)}, got {sorted(unknown)[0]!r}"
        )
    trained = levels(folder)
    names = names or [level for level in STATE_LEVELS if level in trained]
    if not names:
        raise FileNotFoundError(f"{folder} holds no run of `xspec train hidden`")
    arms = [CONSTANT]
    for level in names:
        find_run(folder, level)
        arms.append(level.lower())
        if level not in WITHOUT_DRAFT:
            arms.append(level.lower() + HIDDEN)
    return arms


def state_drafter(
    arm: str,
    gamma: int,
    folder: Path,
    which: str,
    draft: Callable[[str], PreTrainedModel],
    target: TappedTarget,
) -> Drafter:
    """A fresh drafter of one of `state_arms`.

    Args:
        which: the run, see `find_run`.
        draft: the draft model of a name, `DRAFT` or another.
        target: whose states are read.

    Raises:
        ValueError, RuntimeError, FileNotFoundError: there is no such adapter, or it does not fit.
    """
    hidden = arm.endswith(HIDDEN)
    at = find_run(folder, arm.removesuffix(HIDDEN).upper(), which)
    adapter = load_adapter(at, mini.VOCAB)
    states = None
    if not hidden and not (isinstance(adapter, HiddenAdapter) and adapter.config.level == "B1"):
        model = draft(run_record(at).get("draft") or DRAFT)
        states = DraftStates(model, (mini.EOS,), mini.MAX_NEW_TOKENS)
    head = target.model.get_output_embeddings().weight
    return HiddenDrafter(adapter, gamma, head, states, target.states, hidden, name=arm)


def constant_drafter(answers: Sequence[Sequence[int]]) -> Drafter:
    """The commonest token of every position of `answers`, whatever the request."""
    pairs = [Pair(i, i, "", (), tuple(answer)) for i, answer in enumerate(answers)]
    return SOURCES["constant string"].make(Training(0, pairs), Variant(mini.MAX_NEW_TOKENS, 1))
