"""What the rounds of a replay add up to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from ..drafters.base import DraftTree
from ..metrics import (
    OPENING_TOKENS,
    accept_histogram,
    acceptance_by_depth,
    acceptance_rate,
    accepted_prefix,
    tokens_per_verify,
)


@dataclass(slots=True)
class ReplayRound:
    """One verify: how many target tokens were known, the tree, what came of it, and how many
    seconds its proposal took.
    """

    known: int
    tree: DraftTree
    accepted: int
    emitted: int
    propose_s: float = 0.0


@dataclass(slots=True)
class Tally:
    """Sums over the rounds of one fold."""

    answers: int = 0
    emitted: int = 0
    drafted: int = 0
    late_verifies: int = 0
    late_emitted: int = 0
    propose_s: float = 0.0
    accepted: list[int] = field(default_factory=list)
    proposed: list[int] = field(default_factory=list)
    first: list[int] = field(default_factory=list)

    def count(self, rounds: Sequence[ReplayRound], answer: Sequence[int] = ()) -> None:
        """Add one answer. Without `answer`, its tokens, depths beyond an accepted path are taken as
        not proposed, and the figures have no ``by_depth``.
        """
        self.answers += 1
        self.first += [r.accepted for r in rounds[:1]]
        for r in rounds:
            self.emitted += r.emitted
            self.drafted += len(r.tree) - 1
            self.propose_s += r.propose_s
            self.accepted.append(r.accepted)
            if answer:
                self.proposed.append(_proposed(r, answer))
            if r.known >= OPENING_TOKENS:
                self.late_verifies += 1
                self.late_emitted += r.emitted

    def figures(self) -> dict[str, object]:
        """Figures of these rounds; ``propose_us`` is wall time of this machine."""
        late, verifies = self.late_verifies, len(self.accepted)
        by_depth = acceptance_by_depth(self.accepted, self.proposed) if self.proposed else None
        return {
            "tokens_per_verify": tokens_per_verify(self.emitted, verifies),
            "acceptance_rate": acceptance_rate(sum(self.accepted), self.drafted),
            "after_10": tokens_per_verify(self.late_emitted, late) if late else None,
            "accepted_prefix": accepted_prefix(self.first),
            "by_depth": by_depth,
            "histogram": accept_histogram(self.accepted),
            "propose_us": 1e6 * self.propose_s / verifies,
            "answers": self.answers,
            "verifies": verifies,
            "emitted": self.emitted,
        }


def _proposed(step: ReplayRound, answer: Sequence[int]) -> int:
    """Accepted tokens, and one more if something was proposed below them that the answer was still
    to judge.
    """
    if step.known + step.accepted >= len(answer):
        return step.accepted
    node = 0
    for token in answer[step.known : step.known + step.accepted]:
        node = step.tree.child(node, token)
    return step.accepted + (node in step.tree.parent_idx)


def mean_range(values: Iterable[float | None]) -> dict[str, float] | None:
    """Mean, least and greatest of the values that are there; None without any."""
    there = [value for value in values if value is not None]
    return {"mean": fmean(there), "min": min(there), "max": max(there)} if there else None
