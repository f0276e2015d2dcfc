"""What answers the same prompts in turns: `generate`, its prompt lookup, and the drop-in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch
from transformers import PreTrainedModel

from .. import hf
from ..drafters.base import DraftTree, Request
from ..hf.kept import kept_for, new_memory
from ..prefill import placeholder_ids
from .material import Prompt

PLAIN, AGAIN, LOOKUP, LOOKUP_PACKED = "generate", "generate again", "lookup", "lookup packed"
COLD, KEPT, UNPACKED = "drop-in cold", "drop-in", "drop-in unpacked"
NOTHING, WRONG = "no drafts", "wrong drafts"
ARMS = {
    PLAIN: "transformers' `generate`",
    AGAIN: "the same once more: what differs is noise",
    LOOKUP: "transformers' `prompt_lookup_num_tokens`, at the setting that was fastest here",
    LOOKUP_PACKED: "the same on weights packed as the drop-in packs them",
    COLD: "the drop-in with `xspec_memory=False`: it sees the prompt and this answer",
    KEPT: "the drop-in as it comes: it also remembers the answers to the prompts before",
    UNPACKED: "the cold one with `xspec_pack=False`",
    NOTHING: "the drop-in with a drafter that proposes nothing",
    WRONG: "the drop-in with a drafter that is always wrong",
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """One answer: its tokens, forward passes of the model, and milliseconds."""

    tokens: list[int]
    forwards: int
    total_ms: float


class SilentDrafter:
    """Proposes nothing."""

    name = "silent"

    def begin(self, request: Request) -> None:
        """Nothing to prepare."""

    def propose(self, context: Sequence[int], rows: int) -> DraftTree:
        """The root."""
        return DraftTree.root(context[-1])

    def end(self, answer: Sequence[int]) -> None:
        """Nothing to learn."""


class WrongDrafter(SilentDrafter):
    """Proposes one token over and over, and claims to be certain."""

    name = "wrong"

    def __init__(self, token: int) -> None:
        self.token = token

    def propose(self, context: Sequence[int], rows: int) -> DraftTree:
        """A chain."""
        return DraftTree.chain(context[-1], [self.token] * (rows - 1))


@dataclass
class Arms:
    """The arms on one model.

    Attributes:
        lookup: settings of the prompt lookup.
        never: a token that no answer holds.
    """

    model: PreTrainedModel
    pad: int
    max_new_tokens: int
    rows: int
    lookup: dict[str, int] = field(default_factory=dict)
    never: int = 0

    def begin(self) -> None:
        """Forget the answers so far."""
        hf.set_memory(self.model, new_memory())

    def run(self, name: str, prompt: Prompt) -> Outcome:
        """Answer `prompt`."""
        packed = self._packed() if name == LOOKUP_PACKED else nullcontext()
        with packed, self._forwards() as count:
            start = perf_counter()
            ids = self.model.generate(
                **prompt.inputs, do_sample=False, max_new_tokens=self.max_new_tokens,
                pad_token_id=self.pad, **self._options(name),
            )  # fmt: skip
            total = 1e3 * (perf_counter() - start)
        return Outcome(ids[0, prompt.inputs["input_ids"].shape[1] :].tolist(), count(), total)

    def _options(self, name: str) -> dict[str, Any]:
        if name in (PLAIN, AGAIN):
            return {}
        if name in (LOOKUP, LOOKUP_PACKED):
            # A copied placeholder would be taken for media by the model.
            media = sorted(placeholder_ids(self.model.config))
            return {**self.lookup, **({"suppress_tokens": media} if media else {})}
        own: dict[str, Any] = {"custom_generate": hf.generate, "xspec_rows": self.rows}
        return (
            own
            | {
                COLD: {"xspec_memory": False},
                KEPT: {},
                UNPACKED: {"xspec_memory": False, "xspec_pack": False},
                NOTHING: {"xspec_drafter": SilentDrafter()},
                WRONG: {"xspec_drafter": WrongDrafter(self.never)},
            }[name]
        )

    def _packed(self):
        return kept_for(self.model).running(self.model, None)

    @contextmanager
    def _forwards(self) -> Iterator[Callable[[], int]]:
        """Counts forward passes of the model."""
        passes = 0

        def one(*_: object) -> None:
            nonlocal passes
            passes += 1

        hook = self.model.register_forward_pre_hook(one)
        try:
            with torch.inference_mode():
                yield lambda: passes
        finally:
            hook.remove()
