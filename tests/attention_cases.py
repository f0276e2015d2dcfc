"""Trees, caches and replays with which attention is held to its law: a row's bits are a function of
its position, its path and the committed keys.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

import torch

from op_cases import chain, path_to, random_tree

# (q [R, H_q, D], k, v [n + R, H_kv, D], committed rows n, depth [R], path_slot [R, W]) -> like q
Attention = Callable[..., torch.Tensor]


class Tree(NamedTuple):
    """A draft tree whose rows may stand in any order: node i lies at row `row[i]`."""

    parents: list[int]
    row: list[int]

    def path(self, node: int) -> list[int]:
        """Rows from the root to the node."""
        return [self.row[i] for i in path_to(self.parents, node)]

    def tables(self, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """depth [R] and path_slot [R, width], int32, as tree_mask makes them."""
        depth = torch.zeros(len(self.row), dtype=torch.int32)
        slots = torch.full((len(self.row), width), -1, dtype=torch.int32)
        for node, row in enumerate(self.row):
            path = self.path(node)
            depth[row] = len(path) - 1
            slots[row, : len(path)] = torch.tensor(path, dtype=torch.int32)
        return depth, slots


def straight(rows: int) -> Tree:
    return Tree(chain(rows), list(range(rows)))


def shuffled(rng: random.Random, nodes: int, max_depth: int) -> Tree:
    return Tree(random_tree(rng, nodes, max_depth), rng.sample(range(nodes), nodes))


class Round(NamedTuple):
    """n committed keys and a tree: k, v [n + R, H_kv, D], q [R, H_q, D], fp32."""

    n: int
    tree: Tree
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor

    def run(self, attention: Attention, width: int) -> torch.Tensor:
        return attention(self.q, self.k, self.v, self.n, *self.tree.tables(width))

    def rows_of(self, slots: list[int], keep: int) -> Round:
        """A later round: all but the last `keep` rows of this path are committed."""
        done = len(slots) - keep
        index = [*range(self.n), *(self.n + slot for slot in slots)]
        rest = slots[done:]
        q, k, v = self.q[rest], self.k[index], self.v[index]
        return Round(self.n + done, straight(keep), q, k, v)

    def with_garbage(self, path: list[int], value: float) -> Round:
        """Rows that are not on the path hold garbage."""
        others = [self.n + i for i in range(len(self.q)) if i not in path]
        k, v = self.k.clone(), self.v.clone()
        k[others], v[others] = value, -value
        return self._replace(k=k, v=v)


def random_round(
    rng: random.Random, n: int, nodes: int, heads: int = 1, kv_heads: int = 1, head_dim: int = 32,
    max_depth: int = 32, dtype: torch.dtype = torch.bfloat16,
) -> Round:  # fmt: skip
    """Values that `dtype` holds, so that every precision reads the same numbers."""

    def normal(rows: int, count: int, spread: float = 1.0) -> torch.Tensor:
        return (spread * torch.randn(rows, count, head_dim)).to(dtype).float()

    keys, values = normal(n + nodes, kv_heads), normal(n + nodes, kv_heads)
    tree = shuffled(rng, nodes, max_depth)
    return Round(n, tree, normal(nodes, heads, 1.5), keys, values)


def violations(
    attention: Attention, whole: Round, rng: random.Random, width: int = 32, nodes: int = 6,
    garbage: float | None = float("nan"),
) -> int:  # fmt: skip
    """How many of some nodes, the deepest among them, get other bits elsewhere: decoded one by one,
    in a chain that begins at a random depth of their path, or among siblings full of garbage.
    """
    out = whole.run(attention, width)
    depth, _ = whole.tree.tables(width)
    order = sorted(range(len(whole.tree.row)), key=lambda i: -int(depth[whole.tree.row[i]]))
    chosen = order[: nodes // 2] + rng.sample(order[nodes // 2 :], nodes - nodes // 2)
    bad = 0
    for node in chosen:
        path = whole.tree.path(node)
        keeps = {1, rng.randint(1, len(path))}
        got = [whole.rows_of(path, keep).run(attention, width)[-1] for keep in keeps]
        if garbage is not None:
            got.append(whole.with_garbage(path, garbage).run(attention, width)[path[-1]])
        bad += any(not torch.equal(row, out[path[-1]]) for row in got)
    return bad
