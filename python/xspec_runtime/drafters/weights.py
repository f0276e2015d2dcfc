"""How much each source of drafts is worth listening to, learned from what the target said."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from .base import DraftTree

RATE = 0.03  # how fast weights follow; a weight holds about the last 1 / RATE tokens
LEAST = 0.01  # of any source: one that fails now may be needed later
# Chances of single tokens that are calibrated together, and the expected hits they begin with.
EDGES = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.97)
PRIOR = 20.0


class SourceWeights:
    """Calibrates the scores of several sources against each other, token by token, online.

    A source's chance of a token is multiplied by how often such chances came true, divided by what
    they promised. Its weight follows its share of the probability that the sources together gave
    to the target's tokens: one step of expectation maximization for each.

    Args:
        sources: how many.

    Attributes:
        weights: of the sources; they add up to 1.
    """

    def __init__(self, sources: int) -> None:
        self.weights = [1.0 / sources] * sources
        # By source and chance: [times right, expected].
        self._tally = [[[PRIOR, PRIOR] for _ in range(len(EDGES) + 1)] for _ in range(sources)]
        self.forget()

    def forget(self) -> None:
        """What was proposed last is not to be judged: a request starts, or is over."""
        self._trees: list[DraftTree] = []
        self._known = 0

    def weighed(
        self, trees: Sequence[DraftTree], context: Sequence[int]
    ) -> tuple[list[DraftTree], list[float]]:
        """The trees with calibrated scores, and their weights.

        Those of the proposals before are judged first, by the tokens that `context` adds. Trees may
        be fewer than the sources: the last ones were not asked. One of a root alone is no opinion
        and has no weight.
        """
        self.judge(context)
        self._trees, self._known = list(trees), len(context)
        weights = [
            weight if len(tree) > 1 else 0.0
            for weight, tree in zip(self.weights, trees, strict=False)
        ]
        total = sum(weights) or 1.0
        calibrated = [self._calibrated(number, tree) for number, tree in enumerate(trees)]
        return calibrated, [weight / total for weight in weights]

    def judge(self, answer: Sequence[int]) -> None:
        """Learn from the tokens behind those that were known at the last proposals."""
        places: list[tuple[int, DraftTree, int]] = [
            (number, tree, 0) for number, tree in enumerate(self._trees) if len(tree) > 1
        ]
        self._trees = []
        for token in answer[self._known :]:
            if not places:
                break
            chances, after = [], []
            for number, tree, node in places:
                child, chance = self._count(number, tree, node, token)
                chances.append(chance)
                if child is not None:
                    after.append((number, tree, child))
            self._follow([number for number, _, _ in places], chances)
            places = after

    def _count(
        self, number: int, tree: DraftTree, node: int, token: int
    ) -> tuple[int | None, float]:
        """Tally the children of a node the target has confirmed; the right one and its calibrated
        chance."""
        found, chance = None, 0.0
        above = tree.scores[node]
        for i in range(node + 1, len(tree)):
            if tree.parent_idx[i] != node:
                continue
            raw = min(tree.scores[i] / above, 1.0) if above > 0.0 else 0.0
            tally = self._tally[number][bisect_right(EDGES, raw)]
            if tree.tokens[i] == token:
                found, chance = i, raw * tally[0] / tally[1]
                tally[0] += 1.0
            tally[1] += raw
        return found, chance

    def _follow(self, sources: Sequence[int], chances: Sequence[float]) -> None:
        """Move weight among `sources`, those that still had the target's path."""
        mass = sum(self.weights[s] for s in sources)
        likely = sum(self.weights[s] * c for s, c in zip(sources, chances, strict=True))
        if likely <= 0.0 or len(sources) < 2:
            return
        for s, chance in zip(sources, chances, strict=True):
            share = self.weights[s] * chance / likely
            self.weights[s] = max(self.weights[s] + RATE * (mass * share - self.weights[s]), LEAST)
        total = sum(self.weights)
        self.weights = [weight / total for weight in self.weights]

    def _calibrated(self, number: int, tree: DraftTree) -> DraftTree:
        factors = [right / expected for right, expected in self._tally[number]]
        scores = [1.0]
        for i in range(1, len(tree)):
            above = tree.scores[tree.parent_idx[i]]
            raw = min(tree.scores[i] / above, 1.0) if above > 0.0 else 0.0
            chance = min(raw * factors[bisect_right(EDGES, raw)], 1.0)
            scores.append(scores[tree.parent_idx[i]] * chance)
        return DraftTree(tree.tokens, tree.parent_idx, scores)
