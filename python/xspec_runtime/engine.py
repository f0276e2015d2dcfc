"""The round: draft -> verify -> accept -> commit."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from threading import Event
from time import perf_counter

import torch
from transformers import LogitsProcessorList

from xspec_kernels import ranges

from .config import SpecConfig
from .drafters.base import Drafter, DraftTree, PricingDrafter, Request
from .drafters.merge import merge
from .prefill import DraftedText, Opening, check_drafted
from .targets.base import Target
from .targets.greedy import Verdict, check_ids
from .targets.sampling import Sampling

Stop = Event | Callable[[], bool]
"""Set, or true, once nobody wants the answer any more."""


@dataclass(slots=True)
class Round:
    """One verify: its rows, what it gave, and where its milliseconds went."""

    rows: int
    accepted: int
    emitted: int
    propose_ms: float
    forward_ms: float
    accept_ms: float
    commit_ms: float

    @property
    def verify_ms(self) -> float:
        """All but the proposal."""
        return self.forward_ms + self.accept_ms + self.commit_ms


@dataclass(slots=True)
class Generation:
    """An answer and how it came about.

    Attributes:
        tokens: emitted ids; the end-of-sequence token is the last one if it was reached.
        rounds: one entry per verify.
        prefill_ms: until the first token (time to first token).
        begin_ms: the drafter's own preparation, counted in `decode_ms`; in `prefill_ms` where its
            drafts ride in the prefill.
        decode_ms: from the first token to the last.
        near_ties: greedy steps whose two best logits lay within 2 ulp.
        prefill_drafted, prefill_accepted: drafts that rode in the prefill, and those it accepted.
        cancelled: the request was stopped; `tokens` are those it had, perhaps none.
        error: what ended a request of a batch; see `BatchDecoder.generate`.
    """

    tokens: list[int]
    rounds: list[Round] = field(default_factory=list)
    prefill_ms: float = 0.0
    begin_ms: float = 0.0
    decode_ms: float = 0.0
    near_ties: int = 0
    prefill_drafted: int = 0
    prefill_accepted: int = 0
    cancelled: bool = False
    error: Exception | None = None

    @property
    def total_ms(self) -> float:
        """Milliseconds from the prefill's start to the last token."""
        return self.prefill_ms + self.decode_ms

    @property
    def tokens_per_verify(self) -> float:
        """Tokens emitted after the prefill per verify; 0 if there was no verify."""
        return sum(r.emitted for r in self.rounds) / len(self.rounds) if self.rounds else 0.0


