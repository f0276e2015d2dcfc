"""Endurance: random requests for hours, each answer compared, memory watched.

Requests of all lengths, drafters, tree sizes and batch sizes run one after another on decoders that
stay. Some are cancelled, some fail: bad inputs, drafters that raise, passes that run out of memory
or give NaN. Whatever happened before, an answer must be plain decoding's, token by token, up to
where its request ended; and the process must hold no more at the end than soon after the start.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from time import perf_counter

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

from ..batch import BatchPrompt
from ..engine import Generation
from ..errors import out_of_memory
from ..files import check_output, write_json
from .bench import ENGINES, SoakBench
from .faults import MOMENTS, DrafterFault
from .memory import MemoryWatch
from .plan import VOCAB, Call, Plan, PlannedRequest, plan_call, prompts
from .report import report

PROMPTS = 17
SAMPLE_EVERY = 10  # requests between two looks at the memory
SAVE_EVERY = 30.0  # seconds between two result files
SHOWN = 20  # differences that are kept in full


class CallbackFault(Exception):
    """What a planned callback raises."""


@dataclass(frozen=True)
class SoakOptions:
    """Arguments of one run; it ends at whichever of `minutes` and `requests` comes first."""

    command: str = "soak"
    minutes: float = 10.0
    requests: int = 1_000_000
    seed: int = 0
    engines: str = ",".join(ENGINES)
    json_file: Path | None = None

    def names(self) -> list[str]:
        """The engines.

        Raises:
            ValueError: an option is out of range; the message names it.
        """
        if not 0 < self.minutes <= 100_000:
            raise ValueError(f"--minutes must be above 0 and at most 100000, got {self.minutes}")
        if not 1 <= self.requests <= 10**9:
            raise ValueError(f"--requests must be in 1..{10**9}, got {self.requests}")
        names = [name.strip() for name in self.engines.split(",")]
        if not set(names) <= set(ENGINES):
            raise ValueError(f"--engines must be of {', '.join(ENGINES)}, got {self.engines!r}")
        return names


@dataclass
class Soak:
    """What has happened so far.

    Attributes:
        counts: requests by what became of them, by drafter, by engine and batch size, and faults.
        problems: what should not be; the first `SHOWN` of `wrong`.
    """

    bench: SoakBench
    seed: int
    requests: int = 0
    calls: int = 0
    tokens: int = 0
    verifies: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    wrong: int = 0

    def run(self, call: Call) -> None:
        """One call of a decoder, and the comparison."""
        answers, fired = self._answers(call)
        for i, (plan, answer) in enumerate(zip(call.plans, answers, strict=True)):
            problem = judge(call, plan, answer, self._expected(call, plan), fired)
            if problem:
                self.wrong += 1
                if len(self.problems) < SHOWN:
                    where = f"--seed {self.seed}, call {call.number}, request {i}: {plan}"
                    self.problems.append(f"{problem} ({where})")
            self._count(call, plan, answer)
        failed = sum(answer.error is not None for answer in answers)
        if call.fault == "nan" and failed > 1:
            self.wrong += 1
            self.problems.append(f"NaN of one request failed {failed} (call {call.number})")
        self.calls += 1
        self.requests += len(answers)

    def _answers(self, call: Call) -> tuple[list[Generation], bool]:
        """The answers, and whether the call's own fault happened."""
        decoder, faults = self.bench.decoders[call.engine, call.batch], self.bench.faults
        first = self.bench.plain[call.engine, call.plans[0].prompt, call.plans[0].processed]
        ends = () if call.end is None or call.end >= len(first) else (first[call.end],)
        call.config = decoder.config = replace(call.config, eos_token_ids=ends)
        asked = [self._prompt(call, plan) for plan in call.plans]
        heard: list[list[int]] = [[] for _ in asked]
        tell = _listener(heard, call.after if call.fault == "callback" else None)
        passes = faults[call.engine]
        if call.fault in ("nan", "memory"):
            passes.arm(call.fault, call.after, call.slot)
        try:
            if call.batch > 1:
                answers = decoder.generate(asked, tell, return_errors=True)
            else:
                one = asked[0]
                answers = [
                    decoder.generate(
                        one.inputs, one.request, one.logits_processor,
                        lambda tokens: tell(0, tokens), drafted=one.drafted, stop=one.stop,
                    )
                ]  # fmt: skip
        except Exception as error:
            answers = [Generation(tokens, error=error) for tokens in heard]
        fired = passes.disarm() or call.fault == "callback"
        return answers, fired

    def _prompt(self, call: Call, plan: Plan) -> BatchPrompt:
        bench, rng = self.bench, Random(plan.seed)
        ids, expected = bench.prompts[plan.prompt], self._expected(call, plan)
        drafted = expected[: plan.drafted]
        if drafted and rng.random() < 0.5:
            drafted[rng.randrange(len(drafted))] = rng.randrange(VOCAB)
        inputs = {"input_ids": ids}
        if plan.fault == "input":
            if rng.random() < 0.5:
                drafted = [VOCAB]
            else:
                inputs = {"input_ids": ids.expand(2, -1)}
        request = PlannedRequest(ids[0].tolist(), {"input_ids": ids}, plan=plan, answer=expected)
        processor = bench.processor if plan.processed else None
        stop = None if plan.cancel is None else _patience(plan.cancel)
        return BatchPrompt(inputs, request, processor, drafted, stop)

    def _expected(self, call: Call, plan: Plan) -> list[int]:
        """Plain decoding's answer."""
        return call.config.cut(self.bench.plain[call.engine, plan.prompt, plan.processed], 0)

    def _count(self, call: Call, plan: Plan, answer: Generation) -> None:
        fault = plan.fault or call.fault
        became = "cancelled" if answer.cancelled else "failed" if answer.error else "complete"
        keys = [became, f"drafter {plan.drafter}", f"{call.engine}, batch {call.batch}"]
        if answer.error:
            keys.append(f"failed: {fault}")
        self.counts.update(keys)
        self.tokens += len(answer.tokens)
        self.verifies += len(answer.rounds)


