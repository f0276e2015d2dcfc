"""Many prompts, several at a time: the rounds of all running requests share their forward passes.

A request that ends makes room for the next one at once. Every answer equals the one that
`SpeculativeDecoder` gives by itself outside near ties, whatever runs beside it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from time import perf_counter

import torch
from transformers import LogitsProcessorList

from xspec_kernels import ranges

from .config import SpecConfig
from .drafters.base import Drafter, DraftTree, Request
from .engine import Generation, Round, first_answer, propose
from .prefill import DraftedText, Opening, check_drafted
from .targets.base import Target
from .targets.greedy import Verdict, check_ids


@dataclass(slots=True)
class BatchPrompt:
    """One prompt of a batch; the fields are the arguments of `SpeculativeDecoder.generate`."""

    inputs: Mapping[str, torch.Tensor]
    request: Request | None = None
    logits_processor: LogitsProcessorList | None = None
    drafted: Sequence[int] = ()


@dataclass(slots=True)
class _Running:
    """A request between its first token and its last."""

    index: int
    drafter: Drafter | None
    answer: Generation
    text: DraftedText | None
    first: float


class BatchDecoder:
    """Greedy decoding of several requests at once, each with a drafter of its own.

    Args:
        target: the model; its capacity holds for every request.
        make_drafter: makes the drafters, at most `batch`; they may share a memory. None: plain
            decoding.
        config: as for `SpeculativeDecoder`.
        batch: requests at once.

    Raises:
        ValueError: `batch` is below 1.
    """

    def __init__(
        self,
        target: Target,
        make_drafter: Callable[[], Drafter] | None = None,
        config: SpecConfig | None = None,
        batch: int = 8,
    ) -> None:
        self.target = target.batched(batch)
        self.make_drafter = make_drafter
        self.config = config or SpecConfig()
        self.batch = batch
        self._idle: list[Drafter] = []

    def generate(
        self,
        prompts: Sequence[BatchPrompt | Mapping[str, torch.Tensor]],
        on_tokens: Callable[[int, list[int]], None] | None = None,
    ) -> list[Generation]:
        """Answer `prompts`; the answers come in their order.

        In `Generation.rounds` all times but `propose_ms` are those of the whole batch, and
        `prefill_ms` counts from this call on, waiting included.

        Args:
            prompts: any number; a mapping is the `inputs` of a `BatchPrompt`.
            on_tokens: called with a prompt's index and its new tokens as soon as they are final.

        Raises:
            ValueError: a prompt is malformed, or may outgrow the cache; the message names it, and
                nothing has been decoded by then.
            RuntimeError: the target's logits are NaN.
        """
        prompts = [p if isinstance(p, BatchPrompt) else BatchPrompt(p) for p in prompts]
        for i, prompt in enumerate(prompts):
            self._check(i, prompt)
        self.target.reset()
        start = perf_counter()
        tell = on_tokens or (lambda index, tokens: None)
        answers: dict[int, Generation] = {}
        waiting = deque(range(len(prompts)))
        running: list[_Running] = []
        while waiting or running:
            while waiting and len(running) < self.batch:
                index = waiting.popleft()
                running.append(self._start(index, prompts[index], start))
                answers[index] = running[-1].answer
                tell(index, answers[index].tokens[:])
                self._end_finished(running)
            if running:
                for index, tokens in self._round(running):
                    tell(index, tokens)
                self._end_finished(running)
        return [answers[i] for i in range(len(prompts))]

    def _check(self, index: int, prompt: BatchPrompt) -> None:
        try:
            length = check_ids(prompt.inputs).shape[1]
            check_drafted(prompt.drafted, self.target.target.vocab_size)
        except ValueError as error:
            raise ValueError(f"prompt {index}: {error}") from None
        # The last token is never fed; a prefill wants room for one row behind the prompt.
        new, capacity = self.config.max_new_tokens, self.target.cache.capacity
        if length + max(new - 1, 1) > capacity:
            raise ValueError(
                f"prompt {index}: {length} rows and max_new_tokens {new} may outgrow the KV cache, "
                f"capacity {capacity}; raise it or lower max_new_tokens"
            )

    def _start(self, index: int, prompt: BatchPrompt, start: float) -> _Running:
        """Prefill one prompt: its first token."""
        target, config = self.target, self.config
        ids = prompt.inputs["input_ids"]
        request = prompt.request or Request(ids[0].tolist())
        drafter = self._idle.pop() if self._idle else self.make_drafter and self.make_drafter()
        opening = Opening.of(drafter, request, config, prompt.drafted)
        with ranges.range_("target.prefill", ids.shape[-1]):
            verdict = target.prefill(prompt.inputs, prompt.logits_processor, opening.riding)
        answer = first_answer(verdict, opening, config)
        first = perf_counter()
        answer.prefill_ms = 1e3 * (first - start)
        if drafter and not opening.begun:
            drafter.begin(request)
            answer.begin_ms = 1e3 * (perf_counter() - first)
        return _Running(index, drafter, answer, opening.text, first)

    def _round(self, running: list[_Running]) -> list[tuple[int, list[int]]]:
        """One verify of all running requests; what each of them emitted."""
        target, config = self.target, self.config
        trees, proposing = [], []
        for number, one in enumerate(running):
            clock = perf_counter()
            room = target.room(number)
            trees.append(propose(one.drafter, one.text, config, one.answer.tokens, room))
            proposing.append(1e3 * (perf_counter() - clock))
        times = [perf_counter()]
        contexts = [one.answer.tokens for one in running]
        verdicts = self._verify(trees, contexts, times)
        spent = [1e3 * (after - before) for before, after in pairwise(times)]
        news = []
        for one, tree, verdict, ms in zip(running, trees, verdicts, proposing, strict=True):
            answer = one.answer
            emitted = config.cut(verdict.tokens, len(answer.tokens))
            answer.tokens += emitted
            answer.near_ties += verdict.near_ties
            answer.rounds.append(Round(len(tree), verdict.accepted, len(emitted), ms, *spent))
            news.append((one.index, emitted))
        return news

    def _verify(
        self, trees: list[DraftTree], contexts: list[list[int]], times: list[float]
    ) -> list[Verdict]:
        """Forward, accept, commit; appends to `times` when each was done."""
        target, rows = self.target, sum(map(len, trees))
        height = self.config.height(max(map(len, trees)))
        with ranges.range_("verify" if rows > len(trees) else "target.decode", rows):
            with ranges.range_("verify.forward", rows):
                logits = target.forward(trees, height)
            times.append(perf_counter())
            with ranges.range_("verify.accept", rows):
                verdicts = target.accept(trees, logits, contexts)
            times.append(perf_counter())
            with ranges.range_("verify.commit", sum(v.accepted for v in verdicts)):
                target.commit(verdicts)
            times.append(perf_counter())
        return verdicts

    def _end_finished(self, running: list[_Running]) -> None:
        """Take complete answers out; the last request moves into each gap."""
        for number in reversed(range(len(running))):
            one = running[number]
            if not self.config.done(one.answer.tokens):
                continue
            if one.drafter:
                one.drafter.end(one.answer.tokens)
                self._idle.append(one.drafter)
            one.answer.decode_ms = 1e3 * (perf_counter() - one.first)
            self.target.release(number)
            running[number] = running[-1]
            running.pop()
