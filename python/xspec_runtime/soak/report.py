"""What a soak found, for a result file and in lines."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from ..environment import environment
from .memory import TOLERANCE, MemoryWatch, growth

if TYPE_CHECKING:
    from .run import Soak, SoakOptions


def summary(results: dict) -> list[str]:
    """The results in lines."""
    counts, memory = results["counts"], results["memory"]["growth"]
    became = ", ".join(f"{counts.get(k, 0)} {k}" for k in ("complete", "cancelled", "failed"))
    lines = [
        f"seed {results['seed']}: {results['requests']} requests in {results['seconds']:.0f} s, "
        f"{became}; {results['tokens']} tokens, {results['verifies']} verifies",
        f"wrong: {results['wrong']}",
        *results["problems"],
    ]
    for name, found in memory.items():
        lines.append(
            f"{name}: {found['early']} to {found['late']}, {found['growth']:+.3%} "
            f"({found['per_request']:+.1f} a request)"
        )
    flat = {True: "flat", False: "NOT flat", None: "not judged, too few requests"}
    return [*lines, f"memory: {flat[results['memory']['flat']]}"]


def report(
    options: SoakOptions, soak: Soak, watch: MemoryWatch, seconds: float, interrupted: bool | None
) -> dict:
    """For the result file; `interrupted` is None while it runs."""
    found = growth(watch.samples)
    flat = all(abs(one["growth"]) <= TOLERANCE for one in found.values()) if found else None
    return {
        "schema": "xspec.soak/1",
        "command": options.command,
        "environment": environment(),
        "options": {k: v for k, v in asdict(options).items() if k not in ("command", "json_file")},
        "seed": options.seed,
        "complete": interrupted is False,
        "seconds": seconds,
        "requests": soak.requests,
        "calls": soak.calls,
        "tokens": soak.tokens,
        "verifies": soak.verifies,
        "counts": dict(sorted(soak.counts.items())),
        "wrong": soak.wrong,
        "problems": soak.problems,
        "memory": {
            "growth": found,
            "flat": flat,
            "samples": [asdict(sample) for sample in watch.samples],
        },
    }
