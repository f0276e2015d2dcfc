"""A Llama as drafter with a whole proposal in one launch: K steps, each fed by the one before.

The pending tokens of the verified prefix go in as one chain of rows, then every step embeds the
token that the last one chose. All of it stays on the device: position, the token, whether the draft
is done. A step after the end is a step of no rows, which writes nothing and on a GPU costs its
launches alone. The tokens are published as a chain that accepts itself, so the host waits once, as
it does for a verify.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from xspec_kernels import ranges, tree_mask

from ..graphs import Graphs
from ..prefill import PRIOR
from ..targets.llama import LlamaTarget
from ..targets.llama_decoder import Caches, LlamaDecoder
from ..targets.llama_rounds import Round, RoundBuffers
from .base import MAX_ROWS, DraftTree, Request

# Flag of a row of NaN, as lm_head_argmax gives it.
_NAN = 2


class GraphDrafter:
    """A chain of `gamma` greedy tokens from a model with the target's vocabulary.

    It continues the verified prefix as `ModelDrafter` does, without probabilities: a chain neither
    ends early nor has siblings.

    Args:
        model: the draft; its prefill, weights and cache are used, and no other request may use the
            object meanwhile. On a second stream or device the draft needs a `LlamaTarget` of its
            own.
        gamma: tokens a proposal, 1..63.
        ends: tokens after which the draft says nothing more.
        prior: estimated probability that one more token is right.

    Raises:
        ValueError: `gamma` is not in 1..63.
    """

    def __init__(
        self,
        model: LlamaTarget,
        gamma: int,
        ends: Sequence[int] = (),
        prior: float = PRIOR,
        name: str = "draft",
    ) -> None:
        if not 1 <= gamma < MAX_ROWS:
            raise ValueError(f"gamma must be in 1..{MAX_ROWS - 1}, got {gamma}")
        self.name, self.model, self.gamma, self.prior = name, model, gamma, prior
        self.cache = model.cache
        self._ends = torch.tensor(list(ends), dtype=torch.int64, device=model.device)
        self._rounds = RoundBuffers(model.device, model.backend, model.max_depth)
        self._graphs = Graphs(model.device)
        # Without graphs of its own, the model's ops may wait for the device.
        self._graphs.captures &= model.graphs is not None
        self._prompt = 0
        self._fed: list[int] = []

    def begin(self, request: Request) -> None:
        """Prefill the draft's own prompt.

        Raises:
            ValueError: there is no `input_ids` among the request's `draft_inputs`.
            RuntimeError: it does not fit the cache, or the logits are NaN.
        """
        inputs = request.inputs_on(self.model.device)
        if "input_ids" not in inputs:
            raise ValueError(f"drafter {self.name!r} needs draft_inputs with input_ids")
        self._fed = []
        try:
            with ranges.range_("draft.prefill", inputs["input_ids"].shape[-1]):
                self._first = self.model.prefill(inputs).tokens[0]
        except RuntimeError as error:
            raise RuntimeError(
                f"drafter {self.name!r} as the target of its prompt: {error}"
            ) from None
        self._prompt = self.cache.length

    def opening(self, rows: int) -> list[int]:
        """At most `rows` and `gamma` tokens of the draft's own answer, from its first on."""
        budget = min(rows, self.gamma, self.cache.room + 1) - 1
        if budget < 1 or self._first in self._ends.tolist():
            return [self._first][:rows]
        return [self._first, *self._draft([self._first], budget)]

    def propose(self, context: Sequence[int], rows: int) -> DraftTree:
        """A chain below ``context[-1]``; the root alone where the cache is full."""
        pending = self._rewind(context)
        budget = min(self.gamma, rows - 1, self.cache.room - len(pending) + 1)
        if budget < 1:
            return DraftTree.root(context[-1])
        while len(pending) > self.model.max_depth:
            self._draft(pending[: self.model.max_depth], 0)
            pending = pending[self.model.max_depth :]
        drafts = self._draft(pending, budget)
        scores = [self.prior ** (i + 1) for i in range(len(drafts))]
        return DraftTree.chain(context[-1], drafts, scores)

    def end(self, answer: Sequence[int]) -> None:
        """Nothing is learned."""

    def _rewind(self, context: Sequence[int]) -> list[int]:
        """Drop KV rows that do not belong to `context`; returns its tokens not yet fed, one at
        least.
        """
        same = 0
        limit = min(len(self._fed), len(context) - 1)
        while same < limit and self._fed[same] == context[same]:
            same += 1
        self._fed = self._fed[:same]
        self.cache.truncate(self._prompt + same)
        return list(context[same:])

    @torch.inference_mode()
    def _draft(self, pending: list[int], budget: int) -> list[int]:
        """Feed `pending` and draft up to `budget` tokens behind it, of which all but the last are
        fed too.
        """
        rows, steps = len(pending), max(budget, 1)
        if self._graphs.captures:
            rows, steps = self.model.max_depth, self.gamma
        caches = [(layer.keys, layer.values) for layer in self.cache.layers]
        tree = DraftTree.chain(pending[0], pending[1:])
        self._rounds.write([tree], [self.cache.length], rows, limits=[budget])
        decoder = self.model.decoder
        run = self._graphs.get(
            (rows, steps, caches[0][0].data_ptr()),
            lambda: _steps(decoder, self._rounds, caches, rows, steps, self._ends),
        )
        with ranges.range_("draft.decode", len(pending) + budget):
            self._rounds.launch(1, run)
            tokens = self._rounds.read(1)[0].checked(self.name).tokens
        self._fed += pending + tokens[:-1]
        self.cache.advance(len(pending) + len(tokens[:-1]))
        return tokens


