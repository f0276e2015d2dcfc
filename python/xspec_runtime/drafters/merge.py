"""One tree from the proposals of several drafters."""

from __future__ import annotations

from collections.abc import Sequence

from .base import MAX_ROWS, Drafter, DraftTree, OpeningDrafter, Request
from .weights import SourceWeights


def merge(
    trees: Sequence[DraftTree], rows: int, weights: Sequence[float] | None = None
) -> DraftTree:
    """The best `rows` nodes of several trees with the same root.

    Nodes with the same path become one, with the highest of their scores; with `weights`, one for
    each tree, with the weighted sum of them. No score is above its parent's (one that comes so is
    lowered), so the best nodes form a tree. Equal scores: shallower first, then in the order of
    `trees` and of their nodes.

    Raises:
        ValueError: no trees, different roots, weights that are negative, not as many as trees or
            more than 1 together, or `rows` not in 1..64.
    """
    if not trees:
        raise ValueError("merge needs at least one tree")
    if not 1 <= rows <= MAX_ROWS:
        raise ValueError(f"rows must be from 1 to {MAX_ROWS}, got {rows}")
    roots = {tree.tokens[0] for tree in trees}
    if len(roots) > 1:
        raise ValueError(f"trees must have the same root, got tokens {sorted(roots)}")
    if weights is not None and (
        len(weights) != len(trees) or min(weights) < 0 or sum(weights) > 1.0 + 1e-9
    ):
        raise ValueError(
            f"weights must be at least 0, one for each of {len(trees)} trees, and 1 together at "
            f"most, got {list(weights)}"
        )

    union, depth = _union(trees, weights)
    best = sorted(range(1, len(union)), key=lambda i: (-union.scores[i], depth[i], i))
    merged, place_of = DraftTree.root(union.tokens[0]), {0: 0}
    for i in best[: rows - 1]:
        parent = place_of[union.parent_idx[i]]
        place_of[i] = merged.add(parent, union.tokens[i], union.scores[i])
    return merged


def _union(
    trees: Sequence[DraftTree], weights: Sequence[float] | None
) -> tuple[DraftTree, list[int]]:
    """All paths of the trees in one, and the depth of each node."""
    union, depth = DraftTree.root(trees[0].tokens[0]), [0]
    known: dict[tuple[int, int], int] = {}
    for number, tree in enumerate(trees):
        place, scores = [0], [1.0]
        best: dict[int, float] = {}
        for i in range(1, len(tree)):
            above = tree.parent_idx[i]
            parent, token = place[above], tree.tokens[i]
            scores.append(min(scores[above], tree.scores[i]))
            node = known.get((parent, token))
            if node is None:
                node = known[parent, token] = union.add(parent, token, 0.0)
                depth.append(depth[parent] + 1)
            best[node] = max(best.get(node, 0.0), scores[i])
            place.append(node)
        for node, score in best.items():
            if weights is None:
                union.scores[node] = max(union.scores[node], score)
            else:
                # Weights that add up to 1 may give a little more.
                union.scores[node] = min(union.scores[node] + weights[number] * score, 1.0)
    return union, depth


class MergedDrafter:
    """Asks all its drafters and merges what they propose.

    Args:
        drafters: in order of precedence where scores are equal, the cheapest first.
        name: how reports call it.
        enough: accepted tokens to expect (the sum of a tree's scores) from which on the drafters
            after it are not asked: what they could add is not worth their time.
        weigh: count each drafter's probabilities as much as they have deserved so far, see
            `SourceWeights`; without it a path has the highest of its scores.
    """

    def __init__(
        self,
        drafters: Sequence[Drafter],
        name: str = "tree",
        enough: float = float("inf"),
        weigh: bool = False,
    ) -> None:
        if not drafters:
            raise ValueError("MergedDrafter needs at least one drafter")
        self.drafters = list(drafters)
        self.name = name
        self.enough = enough
        self._weights = SourceWeights(len(drafters)) if weigh else None

    def begin(self, request: Request) -> None:
        """Start the request in every drafter."""
        if self._weights:
            self._weights.forget()
        for drafter in self.drafters:
            drafter.begin(request)

    def propose(self, context: Sequence[int], rows: int) -> DraftTree:
        """The best `rows` nodes of all proposals of at most `rows` nodes."""
        trees: list[DraftTree] = []
        for drafter in self.drafters:
            trees.append(drafter.propose(context, rows))
            if sum(trees[-1].scores[1:]) >= self.enough:
                break
        if not self._weights:
            return merge(trees, rows)
        weighed, weights = self._weights.weighed(trees, context)
        return merge(weighed, rows, weights)

    def opening(self, rows: int) -> list[int]:
        """How the answer may begin, from the first drafter that can say."""
        for drafter in self.drafters:
            tokens = drafter.opening(rows) if isinstance(drafter, OpeningDrafter) else []
            if tokens:
                return tokens
        return []

    def end(self, answer: Sequence[int]) -> None:
        """End the request in every drafter."""
        if self._weights:
            self._weights.judge(answer)
        for drafter in self.drafters:
            drafter.end(answer)
