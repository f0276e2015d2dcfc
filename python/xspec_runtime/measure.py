"""The end-to-end comparison: arms interleaved sample by sample, results in the `xspec.e2e/1`
schema.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import mean, median

from .arms import Arm, Outcome, Task
from .environment import environment
from .metrics import (
    accept_histogram,
    acceptance_rate,
    gain,
    speedup_of_totals,
    tokens_per_verify,
)
from .overlap import mean_stages
from .prefill import count_mismatches
from .workloads import PLAIN, Workload

SCHEMA = "xspec.e2e/1"
# A sample counts as slower or faster than plain decoding beyond this share of its time.
BREAKEVEN = 0.02


@dataclass(slots=True)
class Sample:
    """One arm on one task.

    Attributes:
        identical: its tokens are those of plain decoding.
        lossless: they have to be.
    """

    arm: str
    task: str
    outcome: Outcome
    identical: bool
    lossless: bool = True


def check_arms(workload: Workload, names: Sequence[str]) -> None:
    """Raise `ValueError` unless all `names` are arms of the workload, plain decoding among them."""
    unknown = set(names) - set(workload.arms)
    if unknown:
        raise ValueError(f"unknown arms {sorted(unknown)}; there are {', '.join(workload.arms)}")
    if PLAIN not in names:
        raise ValueError(f"the arm {PLAIN!r} is what everything is compared with; add it")


def run_interleaved(
    workload: Workload,
    names: Sequence[str],
    warmup: int = 2,
    progress: Callable[[], None] = lambda: None,
    trace: Callable[[str], None] | None = None,
) -> list[Sample]:
    """Every arm on every task, arms in rotating order; the first `warmup` tasks run once more,
    uncounted.

    Ctrl-C ends the run; the tasks that every arm finished are kept.
    """
    check_arms(workload, names)
    arms = [workload.arms[name]() for name in names]
    samples: list[Sample] = []
    try:
        for task in workload.tasks[:warmup]:
            for arm in arms:
                arm.run(task)
                progress()
        # Drafters that learn start the counted part as they started the warm-up.
        arms = [workload.arms[name]() for name in names] if warmup else arms
        for i, task in enumerate(workload.tasks):
            shift = i % len(arms)
            done = [_run(arm, task, i, trace) for arm in arms[shift:] + arms[:shift]]
            truth = next(o.tokens for a, o in done if a.name == PLAIN)
            samples += [
                Sample(a.name, task.name, o, o.tokens == truth, getattr(a, "lossless", True))
                for a, o in done
            ]
            for _ in arms:
                progress()
    except KeyboardInterrupt:
        if not samples:
            raise
    return samples


def _run(arm: Arm, task: Task, index: int, trace: Callable[[str], None] | None):
    def record(tree, verdict, context) -> None:
        line = {
            "sample": index,
            "drafter": arm.name,
            "rows": arm.decoder.config.rows,
            "online": True,
            "context": list(context),
            "tokens": tree.tokens[1:],
            "parent_idx": [p - 1 for p in tree.parent_idx[1:]],
            "accepted": verdict.accepted,
        }
        trace(json.dumps(line))

    return arm, arm.run(task, record if trace else None)


def summarize(
    samples: list[Sample], names: Sequence[str], workload: Workload, config: dict, command: str
) -> dict:
    """The results dictionary of schema `xspec.e2e/1`; `complete` is false where samples lack, and
    the configuration then says how many.
    """
    by_arm = {name: [s for s in samples if s.arm == name] for name in names}
    plain = [s.outcome for s in by_arm[PLAIN]]
    step_ms = mean(r.propose_ms + r.verify_ms for o in plain for r in o.rounds)
    truth = {s.task: s.outcome.tokens for s in by_arm[PLAIN]}
    fused = [s for s in samples if s.outcome.prefill_drafted]
    seen = workload.seen
    done, planned = len(plain), len(workload.tasks)
    interrupted = None if done == planned else f"after {done} of {planned} samples"
    return {
        "schema": SCHEMA,
        "environment": environment(),
        "command": command,
        "complete": done == planned,
        "config": {**config, **workload.facts, "samples": done, "interrupted": interrupted},
        "near_ties": {
            "steps": sum(len(s.outcome.tokens) for s in samples if s.outcome.rounds),
            "below_2_ulp": sum(s.outcome.near_ties for s in samples),
        },
        # Drafts verified inside the prefill, and what that changed in the answers.
        "prefill_fused": {
            "drafted": sum(s.outcome.prefill_drafted for s in fused),
            "accepted": sum(s.outcome.prefill_accepted for s in fused),
            **asdict(count_mismatches((truth[s.task], s.outcome.tokens) for s in fused)),
        },
        "verbatim_in_training": None
        if seen is None
        else {
            "captions": sum(tuple(o.tokens) in seen for o in plain),
            "share": mean(tuple(o.tokens) in seen for o in plain),
        },
        "arms": [_arm(name, by_arm[name], plain, step_ms) for name in names],
        "samples": [
            {
                "arm": s.arm,
                "task": s.task,
                "total_ms": s.outcome.total_ms,
                "ttft_ms": s.outcome.ttft_ms,
                "prefill_ms": s.outcome.prefill_ms,
                "tokens": len(s.outcome.tokens),
                "forwards": s.outcome.forwards,
                "accepted": sum(r.accepted for r in s.outcome.rounds),
                "prefill_drafted": s.outcome.prefill_drafted,
                "prefill_accepted": s.outcome.prefill_accepted,
                "identical": s.identical,
                **({} if s.outcome.prepare_ms is None else {"prepare_ms": s.outcome.prepare_ms}),
            }
            for s in samples
        ],
    }


def _arm(name: str, samples: list[Sample], plain: list[Outcome], step_ms: float) -> dict:
    outcomes = [s.outcome for s in samples]
    rounds = [r for o in outcomes for r in o.rounds]
    totals, reference = [o.total_ms for o in outcomes], [o.total_ms for o in plain]
    have_prefill = all(o.prefill_ms is not None for o in outcomes)
    decode = [_decode_ms(o) for o in outcomes] if have_prefill else None
    plain_decode = sum(map(_decode_ms, plain))
    ratios = [p / t for p, t in zip(reference, totals, strict=True)]
    lossless = all(s.lossless for s in samples)
    per_verify = _tokens_per_verify(outcomes) if lossless else None
    drafted = sum(r.rows - 1 for r in rounds)
    verify_ms = mean(r.verify_ms for r in rounds) if rounds else None
    return {
        "name": name,
        "prefill_ms": median(o.prefill_ms for o in outcomes) if have_prefill else None,
        "decode_ms": median(decode) if decode else None,
        "total_ms": median(totals),
        "ttft_ms": median(o.ttft_ms for o in outcomes),
        "acceptance_rate": acceptance_rate(sum(r.accepted for r in rounds), drafted),
        "tokens_per_verify": per_verify,
        "gain": gain(per_verify, verify_ms, step_ms) if rounds else None,
        "speedup_total": speedup_of_totals(reference, totals),
        "speedup_decode": plain_decode / sum(decode) if decode else None,
        "identical": sum(s.identical for s in samples) if lossless else None,
        "samples": len(samples),
        "slower": sum(r < 1 for r in ratios),
        "tokens": mean(len(o.tokens) for o in outcomes),
        "accept_histogram": _histogram(rounds) if drafted else None,
        "by_accepted": _by_accepted(outcomes, ratios) if drafted else None,
        "round_split_ms": {
            part: mean(getattr(r, f"{part}_ms") for r in rounds)
            for part in ("propose", "forward", "accept", "commit")
        }
        if rounds
        else None,
        "ledger": _ledger(outcomes, step_ms) if drafted else None,
        "timeline": _timeline(outcomes[0]) if rounds else None,
        **_from_file(outcomes),
        **({} if lossless else {"agreement": _agreement(outcomes, plain)}),
    }


def _agreement(outcomes: list[Outcome], plain: list[Outcome]) -> dict[str, float]:
    """How near answers that promise nothing come to the target's."""
    pairs = [(p.tokens, o.tokens) for p, o in zip(plain, outcomes, strict=True)]
    found = count_mismatches(pairs)
    longest = sum(max(map(len, pair)) for pair in pairs)
    return {
        "equal_answers": found.answers - found.different_answers,
        "answers": found.answers,
        "equal_tokens": 1 - found.different_tokens / longest,
        "prefix": mean(
            next((i for i, (a, b) in enumerate(zip(*p, strict=False)) if a != b), min(map(len, p)))
            for p in pairs
        ),
    }


