"""One tree from the proposals of several drafters."""

from __future__ import annotations

from collections.abc import Sequence

from .base import MAX_ROWS, Drafter, DraftTree, OpeningDrafter, Request


def merge(trees: Sequence[DraftTree], rows: int) -> DraftTree:
    """The best `rows` nodes of several trees with the same root.

    Nodes with the same path become one, with the highest of their scores. No score is above its
    parent's (one that comes so is lowered), so the best nodes form a tree. Equal scores: shallower
    first, then in the order of `trees` and of their nodes.

    Raises:
        ValueError: no trees, different roots, or `rows` not in 1..64.
    """
    if not trees:
        raise ValueError("merge needs at least one tree")
    if not 1 <= rows <= MAX_ROWS:
        raise ValueError(f"rows must be from 1 to {MAX_ROWS}, got {rows}")
    roots = {tree.tokens[0] for tree in trees}
    if len(roots) > 1:
        raise ValueError(f"trees must have the same root, got tokens {sorted(roots)}")

    union = DraftTree.root(trees[0].tokens[0])
    depth = [0]
    known: dict[tuple[int, int], int] = {}
    for tree in trees:
        place = [0]
        for i in range(1, len(tree)):
            parent, token = place[tree.parent_idx[i]], tree.tokens[i]
            score = min(union.scores[parent], tree.scores[i])
            node = known.get((parent, token))
            if node is None:
                node = known[parent, token] = union.add(parent, token, score)
                depth.append(depth[parent] + 1)
            union.scores[node] = max(union.scores[node], score)
            place.append(node)

    best = sorted(range(1, len(union)), key=lambda i: (-union.scores[i], depth[i], i))
    merged, place_of = DraftTree.root(union.tokens[0]), {0: 0}
    for i in best[: rows - 1]:
        parent = place_of[union.parent_idx[i]]
        place_of[i] = merged.add(parent, union.tokens[i], union.scores[i])
    return merged


class MergedDrafter:
    """Asks all its drafters and merges what they propose.

    Args:
        drafters: in order of precedence where scores are equal, the cheapest first.
        name: how reports call it.
        enough: accepted tokens to expect (the sum of a tree's scores) from which on the drafters
            after it are not asked: what they could add is not worth their time.
    """

    def __init__(
        self, drafters: Sequence[Drafter], name: str = "tree", enough: float = float("inf")
    ) -> None:
        if not drafters:
            raise ValueError("MergedDrafter needs at least one drafter")
        self.drafters = list(drafters)
        self.name = name
        self.enough = enough

    def begin(self, request: Request) -> None:
        """Start the request in every drafter."""
        for drafter in self.drafters:
            drafter.begin(request)

    def propose(self, context: Sequence[int], rows: int) -> DraftTree:
        """The best `rows` nodes of all proposals of at most `rows` nodes."""
        trees: list[DraftTree] = []
        for drafter in self.drafters:
            trees.append(drafter.propose(context, rows))
            if sum(trees[-1].scores[1:]) >= self.enough:
                break
        return merge(trees, rows)

    def opening(self, rows: int) -> list[int]:
        """How the answer may begin, from the first drafter that can say."""
        for drafter in self.drafters:
            tokens = drafter.opening(rows) if isinstance(drafter, OpeningDrafter) else []
            if tokens:
                return tokens
        return []

    def end(self, answer: Sequence[int]) -> None:
        """End the request in every drafter."""
        for drafter in self.drafters:
            drafter.end(answer)
