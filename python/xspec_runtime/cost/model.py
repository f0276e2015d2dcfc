"""What a request should take, in closed form, from what its parts were measured to take.

The parts are the window in which the CPU prepares the target's inputs, the prefill P, a step a, a
verify v(M) and the draft's own steps. Every draft token is right with one chance, independently of
the others: real drafts are right in runs, so a projection is a yardstick, not a forecast.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import mean
from typing import Any

from ..metrics import expected_tokens

SCHEMA = "xspec.cost/1"
ACCEPTANCES = tuple(percent / 100 for percent in range(10, 101, 10))
PLAIN = "target"
Results = Mapping[str, Any]


def acceptance_of(tokens: float, gamma: int) -> float:
    """The acceptance at which a chain of `gamma` emits so many `tokens` a verify, in 0..1."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if expected_tokens(middle, gamma) < tokens else (low, middle)
    return (low + high) / 2


@dataclass(frozen=True, slots=True)
class Costs:
    """What the parts of a request take on one machine, in milliseconds.

    Attributes:
        tokens: of an answer, the first one included.
        window: until the target's inputs are there.
        prefill, step: of the target.
        verify: by rows; between them times are interpolated.
        draft_first, draft_step: the draft's first token from the request on, and one more.
    """

    tokens: float
    window: float
    prefill: float
    step: float
    verify: Mapping[int, float]
    draft_first: float = 0.0
    draft_step: float = 0.0

    def __post_init__(self) -> None:
        times = (self.prefill, self.step, *self.verify.values())
        if self.tokens < 2 or min(times) <= 0 or min(self.window, self.draft_first) < 0:
            raise ValueError(
                "expected at least 2 tokens and positive times of prefill, step and verify, got "
                f"{self}"
            )

    def v(self, rows: int) -> float:
        """Milliseconds of a verify of so many rows; one row is a step.

        Raises:
            ValueError: no verify as tall was measured.
        """
        known = sorted({1: self.step, **self.verify}.items())
        for (low, before), (high, after) in pairwise(known):
            if low <= rows <= high:
                return before + (after - before) * (rows - low) / (high - low)
        if rows == 1:
            return self.step
        raise ValueError(f"v({rows}) was not measured; there are {sorted(self.verify)}")

    @property
    def plain(self) -> float:
        """A request without drafts."""
        return self.window + self.prefill + (self.tokens - 1) * self.step

    @property
    def ceiling(self) -> float:
        """Speedup over `plain` if decoding cost nothing."""
        return self.plain / (self.window + self.prefill)

    def break_even(self, acceptance: float, gamma: int) -> float:
        """The longest verify of `gamma` free drafts that is no slower than plain decoding."""
        return self.step * expected_tokens(acceptance, gamma)

    def rounds(self, tokens: float, rows: int, drafting: float, begin: float = 0.0) -> float:
        """A request of rounds that emit `tokens` each.

        Args:
            drafting: milliseconds of a proposal.
            begin: of the draft's own preparation, where nothing hides it.
        """
        per_round = self.v(rows) + drafting
        return self.window + self.prefill + begin + (self.tokens - 1) / tokens * per_round

    def separate(self, acceptance: float, drafts: int) -> float:
        """One verify of `drafts` made before the prefill, then plain steps; the verify is left out
        where the prefill's token already differs.
        """
        ready = self.draft_first + (drafts - 1) * self.draft_step
        saved = expected_tokens(acceptance, drafts) - 1
        after = max(self.tokens - 1 - saved, 0.0) * self.step
        return max(self.window, ready) + self.prefill + acceptance * self.v(drafts) + after

    def fused(self, acceptance: float, drafts: int) -> float:
        """The same drafts verified inside the prefill, whose rows cost there what they cost a step:
        an upper bound where the prefill has slack.
        """
        ready = self.draft_first + (drafts - 1) * self.draft_step
        saved = expected_tokens(acceptance, drafts) - 1
        after = max(self.tokens - 1 - saved, 0.0) * self.step
        return max(self.window, ready) + self.prefill + self.v(drafts + 1) - self.step + after


@dataclass(frozen=True, slots=True)
class Point:
    """An arm as it was measured, beside what the closed form says of its own parts.

    Attributes:
        acceptance: that a chain of its length would need for `tokens_per_verify`; None for trees.
        rows: of a full proposal.
        verify_ms, drafting_ms, begin_ms: of a round, its proposal, and once a request.
    """

    arm: str
    rows: int
    acceptance: float | None
    tokens_per_verify: float
    verify_ms: float
    drafting_ms: float
    begin_ms: float
    projected_speedup: float
    measured_speedup: float


