"""Draft trees, and brute-force definitions of the ops written without looking at the kernels."""

from __future__ import annotations

import random
from itertools import pairwise

import torch

SIZES = [1, 2, 3, 5, 16, 22, 31, 32, 33, 63, 64]
PADDING = -1


def chain(nodes: int) -> list[int]:
    return list(range(-1, nodes - 1))


def random_tree(rng: random.Random, nodes: int, max_depth: int = 32) -> list[int]:
    """Parents of a tree that leans towards depth; no node lies at max_depth or below."""
    parents, depths = [-1], [0]
    for node in range(1, nodes):
        near = [i for i in range(max(0, node - 4), node) if depths[i] + 1 < max_depth]
        parent = rng.choice(near or [i for i in range(node) if depths[i] + 1 < max_depth])
        parents.append(parent)
        depths.append(depths[parent] + 1)
    return parents


def path_to(parents: list[int], node: int) -> list[int]:
    """Nodes from the root to `node`, both included; stops after 65 steps on a cycle."""
    path = []
    while 0 <= node < len(parents) and len(path) <= 64:
        path.append(node)
        node = parents[node]
    return path[::-1]


def signed(bits: int) -> int:
    """A 64-bit word as torch.int64 holds it."""
    return bits - (1 << 64) if bits >> 63 else bits


def bits_of(parents: list[int], nodes: int) -> list[int]:
    """Ancestor words of a sound tree, padded with 0 to `nodes`."""
    words = [signed(sum(1 << a for a in path_to(parents, i))) for i in range(len(parents))]
    return words + [0] * (nodes - len(words))


def greedy_oracle(parents: list[int], tokens: list[int], targets: list[int]):
    """(accepted nodes without the root, emitted tokens) by following every path on its own."""
    if not parents:
        return None, []
    best = [0]
    for node in range(1, len(parents)):
        path = path_to(parents, node)
        pairs = list(pairwise(path))
        agreed = all(targets[up] >= 0 and targets[up] == tokens[down] for up, down in pairs)
        if agreed and len(path) > len(best):
            best = path
    return best[1:], [*(tokens[i] for i in best[1:]), max(targets[best[-1]], PADDING)]


def padded(values: list[int], length: int, fill: int = PADDING) -> list[int]:
    return values + [fill] * (length - len(values))


def int32(rows: list, device: str = "cpu") -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int32, device=device)