def _decode_ms(outcome: Outcome) -> float:
    return outcome.total_ms - outcome.prefill_ms - (outcome.prepare_ms or 0.0)


def _from_file(outcomes: list[Outcome]) -> dict[str, object]:
    """What only arms have that make their inputs from a file, or whose draft runs ahead."""
    found: dict[str, object] = {}
    if all(o.prepare_ms is not None for o in outcomes):
        found["prepare_ms"] = median(o.prepare_ms for o in outcomes)
    stages = [o.stages for o in outcomes]
    if all(stages):
        found["stages"] = mean_stages(stages)
    return found


def _tokens_per_verify(outcomes: list[Outcome]) -> float:
    """Tokens after those of the first pass per forward pass after it; assisted generation, whose
    first pass already verifies, is counted as if that pass gave one."""
    later = sum(max(o.forwards - 1, 1) for o in outcomes)
    emitted = sum(len(o.tokens) - 1 - o.prefill_accepted for o in outcomes)
    return tokens_per_verify(emitted, later)


def _histogram(rounds: list) -> dict[str, int]:
    return {str(k): n for k, n in accept_histogram(r.accepted for r in rounds).items()}


def _by_accepted(outcomes: list[Outcome], ratios: list[float]) -> list[dict]:
    """Samples grouped by their mean accepted tokens a round, rounded."""
    groups: dict[int, list[float]] = {}
    for outcome, ratio in zip(outcomes, ratios, strict=True):
        if outcome.rounds:
            groups.setdefault(round(mean(r.accepted for r in outcome.rounds)), []).append(ratio)
    rows = []
    for accepted, group in sorted(groups.items()):
        typical = median(group)
        verdict = "faster" if typical > 1 + BREAKEVEN else "slower"
        rows.append(
            {
                "accepted": accepted,
                "samples": len(group),
                "share": len(group) / len(outcomes),
                "median_speedup": typical,
                "slower": sum(r < 1 for r in group),
                "verdict": "breakeven" if abs(typical - 1) <= BREAKEVEN else verdict,
            }
        )
    return rows