def judge(call: Call, plan: Plan, answer: Generation, expected: list[int], fired: bool) -> str:
    """What is wrong with an answer; empty: nothing.

    Args:
        expected: plain decoding's answer.
        fired: whether the call's own fault happened.
    """
    tokens, error = answer.tokens, answer.error
    if tokens != expected[: len(tokens)]:
        return f"{tokens} is not plain decoding's {expected}"
    if answer.cancelled:
        return "" if plan.cancel is not None else "cancelled, though nobody asked"
    if error is None:
        if plan.fault in ("input", "full"):
            return f"no error, though the fault was {plan.fault}"
        return "" if tokens == expected else f"only {tokens} of {expected}"
    known = {
        **dict.fromkeys(MOMENTS, isinstance(error, DrafterFault)),
        "input": isinstance(error, ValueError),
        "full": isinstance(error, (ValueError, RuntimeError)) and "cache" in str(error),
        "nan": fired and isinstance(error, RuntimeError) and "NaN" in str(error),
        "memory": fired and out_of_memory(error),
        "callback": isinstance(error, CallbackFault),
    }
    fault = plan.fault or call.fault
    return "" if known.get(fault) else f"{type(error).__name__}: {error} (fault: {fault or 'none'})"


def run_soak(options: SoakOptions, console: Console | None = None) -> dict:
    """Run, show progress and write; returns the results, of an interrupted run too.

    Raises:
        ValueError: an option is out of range.
        OSError: the result file cannot be written.
    """
    names = options.names()
    if options.json_file:
        check_output(options.json_file)
    asked = prompts(options.seed, PROMPTS)
    soak = Soak(SoakBench(options.seed, names, asked), options.seed)
    start = saved = perf_counter()
    watch = MemoryWatch()
    interrupted = False
    columns = ("{task.description}", MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=console or Console(quiet=True)) as bar:
            task = bar.add_task(f"seed {options.seed}", total=options.requests)
            while soak.requests < options.requests:
                before = soak.requests
                soak.run(plan_call(options.seed, soak.calls, names, len(asked)))
                if before // SAMPLE_EVERY != soak.requests // SAMPLE_EVERY:
                    watch.sample(soak.requests)
                state = f"seed {options.seed}, {soak.wrong} wrong"
                bar.update(task, completed=soak.requests, description=state)
                now = perf_counter()
                if now - start >= 60 * options.minutes:
                    break
                if options.json_file and now - saved >= SAVE_EVERY:
                    write_json(options.json_file, report(options, soak, watch, now - start, None))
                    saved = now
    except KeyboardInterrupt:
        interrupted = True
    finally:
        watch.close()
    seconds = perf_counter() - start
    results = report(options, soak, watch, seconds, interrupted)
    if options.json_file:
        write_json(options.json_file, results)
    return results


def _listener(heard: list[list[int]], after: int | None) -> Callable[[int, list[int]], None]:
    """An `on_tokens` that keeps what it hears, and raises after so many calls."""
    left = after

    def tell(index: int, tokens: list[int]) -> None:
        nonlocal left
        heard[index].extend(tokens)
        if left is not None:
            left -= 1
            if left < 0:
                raise CallbackFault("planned")

    return tell


def _patience(times: int) -> Callable[[], bool]:
    """A `stop` that says no so many times."""
    left = times

    def stop() -> bool:
        nonlocal left
        left -= 1
        return left < 0

    return stop
