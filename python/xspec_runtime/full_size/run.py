"""The arms at full size, one after another in rotating order."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from statistics import median

import torch

from xspec_kernels import ranges

from ..arms import Outcome
from ..environment import environment
from ..gpu.clock import rotated
from ..profiling.figures import figures, read_timeline
from ..profiling.timeline import length, union
from .arms import Run, our_arms, peer_arms
from .options import Options, checked

SCHEMA = "xspec.full_size/1"
NOTICE = (
    "random weights, language models only; every pass is computed, accepted lengths are imposed"
)
# Of `profiling.figures`.
ROUND = (
    *("launches_per_round", "cuda_waits_per_round", "readbacks_per_round"),
    *("gpu_busy_per_round_ms", "gpu_rest", "gap"),
)


def run_full_size(options: Options, log: Callable[[str], None]) -> dict:
    """All arms; figures as JSON types, milliseconds and bytes.

    Raises:
        ValueError: an option is unknown or out of range, or an oracle is missing or damaged.
        RuntimeError: the models do not fit the memory, or an arm's tokens are not the script's.
    """
    shape, oracles = checked(options)
    log(NOTICE)
    log(f"memory tree: {oracles[0].source}; draft's chain: {oracles[1].source}")
    table, skipped = {}, {}
    # Each group of arms holds its models alone: the peaks are its own.
    for make in (peer_arms, our_arms) if options.peers else (our_arms,):
        _reset(options.device)
        arms, missing = make(options, shape, *oracles)
        skipped |= missing
        for name, why in missing.items():
            log(f"{name}: left out, {why}")
        if options.device != "cpu":
            # Weights take more while they are made and quantized than they do later.
            torch.cuda.reset_peak_memory_stats()
        samples = _measure(arms, options.device, shape.repeats)
        peak = torch.cuda.max_memory_allocated() if options.device != "cpu" else None
        for name, (outcomes, profiled) in samples.items():
            table[name] = _figures(outcomes, options.window_ms) | profiled | {"peak_bytes": peak}
        del arms
    for name, one in table.items():
        plain = table["plain"]
        for key in ("decode_ms", "gpu_ms", "total_ms"):
            known = one[key] and plain[key]
            one[f"speedup_{key.removesuffix('_ms')}"] = plain[key] / one[key] if known else None
        log(_line(name, one))
    return {
        "schema": SCHEMA,
        "notice": NOTICE,
        "command": options.command,
        "environment": environment(),
        "weights": options.weights,
        "shape": asdict(shape) | {"dtype": str(shape.dtype)[6:]},
        "rows": options.rows,
        "gamma": options.gamma,
        "window_ms": options.window_ms,
        "seed": options.seed,
        "oracles": [{"source": o.source, "mean": o.mean} for o in oracles],
        "arms": table,
        "skipped": skipped,
    }


def _measure(
    arms: Mapping[str, Run], device: str, repeats: int
) -> dict[str, tuple[list[Outcome], dict]]:
    """Outcomes of every arm after one request that warms it up, and what a profiler saw."""
    found: dict[str, list[Outcome]] = {name: [] for name in arms}
    for run in arms.values():
        run(0)
    for i, name in enumerate(rotated(list(arms), repeats) if arms else ()):
        found[name].append(arms[name](i // len(arms)))
    return {
        name: (found[name], _profiled(run, device, bool(found[name] and found[name][0].rounds)))
        for name, run in arms.items()
    }


def _profiled(run: Run, device: str, rounds: bool) -> dict:
    """Milliseconds in which the GPU worked for one request, seen by torch.profiler; in another one,
    where there are rounds, what a round asked of it and how long it rested between two of them.
    """
    activity = torch.profiler.ProfilerActivity
    gpu_ms, seen_by = None, [activity.CPU]
    if device != "cpu":
        from torch.autograd import DeviceType

        seen_by.append(activity.CUDA)
        with torch.profiler.profile(activities=[activity.CUDA]) as profiler:
            run(0)
            torch.cuda.synchronize()
        seen = [e.time_range for e in profiler.events() if e.device_type == DeviceType.CUDA]
        gpu_ms = length(union((r.start, r.end) for r in seen)) / 1e3
    if not rounds:
        return {"gpu_ms": gpu_ms}
    with (
        torch.profiler.profile(activities=seen_by) as profiler,
        ranges.listening(ranges.TorchProfiler()),
    ):
        run(0)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        found = figures(read_timeline(trace))
    return {"gpu_ms": gpu_ms, "round": {key: found[key] for key in ROUND}}


def _figures(outcomes: list[Outcome], window_ms: float) -> dict:
    rounds = [r for out in outcomes for r in out.rounds]
    ours = (
        {
            "tokens_per_verify": sum(r.emitted for r in rounds) / len(rounds),
            "propose_ms": median(r.propose_ms for r in rounds),
            "round_ms": median(r.propose_ms + r.verify_ms for r in rounds),
            "verifies": sum(r.rows > 1 for r in rounds) / len(outcomes),
            "accepted": sum(r.accepted for r in rounds) / len(outcomes),
            "prefill_accepted": sum(out.prefill_accepted for out in outcomes) / len(outcomes),
            "near_ties": sum(out.near_ties for out in outcomes) / len(outcomes),
        }
        if rounds
        else {}
    )
    total = median(out.total_ms for out in outcomes)
    # What the draft does before the prefill fits into the window as far as that lasts.
    hidden = min(window_ms, median(out.begin_ms for out in outcomes))
    return {
        "samples": len(outcomes),
        "ttft_ms": median(out.ttft_ms for out in outcomes),
        "decode_ms": median(out.total_ms - out.ttft_ms for out in outcomes),
        "total_ms": total,
        "total_with_window_ms": total + window_ms - hidden if window_ms else None,
        **ours,
    }


def _line(name: str, f: dict) -> str:
    def ratio(key: str) -> str:
        return f"{f[key]:.2f}x" if f[key] else "-"

    ours = ""
    if "near_ties" in f:
        accepted = f["accepted"] + f["prefill_accepted"]
        ours = f", {accepted:.1f} accepted, {f['near_ties']:.1f} near ties"
    rounds = ""
    if (found := f.get("round")) and found["gpu_rest"]:
        rest = found["gpu_rest"]["median_ms"]
        rounds = (
            f", a round: {found['launches_per_round']:.1f} launches, "
            f"{found['cuda_waits_per_round']:.1f} waits of CUDA, "
            f"{'-' if rest is None else f'{1e3 * rest:.0f}'} us of rest"
        )
    return (
        f"{name}: decode {f['decode_ms']:.1f} ms ({ratio('speedup_decode')}), total "
        f"{f['total_ms']:.1f} ms ({ratio('speedup_total')}), GPU ({ratio('speedup_gpu')}), first "
        f"token {f['ttft_ms']:.1f} ms{ours}{rounds}; outcomes imposed"
    )


def _reset(device: str) -> None:
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
