"""v(M), the time of one target forward over M rows, by engine, prompt and mode, against one row and
against the bytes that have to be read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch

from xspec_kernels import exact, tiles

from ..drafters.base import DraftTree
from ..environment import environment
from ..gpu.baseline import copy_timing
from ..gpu.cases import relative_error
from ..gpu.clock import captured, current, rotated, summarize, visit
from .engines import Engine, build_engines
from .options import Plan, VerifyOptions
from .report import SCHEMA
from .stage import Stage, Subject, find_config, random_model

SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
# Relative error between engines; other keys in the cache make 0.6.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}
COPY_BYTES = {"cpu": 128 << 20, "cuda": 2 << 30}

Key = tuple[str, str, int]
"""Engine, shape, rows."""

Progress = Callable[[int, int, str], None]


def run_verify(
    options: VerifyOptions, progress: Progress = lambda done, total, what: None
) -> dict[str, object]:
    """Measure; returns the results dictionary of schema ``xspec.verify/1``.

    Ctrl-C ends the run; rows that were measured are kept, and `complete` is false then.

    Args:
        progress: told how much is done, of how much, and what.

    Raises:
        ValueError, RuntimeError, OSError: see `VerifyOptions.plan`, `find_config`, `random_model`
            and `build_engines`; RuntimeError also where two engines disagree.
    """
    plan, config = options.plan(), find_config(options.config)
    if options.threads or options.config == "mini":
        torch.set_num_threads(options.threads or 1)
    progress(0, 1, "weights")
    with torch.inference_mode(), current(plan.device):
        model = random_model(config, plan.device, plan.dtype, plan.seed)
        keep = bool({"transformers", "packed"} & set(plan.backends))
        subject = Subject.of(model, plan.seed, keep)
        del model
        progress(0, 1, "bandwidth")
        size = COPY_BYTES[torch.device(plan.device).type]
        copy = copy_timing(size, plan.device)
        gbps = 2 * size / copy.ms / 1e6
        found = measure(plan, subject, gbps, progress)
    facts = {key: str(value) if isinstance(value, Path) else value
             for key, value in asdict(options).items()}  # fmt: skip
    command = facts.pop("command")
    s = subject.weights.shape
    names = list(dict.fromkeys(row["backend"] for row in found.rows))
    facts |= {"dtype": str(plan.dtype)[6:], "measured": names}
    facts |= {"layers": s.layers, "hidden": s.hidden, "vocab": s.vocab, "weights": "random"}
    facts |= {
        "exact": exact(),
        "tiles": tiles.config_hash(tiles.card_of(subject.weights.embed.device)),
    }
    return {
        "schema": SCHEMA,
        "environment": environment(),
        "command": command,
        "complete": not found.stopped,
        "config": facts,
        "copy": {"gbps": gbps, "spread": copy.spread, "bytes": size},
        "notes": found.notes,
        "verify": found.rows,
    }  # fmt: skip


class Measured(NamedTuple):
    """Rows of the table of v(M), what was left out, and whether Ctrl-C came before the end."""

    rows: list[dict]
    notes: list[str]
    stopped: bool


def measure(
    plan: Plan,
    subject: Subject,
    gbps: float | None,
    progress: Progress = lambda done, total, what: None,
) -> Measured:
    """Everything that `plan` names.

    Args:
        gbps: bandwidth for the floor; None leaves it out.

    Raises:
        ValueError: see `build_engines`.
        RuntimeError: engines disagree, or a graph with the pass it was captured from.
        KeyboardInterrupt: Ctrl-C before there was a row.
    """
    rows: list[dict] = []
    notes: dict[str, None] = {}
    stopped = False
    try:
        for prompt in plan.prompt_tokens:
            progress(0, 1, f"{prompt} tokens: agreement")
            stage = subject.stage(prompt)
            engines = build_engines(stage, plan.backends)
            trees = plan.trees(stage)
            _agree(engines, [trees["chain", 1], *list(trees.values())[1:][-1:]], plan.dtype)
            for mode in plan.modes:
                able = [engine for engine in engines if mode in engine.modes]
                if mode == "graph":
                    left = [engine.name for engine in engines if engine not in able]
                    notes |= {
                        f"{name} has no graph: it prepares on the host": None for name in left
                    }
                if not able:
                    continue
                progress(0, 1, f"{prompt} tokens, {mode}")
                work = _passes(able, trees, mode, plan)
                samples, stopped = _sample(work, plan, f"{prompt} tokens, {mode}", progress)
                rows += _rows(samples, stage, mode, plan, gbps)
                # Graphs must not be dropped once others were captured on their stream.
                work.clear()
                if stopped:
                    break
            if stopped:
                break
    except KeyboardInterrupt:
        stopped = True
    if stopped and not rows:
        raise KeyboardInterrupt
    return Measured(rows, list(notes), stopped)


def _agree(engines: Sequence[Engine], trees: Sequence[DraftTree], dtype: torch.dtype) -> None:
    """Raise `RuntimeError` unless all engines give the first one's logits."""
    for tree in trees:
        want = engines[0].logits(tree)
        for engine in engines[1:]:
            error = relative_error(engine.logits(tree), want)
            if not error < TOLERANCE[dtype]:
                raise RuntimeError(
                    f"{engine.name} and {engines[0].name} differ by {error:.3g} on "
                    f"{len(tree)} rows; nothing was timed"
                )


