"""A target that keeps the states of what it committed, for drafters that read them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..drafters.base import DraftTree
from .greedy import Verdict
from .transformers import TransformersTarget


class TappedTarget(TransformersTarget):
    """`TransformersTarget` whose `states` gives the rows that the language-model head read.

    Row i predicted token i of the answer: row 0 stands at the end of the prompt. Rows of rejected
    drafts are never kept.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head = self.model.get_output_embeddings()
        self._seen: torch.Tensor | None = None
        self._kept: list[torch.Tensor] = []

    def states(self, known: int) -> torch.Tensor:
        """The first `known` states ``[known, D]`` of the request under way.

        Raises:
            RuntimeError: so many tokens were not committed.
        """
        rows = torch.cat(self._kept) if self._kept else torch.empty(0, 0)
        if len(rows) < known:
            raise RuntimeError(f"the target has committed {len(rows)} tokens, asked for {known}")
        self._kept = [rows]
        return rows[:known]

    @torch.inference_mode()
    def prefill(self, *args: Any, **kwargs: Any) -> Verdict:
        """See `TransformersTarget.prefill`."""
        self._kept = []
        with self._tapped():
            verdict = super().prefill(*args, **kwargs)
        self._kept.append(self._seen[: 1 + verdict.accepted].clone())
        return verdict

    @torch.inference_mode()
    def forward(self, tree: DraftTree, height: int = 0) -> torch.Tensor:
        """See `TransformersTarget.forward`."""
        with self._tapped():
            return super().forward(tree, height)

    @torch.inference_mode()
    def commit(self, verdict: Verdict) -> None:
        """See `TransformersTarget.commit`; the states of the same rows are kept."""
        super().commit(verdict)
        rows = self._seen[:1]
        if verdict.accepted:
            path = verdict.path[0, : verdict.accepted].long()
            rows = torch.cat([rows, self._seen[path]])
        self._kept.append(rows.clone())

    @contextmanager
    def _tapped(self) -> Iterator[None]:
        def see(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            self._seen = inputs[0][0]

        hook = self._head.register_forward_pre_hook(see)
        try:
            yield
        finally:
            hook.remove()