class SpeculativeDecoder:
    """Decoding of `target`, drafted by `drafter`; without one, plain decoding.

    The tokens equal plain decoding by the same target object outside near ties: greedy decoding, or
    where the configuration has a temperature, sampling with the same seed. A request that was
    cancelled, or failed at any point, leaves nothing behind: the next one is answered as by a fresh
    decoder, and drafters learn nothing of it.
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter | None = None,
        config: SpecConfig | None = None,
    ) -> None:
        self.target = target
        self.drafter = drafter
        self.config = config or SpecConfig()
        # Seconds of the cheapest plain round so far.
        self._step = math.inf

    def generate(
        self,
        inputs: Mapping[str, torch.Tensor],
        request: Request | None = None,
        logits_processor: LogitsProcessorList | None = None,
        on_tokens: Callable[[list[int]], None] | None = None,
        on_round: Callable[[DraftTree, Verdict, list[int]], None] | None = None,
        drafted: Sequence[int] = (),
        stop: Stop | None = None,
        seed: int | None = None,
    ) -> Generation:
        """Answer one prompt.

        Args:
            inputs: what the target's forward takes, `input_ids` ``[1, L]`` among it.
            request: what the drafter may know; by default the prompt's ids.
            logits_processor: transformers' processors, applied to every row with its own prefix.
            on_tokens: called with the tokens of every round as soon as they are final.
            on_round: called with the tree, the verdict and the answer before the round.
            drafted: tokens of a draft's own answer that exist by now, from its first on; see
                `SpecConfig.prefill_fused`. Without them, "fast" asks a drafter that has an
                `opening`.
            stop: asked before the prefill and before every round; see `Generation.cancelled`.
            seed: of this answer's draws instead of the configuration's.

        Raises:
            ValueError: the inputs are malformed, or `drafted` holds an id the target has no
                embedding for.
            RuntimeError: the cache is full, or the target's logits are NaN.
            Exception: what the drafter, `stop` or a callback raised.
        """
        drafter, start = self.drafter, perf_counter()
        ids = check_ids(inputs)
        check_drafted(drafted, self.target.vocab_size)
        if drafter and request is None:
            request = Request(ids[0].tolist())
        stopped = asked(stop)
        try:
            if stopped():
                answer = Generation([], cancelled=True)
            else:
                answer = self._answer(
                    inputs, request, logits_processor, on_tokens, on_round, drafted, stopped,
                    Sampling.of(self.config, seed),
                )  # fmt: skip
        except BaseException:
            abandon(drafter)
            raise
        if drafter:
            drafter.end([] if answer.cancelled else answer.tokens)
        answer.decode_ms = 1e3 * (perf_counter() - start) - answer.prefill_ms
        return answer

    def _answer(
        self,
        inputs: Mapping[str, torch.Tensor],
        request: Request | None,
        logits_processor: LogitsProcessorList | None,
        on_tokens: Callable[[list[int]], None] | None,
        on_round: Callable[[DraftTree, Verdict, list[int]], None] | None,
        drafted: Sequence[int],
        stopped: Callable[[], bool],
        sampling: Sampling | None,
    ) -> Generation:
        """Prefill and rounds; the drafter's request has not ended."""
        target, drafter, config = self.target, self.drafter, self.config
        start = perf_counter()
        opening = Opening.of(drafter, request, config, drafted)
        with ranges.range_("target.prefill", inputs["input_ids"].shape[1]):
            verdict = target.prefill(
                inputs, logits_processor, opening.riding, sampling=sampling
            )  # fmt: skip
        answer = first_answer(verdict, opening, config)
        first = perf_counter()
        answer.prefill_ms = 1e3 * (first - start)
        if on_tokens:
            on_tokens(answer.tokens[:])
        if drafter and not opening.begun:
            drafter.begin(request)
            answer.begin_ms = 1e3 * (perf_counter() - first)

        text = opening.text
        while not config.done(answer.tokens):
            if stopped():
                answer.cancelled = True
                break
            clock = perf_counter()
            tree = propose(drafter, text, config, answer.tokens, target.cache.room)
            proposed = perf_counter()
            rows = len(tree)
            with ranges.range_("verify" if rows > 1 else "target.decode", rows):
                with ranges.range_("verify.forward", rows):
                    logits = target.forward(tree, config.height(rows))
                forwarded = perf_counter()
                with ranges.range_("verify.accept", rows):
                    verdict = target.accept(tree, logits, answer.tokens)
                verified = perf_counter()
                with ranges.range_("verify.commit", verdict.accepted):
                    target.commit(verdict)
                committed = perf_counter()
                self._show(rows, verdict.accepted, committed - proposed)
            if on_round:
                on_round(tree, verdict, answer.tokens)
            emitted = config.cut(verdict.tokens, len(answer.tokens))
            answer.tokens += emitted
            answer.near_ties += verdict.near_ties
            if on_tokens:
                on_tokens(emitted)
            answer.rounds.append(
                Round(
                    rows,
                    verdict.accepted,
                    len(emitted),
                    1e3 * (proposed - clock),
                    1e3 * (forwarded - proposed),
                    1e3 * (verified - forwarded),
                    1e3 * (committed - verified),
                )
            )
        return answer

    def _show(self, rows: int, accepted: int, seconds: float) -> None:
        """What a round cost and saved, in ranges that a profiler sees."""
        if rows == 1:
            self._step = min(self._step, seconds)
        elif ranges.attached() and self._step < math.inf:
            ranges.mark("verify.overhead", round(1e6 * (seconds - self._step)))
            ranges.mark("verify.saved", round(1e6 * accepted * self._step))


def asked(stop: Stop | None) -> Callable[[], bool]:
    """`stop` as a question."""
    if stop is None:
        return lambda: False
    return stop.is_set if isinstance(stop, Event) else stop


def abandon(drafter: Drafter | None) -> None:
    """End a request without an answer. What the drafter says to that is not the error to report."""
    if drafter:
        with suppress(Exception):
            drafter.end([])


def first_answer(verdict: Verdict, opening: Opening, config: SpecConfig) -> Generation:
    """The answer as the prefill leaves it."""
    return Generation(
        config.cut(verdict.tokens, 0),
        begin_ms=opening.begin_ms,
        near_ties=verdict.near_ties,
        prefill_drafted=verdict.drafted,
        prefill_accepted=verdict.accepted,
    )


def propose(
    drafter: Drafter | None,
    text: DraftedText | None,
    config: SpecConfig,
    answer: Sequence[int],
    room: int,
) -> DraftTree:
    """The tree of the next round: what the drafter proposes, and what the drafted text goes on
    with; the root alone where nothing can be gained.

    Args:
        room: rows that fit the cache; the tree is kept within.
    """
    # With one token left, the target's own next token ends the answer.
    if config.rows < 2 or room < 2 or len(answer) + 1 >= config.max_new_tokens:
        return DraftTree.root(answer[-1])
    # Rows that the forward pass has anyway had better hold drafts than be inert.
    rows = min(config.height(config.rows), room)
    seed = text.chain(answer, rows) if text else None
    # Deeper drafts could not be emitted, and may lie beyond the model's positions.
    depth = config.max_new_tokens - len(answer) - 1
    if drafter is None:
        return seed.within(depth) if seed else DraftTree.root(answer[-1])
    with ranges.range_("draft.propose", rows):
        if seed and isinstance(drafter, PricingDrafter):
            tree = drafter.propose(answer, rows, seed)
        else:
            tree = drafter.propose(answer, rows)
            tree = merge([tree, seed], rows) if seed else tree
    return tree.within(depth)
