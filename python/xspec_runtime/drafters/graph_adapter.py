"""A TokenAdapter as drafter on the target's device: its drafts never pass through the host.

The target's verify ends in the adapter (`adapter_tail`), in the same launch, and the next verify
reads the drafts where they lie: the trees that this drafter proposes hold their places alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from xspec_kernels import (
    AdapterFeed,
    TailResult,
    Workspace,
    adapter_forward,
    adapter_tail,
    pick_drafts,
    ranges,
)

from ..adapters.base import PAD
from ..adapters.network import token_network
from ..adapters.token_adapter import TokenAdapter
from ..prefill import PRIOR
from ..targets.llama import LlamaTarget
from ..targets.llama_rounds import Round
from .adapter import AdapterDrafter
from .base import MAX_ROWS, ON_DEVICE, DraftTree, Request


class GraphAdapterDrafter(AdapterDrafter):
    """The chains of `AdapterDrafter`, without probabilities. Of greedy requests only: others the
    target verifies op by op, where no drafts follow, so nothing is proposed.

    Args:
        adapter: on the target's device.
        gamma: tokens a proposal, 1..63.
        target: with graphs, of the adapter's vocabulary; what it verifies is followed by this
            drafter, and by no other, from `begin` to `end`.
        text, hide_draft: as of `AdapterDrafter`.
        reads_answer: the adapter runs behind every verify, on the target's answer so far and the
            draft's text behind it; for adapters trained to. Otherwise it runs once a request, as
            published, and what follows a verify only picks the next tokens.
        prior: estimated probability that one more token is right.

    Raises:
        ValueError: `gamma` is out of range, the target has no graphs, or the vocabularies or
            devices differ.
    """

    def __init__(
        self,
        adapter: TokenAdapter,
        gamma: int,
        target: LlamaTarget,
        text: Callable[[Request], Sequence[int]] | None = None,
        hide_draft: bool = False,
        reads_answer: bool = False,
        prior: float = PRIOR,
        name: str = "adapter",
    ) -> None:
        super().__init__(adapter, gamma, text, hide_draft, name=name)
        if gamma >= MAX_ROWS:
            raise ValueError(f"gamma must be in 1..{MAX_ROWS - 1}, got {gamma}")
        if target.graphs is None:
            raise ValueError(f"drafter {name!r} needs a target with graphs")
        if target.vocab_size != self.vocab_size or adapter.embed.weight.device != target.device:
            raise ValueError(
                f"drafter {name!r}: the target has {target.vocab_size} tokens on {target.device}, "
                f"the adapter {self.vocab_size} on {adapter.embed.weight.device}"
            )
        self.prior, self._target = prior, target
        self._proposer = self._follower = AdapterFollower(
            adapter, gamma, target.backend, reads_answer
        )
        # Kept as long as the verifies that it starts: a graph that is dropped with its drafter
        # could share its stream with one that is not.
        key = ("start", id(self._follower))
        self._start = target.graphs.verifies.get(key, lambda: self._follower.start)

    def begin(self, request: Request) -> None:
        """See `AdapterDrafter.begin`."""
        self._target.graphs.follower = self._follower
        self._target.graphs.followed = False
        super().begin(request)

    @torch.inference_mode()
    def propose(self, context: Sequence[int], rows: int) -> DraftTree:
        """Places of at most ``rows - 1`` drafts behind ``context[-1]``."""
        graphs, known = self._target.graphs, len(context)
        count = min(self.gamma, rows - 1, self._follower.positions - known + 1)
        if count < 1 or self._target.wants_logits:
            return DraftTree.root(context[-1])
        if not graphs.followed:
            with ranges.range_("draft.adapter", self._follower.positions):
                self._follower.place(context, self._target.cache.length)
                self._start()
        scores = [self.prior ** (i + 1) for i in range(count)]
        return DraftTree.chain(context[-1], [ON_DEVICE - i for i in range(count)], scores)

    def end(self, answer: Sequence[int]) -> None:
        """Nothing is learned; what the target verifies for others is not followed."""
        if self._target.graphs.follower is self._follower:
            self._target.graphs.follower = None


class AdapterFollower:
    """The adapter, what it reads of the request under way, and what it drafts; see `Follower`."""

    def __init__(self, adapter: TokenAdapter, gamma: int, backend: str, reads_answer: bool) -> None:
        self.network, self.positions = token_network(adapter), adapter.config.positions
        self.reads_answer, self._backend = reads_answer, backend
        device = adapter.embed.weight.device
        words = torch.zeros(4, dtype=torch.int32, device=device)
        self._length = words[3:]
        self.drafts = torch.zeros(gamma, dtype=torch.int64, device=device)
        self._ids = torch.zeros(self.positions, dtype=torch.int64, device=device)
        self.feed = AdapterFeed(
            torch.zeros_like(self._ids), words[:1], words[1:2], words[2:3], self.drafts
        )
        self.feed.drafted.fill_(self.positions)
        self._workspace = Workspace(device)
        self._draft: list[int] = []

    def begin(self, draft: Sequence[int]) -> None:
        """Keep the draft's text, cut or padded to all positions."""
        self._draft = [*draft[: self.positions], *[PAD] * (self.positions - len(draft))]

    def place(self, context: Sequence[int], length: int) -> None:
        """Say where the request stands: its answer so far, in a cache of `length` rows."""
        fed = self._draft
        if self.reads_answer:
            fed = [*context[: self.positions], *fed[len(context) :]]
        self.feed.fed.copy_(torch.tensor(fed))
        # The answer's last token is not in the cache yet.
        self.feed.prompt.fill_(length - len(context) + 1)
        self.feed.num_rows.fill_(self.positions)
        self._length.fill_(length)

    def start(self) -> None:
        """The drafts of the place that was said; only launches."""
        found = adapter_forward(
            self.network, self.feed.fed, self.feed.num_rows, round_to=self.network.embed.dtype,
            workspace=self._workspace, backend=self._backend,
        )  # fmt: skip
        self._ids.copy_(found.ids)
        pick_drafts(self._ids, self.feed, self._length, backend=self._backend)

    def follow(self, at: Round, accepted: TailResult, root: torch.Tensor) -> None:
        """See `Follower`."""
        if self.reads_answer:
            adapter_tail(
                self.network, self.feed, accepted, at.tokens[0], root, at.cache_seqlens,
                round_to=self.network.embed.dtype, workspace=self._workspace,
                backend=self._backend,
            )  # fmt: skip
        else:
            pick_drafts(self._ids, self.feed, at.cache_seqlens, backend=self._backend)
