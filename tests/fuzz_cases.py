"""Random cases of the ops, and how many of them run.

The examples are the same in every run unless XSPEC_FUZZ=n is set (`make fuzz`), which makes them
random and n times as many. A case is a handful of numbers, a seed among them, so the example that
hypothesis prints is the whole reproduction: pass it to the `check` named there.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable
from typing import NamedTuple

import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st

from attention_cases import Round, Tree
from conftest import INTERPRETED
from op_cases import int32
from xspec_kernels.kernels.tree_attention import tree_attention
from xspec_kernels.workspace import Workspace

TIMES = int(os.environ.get("XSPEC_FUZZ", "0"))
NAN = math.nan
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Lengths at which a far tile of 32 keys or a split of 256 begins or ends for some row of a tree.
EDGES = [0, 1, 31, 32, 33, 62, 63, 64, 94, 95, 96, 127, 255, 256, 257, 286, 287, 288, 319, 320]

SEEDS = st.integers(0, 2**32 - 1)
# How far above a node its parent may lie: 1 is a chain, 0 puts all nodes under the root.
SPREADS = st.sampled_from([0, 1, 2, 4, 64])
SIZES = st.integers(1, 64) | st.sampled_from([1, 2, 16, 31, 32, 33, 63, 64])


def fuzz(examples: int) -> settings:
    """How a fuzz test runs, `examples` cases at least."""
    return settings(
        max_examples=examples * max(TIMES, 1),
        # A failing case is printed in full; shrinking it in the interpreter would take minutes.
        phases=[Phase.explicit, Phase.generate, *([] if INTERPRETED else [Phase.shrink])],
        derandomize=not TIMES,
        database=None,
        print_blob=True,
        deadline=None,
    )


def seeded(seed: int) -> random.Random:
    """A generator; torch gets the same seed."""
    torch.manual_seed(seed)
    return random.Random(seed)


def grow(rng: random.Random, nodes: int, spread: int, max_depth: int = 64) -> list[int]:
    """Parents of a sound tree; no node lies at max_depth or below."""
    parents, depths = [-1][:nodes], [0]
    for node in range(1, nodes):
        first = max(0, node - spread) if spread else node
        near = [i for i in range(first, node) if depths[i] + 1 < max_depth]
        parent = rng.choice(near or [0])
        parents.append(parent)
        depths.append(depths[parent] + 1)
    return parents


class Attention(NamedTuple):
    """One tree over n committed keys."""

    n: int
    nodes: int
    spread: int
    kv_heads: int
    group: int
    head_dim: int
    width: int
    dtype: torch.dtype
    seed: int

    def round(self, rng: random.Random) -> Round:
        """Its values, the tree's rows in any order."""
        heads, size = self.kv_heads * self.group, self.head_dim
        parents = grow(rng, self.nodes, self.spread, self.width)
        tree = Tree(parents, rng.sample(range(self.nodes), self.nodes))
        total = self.n + self.nodes
        q = 1.5 * torch.randn(self.nodes, heads, size)
        k, v = (torch.randn(total, self.kv_heads, size) for _ in "kv")
        return Round(self.n, tree, *(x.to(self.dtype) for x in (q, k, v)))


def attentions(
    longest: int, most_nodes: int, head_dims: list[int], light: bool = False
) -> st.SearchStrategy[Attention]:
    """Cases of up to so many keys and rows; most of the `light` ones have few keys and one head,
    since the interpreter takes milliseconds for every key near a row."""
    edges = st.sampled_from([n for n in EDGES if n <= longest])
    few = st.integers(0, 24)
    return st.builds(
        Attention,
        n=(few | few | few | edges if light else edges) | st.integers(0, longest),
        nodes=st.integers(1, most_nodes),
        spread=SPREADS,
        kv_heads=st.sampled_from([1, 1, 1, 2] if light else [1, 2]),
        group=st.integers(1, 3),
        head_dim=st.sampled_from(head_dims),
        width=st.sampled_from([32] * 5 + [64]),
        dtype=st.sampled_from(DTYPES),
        seed=SEEDS,
    )


def attention_op(backend: str, reused: bool = False, spare: int = 3) -> Callable[..., torch.Tensor]:
    """The op on the rows of a `Round`; slots of nobody hold NaN, and so does reused scratch."""
    workspace = Workspace("cpu") if reused else None

    def attention(q, k, v, n, depth, path_slot):
        shape = (1, k.shape[1], len(k) + spare, k.shape[2])
        caches = [torch.full(shape, NAN, dtype=k.dtype) for _ in "kv"]
        for cache, x in zip(caches, (k, v), strict=True):
            cache[0, :, : len(x)] = x.transpose(0, 1)
        tables = depth[None], path_slot[None], int32([n])
        if workspace is not None:
            for scratch in workspace._storage.values():
                scratch.fill_(NAN)
        return tree_attention(q[None], *caches, *tables, workspace=workspace, backend=backend)[0]

    return attention


class Linear(NamedTuple):
    """One product with its epilogue and the kernel's cut of it."""

    M: int
    N: int
    K: int
    dtype: torch.dtype
    epilogue: str
    block_n: int
    split: int
    seed: int

    @property
    def split_k(self) -> int:
        return 1 + self.split % (self.K // 64)


def linears(
    most_rows: int, most_columns: int, epilogues: list[str], steps: int
) -> st.SearchStrategy[Linear]:
    """Products of up to `steps` times 64 terms."""
    made = st.builds(
        Linear,
        M=st.integers(1, most_rows) | st.sampled_from([m for m in (1, 64, 65) if m <= most_rows]),
        N=st.integers(1, most_columns),
        K=st.integers(1, steps).map(lambda n: 64 * n),
        dtype=st.sampled_from(DTYPES),
        epilogue=st.sampled_from(epilogues),
        block_n=st.sampled_from([16, 32, 64]),
        split=st.integers(0, 7),
        seed=SEEDS,
    )
    # The gate pairs columns.
    return made.map(lambda case: case._replace(N=2 * case.N) if "gate" in case.epilogue else case)