def _passes(
    engines: Sequence[Engine], trees: dict[tuple[str, int], DraftTree], mode: str, plan: Plan
) -> dict[Key, Callable[[], object]]:
    """What is timed. A graph must repeat what its pass computes."""
    work: dict[Key, Callable[[], object]] = {}
    for engine in engines:
        for key, tree in trees.items():
            run = engine.pass_of(tree, mode)
            if mode == "graph":
                eager, want = run, engine.pass_of(tree)()[1].clone()
                run = captured(eager, torch.device(plan.device).type)
                error = relative_error(run()[1], want)
                if not error < TOLERANCE[plan.dtype]:
                    raise RuntimeError(
                        f"{engine.name}: the graph of {len(tree)} rows is off by {error:.3g}"
                    )
            work[engine.name, *key] = run
    return work


def _sample(
    work: dict[Key, Callable[[], object]], plan: Plan, what: str, progress: Progress
) -> tuple[dict[Key, list[float]], bool]:
    """Milliseconds of every pass in rotating order, and whether Ctrl-C cut it short."""
    samples: dict[Key, list[float]] = {key: [] for key in work}
    kind, total = torch.device(plan.device).type, len(work) * plan.repeats
    try:
        for done, key in enumerate(rotated(list(work), plan.repeats)):
            progress(done, total, what)
            samples[key] += visit(work[key], kind)
    except KeyboardInterrupt:
        return samples, True
    return samples, False


def _rows(
    samples: dict[Key, list[float]], stage: Stage, mode: str, plan: Plan, gbps: float | None
) -> Iterator[dict]:
    timings = {key: summarize(values) for key, values in samples.items() if len(values) > 1}
    for (backend, shape, rows), timing in timings.items():
        one = timings.get((backend, "chain", 1))
        if one is None:
            continue
        nbytes = stage.nbytes(rows)
        floor = nbytes / gbps / 1e6 if gbps else None
        yield {
            "weights": SHORT[plan.dtype], "prompt_tokens": stage.cache.length, "rows": rows,
            "shape": shape, "backend": backend, "mode": mode, "ms": timing.ms,
            "ratio": timing.ms / one.ms, "floor_ms": floor,
            "floor_ratio": timing.ms / floor if floor else None, "spread": timing.spread,
            "calls": timing.calls, "bytes": nbytes,
        }  # fmt: skip
