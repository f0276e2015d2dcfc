"""One call of a batch decoder: requests join, share rounds and leave, each with its own errors."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from time import perf_counter
from traceback import clear_frames
from typing import TYPE_CHECKING

from xspec_kernels import ranges

from .drafters.base import Drafter, DraftTree, Request
from .engine import Generation, Round, abandon, asked, first_answer, propose
from .errors import out_of_memory
from .prefill import DraftedText, Opening
from .targets.greedy import Verdict
from .targets.sampling import Sampling

if TYPE_CHECKING:
    from .batch import BatchDecoder, BatchPrompt


@dataclass(slots=True)
class _Running:
    """A request between its first token and its last."""

    index: int
    drafter: Drafter | None
    answer: Generation
    text: DraftedText | None
    first: float
    tree: DraftTree | None = None
    propose_ms: float = 0.0


class BatchCall:
    """One call of `BatchDecoder.generate`, on checked prompts."""

    def __init__(
        self,
        decoder: BatchDecoder,
        prompts: Sequence[BatchPrompt],
        answers: list[Generation],
        tell: Callable[[int, list[int]], None],
        return_errors: bool,
    ) -> None:
        self.target, self.config, self.batch = decoder.target, decoder.config, decoder.batch
        self.make_drafter, self.idle = decoder.make_drafter, decoder.idle
        self.prompts, self.answers, self.tell = prompts, answers, tell
        self.return_errors = return_errors
        self.running: list[_Running] = []

    def run(self) -> None:
        """Fill in `answers`, but for those that hold an error already."""
        self.target.reset()
        start = perf_counter()
        waiting = deque(i for i, answer in enumerate(self.answers) if answer.error is None)
        try:
            while waiting or self.running:
                while waiting and len(self.running) < self.batch:
                    self._start(waiting.popleft(), start)
                    self._end_finished()
                self._propose()
                if self.running:
                    self._round()
                    self._end_finished()
        finally:
            for one in self.running:
                abandon(one.drafter)

    def _start(self, index: int, start: float) -> None:
        """Prefill one prompt: its first token."""
        target, prompt, number, drafter = self.target, self.prompts[index], len(self.running), None
        try:
            if asked(prompt.stop)():
                self.answers[index].cancelled = True
                return
            drafter = self.idle.pop() if self.idle else self.make_drafter and self.make_drafter()
            request = prompt.request or Request(prompt.inputs["input_ids"][0].tolist())
            opening = Opening.of(drafter, request, self.config, prompt.drafted)
            with ranges.range_("target.prefill", prompt.inputs["input_ids"].shape[-1]):
                verdict = target.prefill(
                    prompt.inputs, prompt.logits_processor, opening.riding,
                    sampling=self._sampling(index),
                )  # fmt: skip
            answer = first_answer(verdict, opening, self.config)
            first = perf_counter()
            answer.prefill_ms = 1e3 * (first - start)
            if drafter and not opening.begun:
                drafter.begin(request)
                answer.begin_ms = 1e3 * (perf_counter() - first)
        except BaseException as error:
            abandon(drafter)
            if target.cache.active > number:
                target.release(number, damaged=True)
            self._fail(index, error)
            return
        self.answers[index] = answer
        self.running.append(_Running(index, drafter, answer, opening.text, first))
        self.tell(index, answer.tokens[:])

    def _sampling(self, index: int) -> Sampling | None:
        """A seed given with a prompt is its own; others share one and differ by stream."""
        seed = self.prompts[index].seed
        return Sampling.of(self.config, seed, index if seed is None else 0)

    def _propose(self) -> None:
        """The trees of the next round; who does not want or cannot have one leaves."""
        for number in reversed(range(len(self.running))):
            one = self.running[number]
            clock = perf_counter()
            try:
                one.answer.cancelled = asked(self.prompts[one.index].stop)()
                if not one.answer.cancelled:
                    room, tokens = self.target.room(number), one.answer.tokens
                    one.tree = propose(one.drafter, one.text, self.config, tokens, room)
                    self.target.check(number, one.tree)
            except Exception as error:
                self._leave(number, error)
                continue
            one.propose_ms = 1e3 * (perf_counter() - clock)
            if one.answer.cancelled:
                self._leave(number)

    def _round(self) -> None:
        """One verify of all running requests."""
        times: list[float] = []
        try:
            verdicts = self._verify_or_step(times)
        except Exception as error:
            for number in reversed(range(len(self.running))):
                self._leave(number, error)
            return
        spent = [1e3 * (after - before) for before, after in pairwise(times)]
        news = []
        for number in reversed(range(len(self.running))):
            one, verdict = self.running[number], verdicts[number]
            try:
                verdict.checked()
            except RuntimeError as error:
                self._leave(number, error)
                continue
            answer = one.answer
            emitted = self.config.cut(verdict.tokens, len(answer.tokens))
            answer.tokens += emitted
            answer.near_ties += verdict.near_ties
            answer.rounds.append(
                Round(len(one.tree), verdict.accepted, len(emitted), one.propose_ms, *spent)
            )
            news.append((one.index, emitted))
        for index, tokens in reversed(news):
            self.tell(index, tokens)

    def _verify_or_step(self, times: list[float]) -> list[Verdict]:
        """`_verify`, once more without drafts where it does not fit the memory."""
        try:
            return self._verify(times)
        except Exception as error:
            if not out_of_memory(error) or all(len(one.tree) == 1 for one in self.running):
                raise
        for one in self.running:
            one.tree = DraftTree.root(one.answer.tokens[-1])
        return self._verify(times)

    def _verify(self, times: list[float]) -> list[Verdict]:
        """Forward, accept, commit; `times` are when each began and the last was done."""
        trees = [one.tree for one in self.running]
        contexts = [one.answer.tokens for one in self.running]
        target, rows = self.target, sum(map(len, trees))
        height = self.config.height(max(map(len, trees)))
        times[:] = [perf_counter()]
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

    def _end_finished(self) -> None:
        """Take complete answers out."""
        for number in reversed(range(len(self.running))):
            if self.config.done(self.running[number].answer.tokens):
                self._leave(number)

    def _leave(self, number: int, error: Exception | None = None) -> None:
        """End a running request; the last one moves into the gap."""
        one = self.running[number]
        if one.answer.cancelled or error:
            abandon(one.drafter)
        elif one.drafter:
            try:
                one.drafter.end(one.answer.tokens)
            except Exception as failure:
                error = failure
        one.answer.decode_ms = 1e3 * (perf_counter() - one.first)
        self.target.release(number, damaged=error is not None)
        self.running[number] = self.running[-1]
        self.running.pop()
        if error:
            self._fail(one.index, error)
        elif one.drafter:
            self.idle.append(one.drafter)

    def _fail(self, index: int, error: BaseException) -> None:
        """Keep the error of a request, or raise it."""
        if not self.return_errors or not isinstance(error, Exception):
            raise error
        # Its frames would keep tensors for as long as the caller keeps the answer.
        clear_frames(error.__traceback__)
        self.answers[index].error = error