def _ledger(outcomes: list[Outcome], step_ms: float) -> dict[str, float]:
    """Tokens saved x step - verify overhead - drafting = net milliseconds, per sample."""
    saved = mean(sum(r.emitted - 1 for r in o.rounds) for o in outcomes)
    overhead = mean(sum(r.verify_ms - step_ms for r in o.rounds) for o in outcomes)
    drafting = mean(o.begin_ms + sum(r.propose_ms for r in o.rounds) for o in outcomes)
    return {
        "tokens_saved": saved,
        "step_ms": step_ms,
        "saved_ms": saved * step_ms,
        "verify_overhead_ms": overhead,
        "drafting_ms": drafting,
        "net_ms": saved * step_ms - overhead - drafting,
    }


def _timeline(outcome: Outcome) -> list[dict]:
    """Phases of one sample, back to back as they ran; the draft's text lies `beside` them."""
    if outcome.stages:
        out = outcome.stages.spans()
        clock = outcome.prepare_ms or 0.0
    else:
        out, clock = [], outcome.prepare_ms or 0.0
        if clock:
            out.append({"name": "video", "start_ms": 0.0, "end_ms": clock})
    spans = [("prefill", outcome.prefill_ms), ("begin", outcome.begin_ms)]
    for r in outcome.rounds:
        spans += [("propose", r.propose_ms), ("verify", r.forward_ms + r.accept_ms)]
        spans += [("commit", r.commit_ms)]
    for name, length in spans:
        if length > 0:
            out.append({"name": name, "start_ms": clock, "end_ms": clock + length})
        clock += length
    return out