def _chain(rows: int, max_depth: int, rounds: RoundBuffers) -> tuple[torch.Tensor, ...]:
    """(parents, bits, depth, path_slot) of one chain of rows."""
    device = rounds.device
    parents = torch.arange(-1, rows - 1, dtype=torch.int32, device=device)[None]
    mask = tree_mask(parents, max_depth=max_depth, backend=rounds.backend)
    return parents, mask.ancestor_bits, mask.depth, mask.path_slot


def _steps(
    decoder: LlamaDecoder,
    rounds: RoundBuffers,
    caches: Caches,
    rows: int,
    steps: int,
    ends: torch.Tensor,
) -> Callable[[], None]:
    """A launch that feeds a chain of up to `rows` pending tokens and drafts up to `steps`, fewer
    where the device's limit says so or an end is drawn.
    """
    parents, *tables = _chain(1, rounds.max_depth, rounds)
    said_parents, *said_tables = _chain(steps, MAX_ROWS, rounds)
    limit = rounds.limits[:1]

    def run() -> None:
        at = rounds.load(1, rows)
        last = (at.num_rows - 1).long()
        hidden = decoder.step(at, caches).index_select(0, last)
        start = at.cache_seqlens + at.num_rows
        position, alive = start, limit.clamp(0, 1)
        count, token = torch.zeros_like(alive), at.tokens.index_select(1, last)
        chosen, fed, flags = [], [token], []
        for step in range(1, steps + 1):
            one = Round(fed[-1], parents, alive, position, *tables)
            scored = decoder.score(hidden, one)
            count = count + alive
            chosen.append(scored.ids)
            flags.append(scored.flags)
            if step == steps:
                break
            over = (scored.ids == ends).any(1) | (scored.flags[0] == _NAN)
            alive = alive * (limit > step) * ~over
            # What a step of no rows chose is unspecified; 0 is a token.
            fed.append(scored.ids * alive)
            one = Round(fed[-1], parents, alive, position, *tables)
            hidden = decoder.step(one, caches)
            position = position + alive
        # The chain's root is the last pending token, in the row before the first draft's.
        said = Round(torch.cat(fed, 1), said_parents, count, start - 1, *said_tables)
        rounds.tail(said, torch.cat(chosen, 1), torch.cat(flags, 1), caches)

    return run
