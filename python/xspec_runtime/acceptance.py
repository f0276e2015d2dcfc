"""How often drafts turn out right: running estimates that put a drafter's own chances right."""

from __future__ import annotations

from collections.abc import Sequence

from .drafters.base import DraftTree

DEPTHS = 8  # deeper drafts are counted with these
BUCKETS = 5  # of the chance that a draft is right where its parent is
PRIOR = 8.0  # right drafts that count as seen before any were
LIMIT = 400.0  # beyond so many drafts the older half of the weight is dropped
AGING = 0.98  # weight of what is known after a chance to learn more was left out
HOPE = 0.8  # chance of a next draft of which nothing is known; see `prefill.PRIOR`


class Acceptance:
    """Counts of what was claimed and what became of it, by depth and by claimed chance.

    A drafter's scores may be too high (a string without scores claims 1 everywhere); `correct`
    lowers them to what came true, and never raises them. Everything a drafter proposed is judged by
    the tokens the target said next, verified or not, so an estimate recovers without any trial.
    """

    def __init__(self) -> None:
        # Claimed chances and right drafts, summed, by depth and bucket, and what follows from them.
        self._claims = [[0.0, 0.0] for _ in range((DEPTHS + 1) * BUCKETS)]
        self._trust = [1.0] * len(self._claims)
        # Trees that had drafts at a depth, and those of which one was right.
        self._depths = [[0.0, 0.0] for _ in range(DEPTHS)]

    def correct(self, tree: DraftTree) -> DraftTree:
        """`tree` with the chances that its drafts have by what is known of earlier ones."""
        trust, claims, parents = self._trust, tree.scores, tree.parent_idx
        scores, place = [1.0], [0]  # first bucket of each node's depth
        for i in range(1, len(claims)):
            parent = parents[i]
            above = claims[parent]
            chance = claims[i] / above if above > 0 else 0.0
            depth = place[parent] + BUCKETS
            if depth > DEPTHS * BUCKETS:
                depth = DEPTHS * BUCKETS
            place.append(depth)
            if chance < 1.0:
                bucket = int(chance * BUCKETS)
            else:
                chance, bucket = 1.0, BUCKETS - 1
            scores.append(scores[parent] * chance * trust[depth + bucket])
        return DraftTree(tree.tokens, parents, scores)

    def learn(self, tree: DraftTree, following: Sequence[int]) -> None:
        """Judge a tree as it was proposed by the target's tokens that followed its root."""
        claims, parents = tree.scores, tree.parent_idx
        path, offered = {0: 0}, set()  # nodes on the target's path and their depth
        for i in range(1, len(claims)):
            depth = path.get(parents[i])
            if depth is None or depth >= len(following):
                continue
            above, right = claims[parents[i]], tree.tokens[i] == following[depth]
            chance = claims[i] / above if above > 0 else 0.0
            if chance < 1.0:
                bucket = int(chance * BUCKETS)
            else:
                chance, bucket = 1.0, BUCKETS - 1
            place = min(depth + 1, DEPTHS) * BUCKETS + bucket
            _count(self._claims[place], chance, right)
            self._weigh(place)
            offered.add(depth)
            if right:
                path[i] = depth + 1
        deepest = max(path.values())
        for depth in offered:
            _count(self._depths[min(depth, DEPTHS - 1)], 1.0, depth < deepest)

    def age(self) -> None:
        """Nothing was asked, so nothing is learned: drift back to what is hoped for."""
        for counts in (*self._claims, *self._depths):
            counts[0] *= AGING
            counts[1] *= AGING
        for place in range(len(self._claims)):
            self._weigh(place)

    def by_depth(self, depth: int) -> list[float]:
        """Chances that at least the first 1, 2, ... `depth` tokens of a tree are accepted."""
        chances, path = [], 1.0
        for i in range(depth):
            offered, right = self._depths[min(i, DEPTHS - 1)]
            path *= (right + HOPE * PRIOR) / (offered + PRIOR)
            chances.append(path)
        return chances

    def _weigh(self, place: int) -> None:
        claimed, right = self._claims[place]
        self._trust[place] = min(1.0, (right + PRIOR) / (claimed + PRIOR))


def _count(counts: list[float], claimed: float, right: bool) -> None:
    counts[0] += claimed
    counts[1] += right
    if counts[0] > LIMIT:
        counts[0] /= 2
        counts[1] /= 2
