"""Adapters of states as drafters: of the draft's whole answer, or of the target's own prefix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from xspec_kernels import ranges

from ..adapters import alignment
from ..adapters.base import path_chain
from ..adapters.eagle import EagleFusion
from ..adapters.hidden import READS_DRAFT, HiddenAdapter
from .adapter import DraftText
from .base import DraftTree, Request, check_growth
from .rollout import Rollout, StateRollout, TargetSource, TokenRollout

DraftSource = Callable[[Request], torch.Tensor]


class DraftStates:
    """The states ``[L, D]`` of a draft model's whole greedy answer; state i predicted token i.

    Arguments as of `DraftText`.
    """

    def __init__(self, model: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        self._text = _CollectingText(model, *args, **kwargs)

    def __call__(self, request: Request) -> torch.Tensor:
        """States of the answer to ``request.draft_inputs``."""
        return self._text.states(request)


class _CollectingText(DraftText):
    """`DraftText` that keeps what the language-model head reads."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._rows: list[torch.Tensor] = []
        # Fast steps do not go through the head's module.
        self._fast = None if self._steps == self._step else self._steps
        if self._fast:
            self._steps = self._collected

    def states(self, request: Request) -> torch.Tensor:
        self._rows = []
        hook = self.model.get_output_embeddings().register_forward_pre_hook(
            lambda module, inputs: self._rows.append(inputs[0][0, -1])
        )
        try:
            self(request)
        finally:
            hook.remove()
        return torch.stack(self._rows)

    def _collected(self, tokens: Sequence[int]) -> torch.Tensor:
        self._rows.append(self._fast.hidden(tokens))
        return F.linear(self._rows[-1], self._fast.head)


class HiddenDrafter:
    """A chain of at most `gamma` tokens from an adapter of states.

    L1 to L5 map the draft's states once a request. B1, L5F and EAGLE read the target's states, or
    tokens, of the verified prefix: in every round those committed since the one before. Behind the
    first token of a chain, the adapter's own prediction takes the place of what the target has not
    said.

    Args:
        adapter: `HiddenAdapter` or `EagleFusion`.
        head: the target's language-model head ``[V, D]``; EAGLE has its own.
        draft: states of the draft's answer (`DraftStates`, or recorded ones).
        target: the first states of the answer, see `TappedTarget.states`; for B1 and L5F.
        hide_draft: the adapter sees zeros in place of the draft's states, and no draft model runs.
        floor: the chain ends where the probability of its path falls below this.

    Raises:
        ValueError: a source that the adapter reads is missing, or the head does not fit it.
    """

    def __init__(
        self,
        adapter: HiddenAdapter | EagleFusion,
        gamma: int,
        head: torch.Tensor,
        draft: DraftSource | None = None,
        target: TargetSource | None = None,
        hide_draft: bool = False,
        floor: float = 0.0,
        name: str = "hidden",
    ) -> None:
        if gamma < 1:
            raise ValueError(f"gamma must be at least 1, got {gamma}")
        config = adapter.config
        self._eagle = isinstance(adapter, EagleFusion)
        self._level = alignment.EAGLE if self._eagle else config.level
        reads_draft = self._eagle or self._level in READS_DRAFT
        if reads_draft and draft is None and not hide_draft:
            raise ValueError(f"drafter {name!r} needs the draft's states, or hide_draft=True")
        if not self._eagle and self._level in alignment.AHEAD and target is None:
            raise ValueError(f"drafter {name!r} needs the target's states")
        width = config.token_width if self._eagle else config.width
        if head.dim() != 2 or head.shape[1] != width:
            raise ValueError(
                f"drafter {name!r}: the adapter is for target states of width {width}, the "
                f"target's head is {list(head.shape)}"
            )
        self.name, self.gamma, self.floor = name, gamma, floor
        self.vocab_size = len(head)
        self._adapter = adapter
        weight = next(adapter.parameters())
        self._head = head.detach().to(weight)
        self._draft = draft if reads_draft and not hide_draft else None
        self._positions = config.positions
        self._rollout: Rollout | None = None
        if self._eagle:
            self._rollout = TokenRollout(adapter)
        elif self._level in alignment.AHEAD:
            self._rollout = StateRollout(adapter, self._head, target)
        self._forget()

    @torch.inference_mode()
    def begin(self, request: Request) -> None:
        """Get the draft's states; levels that read nothing else map them.

        Raises:
            ValueError: the states have another width than the adapter reads.
        """
        states, width = None, self._adapter.config.draft_width
        if self._draft:
            states = self._draft(request)
            if states.dim() != 2 or states.shape[1] != width:
                raise ValueError(
                    f"drafter {self.name!r} reads draft states of width {width}, got "
                    f"{list(states.shape)}"
                )
            states = states[: self._positions].to(self._head)
        self._forget()
        if self._rollout:
            self._rollout.begin(states)
            return
        if states is None:
            states = self._head.new_zeros(self._positions, width)
        with ranges.range_("draft.adapter", len(states)):
            best = self._best(self._adapter(draft=states[None])[0] @ self._head.T)
        self._mapped = best[0].tolist(), best[1].tolist()

    @torch.inference_mode()
    def propose(self, context: Sequence[int], rows: int) -> DraftTree:
        """A chain of at most ``rows - 1`` tokens behind ``context[-1]``.

        Raises:
            ValueError: `context` is empty or shrank.
            RuntimeError: the target's states of the context are not there.
        """
        check_growth(context, self._known)
        self._known = known = len(context)
        count = min(self.gamma, rows - 1)
        with ranges.range_("draft.adapter", count):
            if self._rollout:
                tokens, scores = self._roll_out(context, min(count, self._positions - known + 1))
            else:
                tokens, chances = (
                    alignment.continuation(part, known, count, self._level) for part in self._mapped
                )
                tokens, scores = path_chain(tokens, chances, self.floor)
        return DraftTree.chain(context[-1], tokens, scores)

    def in_step(self, context: Sequence[int]) -> bool:
        """Whether the draft's text, as the adapter reads it, begins with `context`; never so for an
        adapter that reads the target.
        """
        if self._rollout:
            return False
        said = alignment.continuation(self._mapped[0], 0, len(context), self._level)
        return list(said) == list(context)

    def end(self, answer: Sequence[int]) -> None:
        """Nothing is learned, and nothing kept of the request."""
        self._forget()

    def _forget(self) -> None:
        self._known = 0
        self._mapped: tuple[list[int], list[float]] = ([], [])
        if self._rollout:
            self._rollout.begin(None)

    def _roll_out(self, context: Sequence[int], count: int) -> tuple[list[int], list[float]]:
        """Tokens behind `context` one by one, each from the ones before."""
        ids, chances, score = [], [], 1.0
        for i in range(count):
            logits = self._rollout.then(ids[-1]) if i else self._rollout.after(context)
            best, chance = self._best(logits)
            ids.append(best)
            chances.append(chance)
            # Nothing is read off the device before the chain ends, unless it may end early.
            if self.floor > 0.0 and (score := score * float(chance)) < self.floor:
                break
        if not ids:
            return [], []
        return path_chain(torch.stack(ids).tolist(), torch.stack(chances).tolist(), self.floor)

    def _best(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The likeliest ids and their probabilities."""
        chances, ids = logits.float().softmax(-1).max(-1)
        return ids, chances
