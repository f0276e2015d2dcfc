"""Regret by the clock: how often a drafted answer takes longer than plain decoding does anyway.

Plain decoding runs twice, in turns with every arm: how much its own two times differ is the spread
beyond which a sample counts as slower.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from statistics import median, quantiles

import torch

from ..arms import DecoderArm, Task
from ..calibration import calibrate, drafting_costs, riding_cost
from ..data.pairs import read_pairs
from ..environment import environment
from ..policy import PricedDrafter
from ..workloads import OURS, PLAIN, MiniPair, Settings
from .counted import count_costs

SCHEMA = "xspec.regret/1"
AGAIN = "target again"
PRICED = " priced"
ARMS = "draft,adapter,adapter_prefix,ngram_cold,ngram_tree,tree"
INTERVAL = 0.95  # of the ratios of plain decoding to itself

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True)
class RegretOptions:
    """What to run.

    Attributes:
        samples: scenes.
        repeats: times that every arm answers each scene, with fresh drafters every time.
        arms: of the embedded pair, by name; each runs as it is and priced.
        pairs: file of recorded pairs, for the table in counted cost; None: no such table.
        limit: only the first so many of them.
    """

    samples: int = 8
    repeats: int = 7
    arms: str = ARMS
    gamma: int = 5
    rows: int = 16
    prefill_fused: str = "exact"
    threads: int = 1
    pairs: Path | None = None
    limit: int | None = None
    command: str = ""

    def names(self) -> list[str]:
        """The arms.

        Raises:
            ValueError: an option is out of range or an arm unknown.
        """
        limits = (("samples", self.samples, 1, 1000), ("repeats", self.repeats, 2, 1000),
                  ("threads", self.threads, 1, 1024), ("gamma", self.gamma, 1, 63),
                  ("rows", self.rows, 2, 64))  # fmt: skip
        for name, value, low, high in limits:
            if not low <= value <= high:
                raise ValueError(f"{name} must be in {low}..{high}, got {value}")
        if self.limit is not None and not self.pairs:
            raise ValueError("limit goes with pairs")
        names = [name.strip() for name in self.arms.split(",") if name.strip()]
        if unknown := set(names) - set(OURS):
            raise ValueError(f"unknown arms {sorted(unknown)}; there are {', '.join(OURS)}")
        if not names or len(set(names)) < len(names):
            raise ValueError(f"arms must be one or more different names, got {self.arms!r}")
        return names


def spread(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """Interval that holds `INTERVAL` of the ratios of two equal things, either way round."""
    ratios = [a / b for a, b in zip(first, second, strict=True)]
    tails = quantiles([*ratios, *(1 / r for r in ratios)], n=1000, method="inclusive")
    tail = round(1000 * (1 - INTERVAL) / 2)
    return tails[tail - 1], tails[-tail]


def compare(times: Mapping[str, Mapping[str, Sequence[float]]]) -> tuple[dict, list[dict]]:
    """The spread of plain decoding, and every arm against it.

    A sample is slower where the median over the repeats of its ratio to plain decoding lies above
    the interval of such medians of plain decoding to itself; a run where its own ratio lies above
    the interval of single ratios.

    Args:
        times: arm -> sample -> one time a repeat; `PLAIN` and `AGAIN` among the arms.
    """
    plain = times[PLAIN]

    def ratios(arm: str) -> list[list[float]]:
        return [
            [time / base for time, base in zip(found, plain[sample], strict=True)]
            for sample, found in times[arm].items()
        ]

    again = ratios(AGAIN)
    runs = [ratio for sample in again for ratio in sample]
    medians = [median(sample) for sample in again]
    ones = [1.0] * len(runs)
    by_run, by_sample = spread(runs, ones), spread(medians, ones[: len(medians)])
    arms = []
    for name in times:
        if name == PLAIN:
            continue
        found = ratios(name)
        middle = [median(sample) for sample in found]
        every = [ratio for sample in found for ratio in sample]
        arms.append(
            {
                "name": name,
                "samples": len(middle),
                "slower_samples": sum(m > by_sample[1] for m in middle) / len(middle),
                "slower_runs": sum(r > by_run[1] for r in every) / len(every),
                "median_ratio": median(every),
                "worst_sample": max(middle),
                "speedup": sum(map(sum, plain.values())) / sum(map(sum, times[name].values())),
            }
        )
    return {"runs": by_run, "samples": by_sample}, arms


def run_regret(
    options: RegretOptions, progress: Progress = lambda done, total, what: None
) -> dict[str, object]:
    """Run everything on the embedded pair; returns results of schema ``xspec.regret/1``.

    Raises:
        ValueError: see `RegretOptions.names`, and `read_pairs` of a file.
        RuntimeError: an arm's answer is not plain decoding's.
    """
    names = options.names()
    recorded = read_pairs(options.pairs, options.limit) if options.pairs else []
    torch.set_num_threads(options.threads)
    settings = Settings(options.gamma, options.rows, prefill_fused=options.prefill_fused)
    pair = MiniPair(settings)
    tasks = pair.scene_tasks(options.samples)
    prices, facts = _prices(pair, names, tasks[0])
    config = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(options).items()}
    command = config.pop("command")
    times = _times(pair, names, prices, tasks, options.repeats, progress)
    within, arms = compare(times)
    counted = []
    for entry in count_costs(recorded, gamma=options.gamma, rows=options.rows) if recorded else ():
        counted.append(asdict(entry))
        progress(0, 1, f"counted: {entry.drafter}")
    return {
        "schema": SCHEMA, "environment": environment(), "command": command, "config": config,
        **facts, "plain_ratio": within, "arms": arms, "counted": counted, "times_ms": times,
    }  # fmt: skip


def _prices(
    pair: MiniPair, names: Sequence[str], task: Task
) -> tuple[dict[str, Callable[[], PricedDrafter]], dict[str, object]]:
    """A maker of each arm priced by what was measured, and those figures."""
    prompt_rows = task.inputs["input_ids"].shape[1]
    found = calibrate(pair.target, max(pair.settings.rows, pair.settings.gamma + 1), prompt_rows)
    costs, step = found.costs(), found.step
    riding = riding_cost(pair.target, task.inputs, pair.settings.gamma, step)
    makers, drafting = {}, {}
    for name in names:
        rows = pair.decoder(name).config.rows
        price = drafting_costs(pair.drafter(name), task.request, rows, step)
        drafting[name] = asdict(price)
        makers[name] = lambda name=name, rows=rows, price=price: PricedDrafter(
            pair.drafter(name), costs[:rows], price, riding
        )
    facts = {"step_ms": 1e3 * step, "row_costs": costs, "riding": riding, "drafting": drafting}
    return makers, {"calibration": {**facts, "cached": found.cached}}


def _times(
    pair: MiniPair,
    names: Sequence[str],
    prices: Mapping[str, Callable[[], PricedDrafter]],
    tasks: Sequence[Task],
    repeats: int,
    progress: Progress,
) -> dict[str, dict[str, list[float]]]:
    """Milliseconds by arm and sample, one a repeat. Arms take turns in random order: each warms or
    cools the caches for the one after it.
    """
    order = Random(0)
    everyone = [PLAIN, AGAIN, *(name + end for name in names for end in ("", PRICED))]
    times = {arm: {task.name: [] for task in tasks} for arm in everyone}
    for repeat in range(repeats + 1):
        # Drafters that learn would otherwise know the answers from the repeat before.
        arms = {arm: _arm(pair, arm, prices) for arm in everyone}
        for number, task in enumerate(tasks):
            answers = {}
            for name in order.sample(everyone, len(everyone)):
                outcome = arms[name].run(task)
                answers[name] = outcome.tokens
                if repeat:  # the first is the warm-up
                    times[name][task.name].append(outcome.total_ms)
            for name, tokens in answers.items():
                if tokens != answers[PLAIN] and pair.settings.prefill_fused != "fast":
                    raise RuntimeError(f"{task.name}: the answer of {name} is not {PLAIN}'s")
            done, total = repeat * len(tasks) + number + 1, (repeats + 1) * len(tasks)
            progress(done, total, f"repeat {repeat}")
    return times


def _arm(pair: MiniPair, arm: str, prices: Mapping[str, Callable[[], PricedDrafter]]) -> DecoderArm:
    name = arm.removesuffix(PRICED)
    decoder = pair.decoder(PLAIN if name == AGAIN else name)
    if arm.endswith(PRICED):
        decoder.drafter = prices[name]()
    return DecoderArm(arm, decoder)
