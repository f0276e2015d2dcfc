"""Faults on demand: passes that run out of memory or give NaN, drafters that raise.

For the soak and the tests: what a decoder does about them is what is tested.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..drafters.base import Drafter, DraftTree, OpeningDrafter, Request
from ..targets.base import Target
from ..targets.llama import LlamaTarget

# Bytes that no machine has.
_TOO_MANY = 1 << 60
MOMENTS = ("begin", "opening", "propose", "end")


class DrafterFault(Exception):
    """What a drafter raises that was told to."""


class FaultyPasses:
    """The forward passes of a target's model, one of which fails when armed.

    Args:
        target: its model, or its decoder, is changed in place until `remove`.
    """

    def __init__(self, target: Target) -> None:
        self.fired = False
        self._kind, self._after, self._request = "", 0, 0
        self._changed: list[tuple[object, str]] = []
        if isinstance(target, LlamaTarget):
            self._wrap(target.decoder, "prefill", lambda args, out: [out])
            self._wrap(
                target.decoder, "step",
                lambda args, out: out.view(len(args[0].tokens), -1, out.shape[1]),
            )  # fmt: skip
        else:
            self._wrap(target.model, "forward", lambda args, out: out.logits)

    def arm(self, kind: str, after: int = 0, request: int = 0) -> None:
        """Let the pass after `after` more ones fail.

        Args:
            kind: "nan" for a request's rows, "memory" for an allocation that cannot succeed.
            request: number in the pass, modulo the requests in it.
        """
        self.fired, self._kind, self._after, self._request = False, kind, after, request

    def disarm(self) -> bool:
        """Fail no more; returns whether a pass failed since `arm`."""
        self._kind = ""
        return self.fired

    def remove(self) -> None:
        """Leave the target as it was."""
        for owner, name in self._changed:
            delattr(owner, name)
        self._changed.clear()

    def _wrap(
        self, owner: object, name: str, of: Callable[[tuple, Any], Sequence[torch.Tensor]]
    ) -> None:
        """Let a method of `owner` fail when armed; `of` its arguments and result gives the rows of
        each request.
        """
        run = getattr(owner, name)

        def failing(*args: Any, **kwargs: Any) -> Any:
            kind = self._due()
            if kind == "memory":
                torch.empty(_TOO_MANY, dtype=torch.uint8)
            out = run(*args, **kwargs)
            if kind == "nan":
                rows = of(args, out)
                rows[self._request % len(rows)].fill_(torch.nan)
            return out

        setattr(owner, name, failing)
        self._changed.append((owner, name))

    def _due(self) -> str:
        if not self._kind:
            return ""
        self._after -= 1
        if self._after >= 0:
            return ""
        kind, self._kind, self.fired = self._kind, "", True
        return kind


class FaultyDrafter:
    """A drafter that raises at one moment of the next request, and is sound afterwards.

    Args:
        moment: one of `MOMENTS`; empty: never.
        after: proposals before the one that fails.
    """

    def __init__(self, drafter: Drafter, moment: str = "", after: int = 0) -> None:
        if moment and moment not in MOMENTS:
            raise ValueError(f"moment must be one of {', '.join(MOMENTS)}, got {moment!r}")
        self.drafter, self.name = drafter, drafter.name
        self.moment, self.after = moment, after
        self.fired = False

    def begin(self, request: Request) -> None:
        self._at("begin")
        self.drafter.begin(request)

    def opening(self, rows: int) -> list[int]:
        self._at("opening")
        return self.drafter.opening(rows) if isinstance(self.drafter, OpeningDrafter) else []

    def propose(self, context: Sequence[int], rows: int) -> DraftTree:
        if self.moment == "propose":
            self.after -= 1
        if self.after < 0:
            self.after = 0
            self._at("propose")
        return self.drafter.propose(context, rows)

    def end(self, answer: Sequence[int]) -> None:
        """An abandoned request ends soundly."""
        if answer:
            self._at("end")
        self.drafter.end(answer)

    def _at(self, moment: str) -> None:
        if self.moment == moment:
            self.moment, self.fired = "", True
            raise DrafterFault(moment)