def costs_of(e2e: Results, verify: Results | None = None, backend: str = "") -> Costs:
    """The parts of a request in results of `bench/e2e.py`.

    Args:
        verify: results of `bench/verify.py` for the same model: its v(M)/v(1) replaces what the
            arms took.
        backend: of `verify`; by default its first.

    Raises:
        ValueError: there is no arm without drafts, or `verify` holds no row of that backend.
    """
    plain = _plain(e2e)
    step = plain.decode / (plain.tokens - 1)
    heights: dict[int, float] = {}
    for point in points_of(e2e):
        if point.acceptance is not None:
            heights.setdefault(point.rows, point.verify_ms)
    if verify is not None:
        heights = {rows: step * ratio for rows, ratio in _ratios(verify, backend).items()}
    draft = next((p for p in points_of(e2e) if p.arm == "draft"), None)
    return Costs(
        plain.tokens,
        plain.window,
        plain.prefill,
        step,
        heights,
        draft.begin_ms if draft else 0.0,
        draft.drafting_ms / (draft.rows - 1) if draft else 0.0,
    )


def points_of(e2e: Results) -> list[Point]:
    """Every arm of `e2e` that drafted and whose rounds are known.

    Raises:
        ValueError: there is no arm without drafts.
    """
    plain = _plain(e2e)
    base = plain.window + plain.prefill + plain.decode
    points = []
    for arm in e2e["arms"]:
        split, ledger = arm["round_split_ms"], arm["ledger"]
        if not split or not ledger or (arm.get("stages") or {}).get("mode"):
            continue
        chain = not arm["name"].endswith("tree")
        rows = 1 + e2e["config"]["gamma"] if chain else e2e["config"]["rows"]
        tokens, drafting = arm["tokens_per_verify"], split["propose"]
        verify = split["forward"] + split["accept"] + split["commit"]
        rounds = (arm["tokens"] - 1) / tokens
        begin = max(0.0, ledger["drafting_ms"] - rounds * drafting)
        total = plain.window + plain.prefill + begin + rounds * (verify + drafting)
        alone = acceptance_of(tokens, rows - 1) if chain else None
        speedups = base / total, arm["speedup_total"]
        points.append(Point(arm["name"], rows, alone, tokens, verify, drafting, begin, *speedups))
    return points


def project(
    costs: Costs, gammas: Sequence[int], acceptances: Sequence[float] = ACCEPTANCES
) -> list[dict[str, float | int]]:
    """Speedups over plain decoding by acceptance and chain length: of rounds whose drafts are free,
    of rounds with this draft, and of one verify of drafts made in the window, apart and in the
    prefill.
    """
    rows = []
    for gamma in gammas:
        for acceptance in acceptances:
            tokens = expected_tokens(acceptance, gamma)
            drafting = gamma * costs.draft_step
            rows.append(
                {
                    "gamma": gamma,
                    "acceptance": acceptance,
                    "tokens_per_verify": tokens,
                    "break_even_ms": costs.break_even(acceptance, gamma),
                    "verify_ms": costs.v(gamma + 1),
                    "free_drafts": costs.plain / costs.rounds(tokens, gamma + 1, 0.0),
                    "own_draft": costs.plain
                    / costs.rounds(tokens, gamma + 1, drafting, costs.draft_first),
                    "separate": costs.plain / costs.separate(acceptance, gamma),
                    "fused": costs.plain / costs.fused(acceptance, gamma),
                }
            )
    return rows


@dataclass(frozen=True, slots=True)
class _Plain:
    """Means of a request without drafts."""

    tokens: float
    window: float
    prefill: float
    decode: float


def _plain(e2e: Results) -> _Plain:
    samples = [s for s in e2e["samples"] if s["arm"] == PLAIN]
    if not samples:
        raise ValueError(f"the results hold no arm {PLAIN!r}, which everything is compared with")
    window = mean(s.get("prepare_ms") or 0.0 for s in samples)
    prefill = mean(s["prefill_ms"] for s in samples)
    total = mean(s["total_ms"] for s in samples)
    tokens = mean(s["tokens"] for s in samples)
    return _Plain(tokens, window, prefill, total - prefill - window)


def _ratios(verify: Results, backend: str) -> dict[int, float]:
    """v(M)/v(1) of chains at the shortest prompt."""
    rows = [row for row in verify["verify"] if row["shape"] == "chain"]
    names = list(dict.fromkeys(row["backend"] for row in rows))
    backend = backend or (names[0] if names else "")
    rows = [row for row in rows if row["backend"] == backend]
    if not rows:
        raise ValueError(f"no chains of backend {backend!r} were measured; there are {names}")
    prompt = min(row["prompt_tokens"] for row in rows)
    return {row["rows"]: row["ratio"] for row in rows if row["prompt_tokens"] == prompt}
