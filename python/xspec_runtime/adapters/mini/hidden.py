"""Trained adapters of states as arms of the embedded pair's end-to-end comparison."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from transformers import PreTrainedModel

from ...data.pairs import Pair
from ...drafters.base import Drafter
from ...drafters.hidden import DraftSource, DraftStates, HiddenDrafter
from ...drafters.two_phase import SharedStates, TwoPhaseDrafter
from ...models import mini
from ...replay.arms import SOURCES, Training, Variant
from ...targets.base import Target
from ..alignment import AHEAD, STATE_LEVELS
from ..checkpoint import adapter_config, load_adapter
from ..hidden import READS_TARGET
from ..training.draft_folder import DRAFT_LEVELS
from ..training.runs import find_run, levels, run_record
from ..training.text import TEXT_LEVELS
from .pair import HIDDEN
from .states import DRAFT

CONSTANT = "constant"
# B1 reads no draft, so there is nothing to hide from it.
WITHOUT_DRAFT = ("B1",)
# A head merged with the memory of past answers; the prefix of its arm's name.
TREE = "tree_"
# Beside the levels themselves, where all that they name was trained.
COMBINED = ("L4+B1", "L4+L5F", "L4+EAGLE", "TREE+L4", "TREE+EAGLE")


def state_arms(
    folder: Path | None, chosen: str = "", which: str = "", tapped: bool = True
) -> list[str]:
    """The arms that the runs below `folder` give: a level's lower-case name, the same with the
    draft hidden, and a constant string beside them.

    Args:
        chosen: levels, separated by commas; all that were trained, and `COMBINED`, where empty.
            ``L4+B1``: two phases, arm `l4_b1`. ``TREE+L4``: merged with memory, arm `tree_l4`.
        which: the runs, see `find_run`.
        tapped: the target's states can be read; otherwise the levels that do are left out.

    Raises:
        FileNotFoundError: a level has no run, or there is none at all.
        ValueError: a level does not exist, cannot be read or is for another vocabulary, or levels
            do not combine.
    """
    if folder is None:
        if chosen:
            raise ValueError("--adapter-level needs --adapters, the folder of trained adapters")
        return []
    names = [name.strip() for name in chosen.split(",") if name.strip()]
    if not names:
        trained = set(levels(folder, which)) & set(usable(tapped))
        names = [name for name in (*STATE_LEVELS, *COMBINED) if set(_levels(name)) <= trained]
    if not names:
        starred = f"{which} " if which else ""
        limit = "" if tapped else ", those that read the target's states left out"
        raise FileNotFoundError(f"{folder} holds no {starred}run of `xspec train hidden`{limit}")
    arms = [CONSTANT]
    for name in names:
        read = _levels(name)
        if unread := set(read) - set(usable(tapped)):
            raise ValueError(
                f"--adapter-level {name}: {min(unread)} reads the target's states, which only "
                "--engine transformers keeps"
            )
        for level in read:
            adapter_config(find_run(folder, level, which), mini.VOCAB)
        arms.append(name.lower().replace("+", "_"))
        if set(read) - set(WITHOUT_DRAFT):
            arms.append(arms[-1] + HIDDEN)
    return arms


def usable(tapped: bool) -> list[str]:
    """The levels that can run: where no states of the target are kept, those that read none."""
    return [level for level in STATE_LEVELS if tapped or level not in READS_TARGET]


def left_out(folder: Path | None, chosen: str) -> str:
    """A line on the levels that `state_arms` leaves out where the target is not tapped."""
    trained = levels(folder) if folder and not chosen else []
    names = ", ".join(level for level in trained if level in READS_TARGET)
    return names and f"{names}: left out, --engine llama keeps no states of the target"


def reads_target(arm: str) -> bool:
    """Whether the drafter of an arm reads the target's states."""
    return not set(READS_TARGET).isdisjoint(_named(arm))


def _named(arm: str) -> list[str]:
    return arm.removesuffix(HIDDEN).removeprefix(TREE).upper().split("_")


def _levels(name: str) -> list[str]:
    """The levels of ``L4``, ``L4+B1`` or ``TREE+L4``."""
    parts = name.removeprefix("TREE+").split("+")
    ahead = [part in AHEAD for part in parts]
    if set(parts) - set(STATE_LEVELS) or (len(parts) > 1 and ahead != [False, True]):
        known = ", ".join((*TEXT_LEVELS, *DRAFT_LEVELS, *STATE_LEVELS))
        raise ValueError(
            f"--adapter-level must be of {known}, one of L1 to L5 + one of {', '.join(AHEAD)}, or "
            f"TREE+ one or two of L1 to EAGLE; got {name!r}"
        )
    return parts


def state_drafter(
    arm: str,
    gamma: int,
    folder: Path,
    which: str,
    draft: Callable[[str], PreTrainedModel],
    target: Target,
) -> Drafter:
    """A fresh drafter of one of `state_arms`, without the memory that a `TREE` is merged with.

    Args:
        which: the run, see `find_run`.
        draft: the draft model of a name, `DRAFT` or another.
        target: a `TappedTarget` where its states are read; its language-model head is, always.

    Raises:
        ValueError, RuntimeError, FileNotFoundError: there is no such adapter, or it does not fit.
    """
    hidden = arm.endswith(HIDDEN)
    named = _named(arm)
    sources: dict[str, DraftSource] = {}

    def source(model: str) -> DraftSource:
        if model not in sources:
            states = DraftStates(draft(model), (mini.EOS,), mini.MAX_NEW_TOKENS)
            sources[model] = states if len(named) == 1 else SharedStates(states)
        return sources[model]

    parts = [_phase(level, arm, gamma, folder, which, hidden, source, target) for level in named]
    if len(parts) == 1:
        return parts[0]
    return TwoPhaseDrafter(*parts, tuple(sources.values()), arm)


def _phase(
    level: str,
    arm: str,
    gamma: int,
    folder: Path,
    which: str,
    hidden: bool,
    source: Callable[[str], DraftSource],
    target: Target,
) -> HiddenDrafter:
    """The drafter of one level; `source` is of the draft that its run was trained on."""
    at = find_run(folder, level, which)
    adapter = load_adapter(at, mini.VOCAB)
    states = None
    if not hidden and level not in WITHOUT_DRAFT:
        states = source(run_record(at).get("draft") or DRAFT)
    head = target.model.get_output_embeddings().weight
    read = target.states if level in READS_TARGET else None
    return HiddenDrafter(adapter, gamma, head, states, read, hidden, name=arm)


def constant_drafter(answers: Sequence[Sequence[int]]) -> Drafter:
    """The commonest token of every position of `answers`, whatever the request."""
    pairs = [Pair(i, i, "", (), tuple(answer)) for i, answer in enumerate(answers)]
    return SOURCES["constant string"].make(Training(0, pairs), Variant(mini.MAX_NEW_TOKENS, 1))
