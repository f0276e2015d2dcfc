"""Random inputs of the ops, with the edges that a kernel gets wrong first."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from xspec_kernels import kv_commit, tree_mask, verify_greedy

SIZES = (1, 2, 3, 5, 16, 22, 31, 32, 33, 63, 64)
WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
Tensors = list[torch.Tensor | None]


@dataclass(frozen=True, slots=True)
class Case:
    """One call of an op.

    Attributes:
        op, name: what a mismatch is reported under.
        inputs: on the CPU.
        call: takes inputs, which it may change in place, and a backend; returns everything that
            the op wrote; what has to be equal bit for bit and may hold NaN, as integers.
        outputs: names of what `call` returns.
        tolerance: relative error allowed in a row of a floating output; 0 asks for equal bits.
    """

    op: str
    name: str
    inputs: Tensors
    call: Callable[[Tensors, str], list[torch.Tensor]]
    outputs: tuple[str, ...]
    tolerance: float = 0.0

    def run(self, backend: str, device: str) -> list[torch.Tensor]:
        """`call` on fresh copies of the inputs."""
        return self.call(copies(self.inputs, device), backend)


def copies(inputs: Tensors, device: str) -> Tensors:
    """Fresh copies on `device`, strides kept."""
    return [None if x is None else x.to(device, copy=True) for x in inputs]


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """In the Euclidean norm; NaN is no error that is small."""
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def chain(nodes: int) -> list[int]:
    """Parents of a chain."""
    return list(range(-1, nodes - 1))


def random_tree(rng: random.Random, nodes: int, max_depth: int = 32) -> list[int]:
    """Parents of a tree that leans towards depth, no node at `max_depth` or below."""
    parents, depths = [-1], [0]
    for node in range(1, nodes):
        shallow = [i for i in range(node) if depths[i] + 1 < max_depth]
        parent = rng.choice([i for i in shallow if i >= node - 4] or shallow)
        parents.append(parent)
        depths.append(depths[parent] + 1)
    return parents


def trees(rng: random.Random, batch: int, nodes: int, ragged: bool) -> tuple[list, Tensors]:
    """Parents of each request, and [parent_idx, num_rows] with rubbish in the padding."""
    rows = [rng.randint(0, nodes) if ragged else nodes for _ in range(batch)]
    parents = [random_tree(rng, n)[:n] for n in rows]
    padded = [tree + [rng.randint(-99, 99) for _ in range(nodes - len(tree))] for tree in parents]
    num_rows = torch.tensor(rows, dtype=torch.int32) if ragged else None
    return parents, [torch.tensor(padded, dtype=torch.int32), num_rows]


def tree_mask_cases(rng: random.Random, sizes: tuple[int, ...]) -> Iterator[Case]:
    """Chains, trees, ragged batches, broken trees."""

    def case(name: str, inputs: Tensors, depth: int) -> Case:
        def call(given: Tensors, backend: str) -> list[torch.Tensor]:
            return list(tree_mask(*given, max_depth=depth, backend=backend))

        outputs = ("ancestor_bits", "depth", "path_slot", "status")
        return Case("tree_mask", f"{name}, depth {depth}", inputs, call, outputs)

    for nodes in sizes:
        parents = torch.tensor([chain(nodes)], dtype=torch.int32)
        yield case(f"chain of {nodes}", [parents, None], 64)
        for ragged in (False, True):
            kind = "ragged" if ragged else "full"
            yield case(f"7 trees of {nodes}, {kind}", trees(rng, 7, nodes, ragged)[1], 32)
        wild = torch.tensor([[rng.randint(-3, nodes + 2) for _ in range(nodes)] for _ in range(5)])
        yield case(f"5 broken trees of {nodes}", [wild.int(), None], 32)


def verify_greedy_cases(rng: random.Random, sizes: tuple[int, ...]) -> Iterator[Case]:
    """All, none and some accepted; ragged; invalid targets; bits that are no tree's."""

    def case(name: str, inputs: Tensors) -> Case:
        def call(given: Tensors, backend: str) -> list[torch.Tensor]:
            return list(verify_greedy(*given, backend=backend))

        outputs = ("accept_len", "accept_path", "output_ids")
        return Case("verify_greedy", f"{name}, {inputs[0].dtype}", inputs, call, outputs)

    for dtype in (torch.int32, torch.int64):
        for nodes in sizes:
            for kind in ("all", "none", "some", "some, ragged"):
                ragged = kind.endswith("ragged")
                _, (parent_idx, rows) = trees(rng, 5, nodes, ragged)
                if kind == "all":
                    parent_idx = torch.tensor([chain(nodes)] * 5, dtype=torch.int32)
                tokens, targets = _tokens(rng, parent_idx, kind)
                bits = tree_mask(parent_idx, rows, max_depth=64, backend="torch").ancestor_bits
                inputs = [tokens.to(dtype), parent_idx, targets.to(dtype), bits, rows]
                yield case(f"5 trees of {nodes}, {kind} accepted", inputs)
        draw = torch.Generator().manual_seed(rng.randrange(2**31))
        same = torch.zeros(32, 64, dtype=dtype)
        parents = torch.randint(-9, 80, same.shape, generator=draw, dtype=torch.int32)
        bits = torch.randint(-(2**63), 2**63 - 1, same.shape, generator=draw)
        yield case("32 requests of random bits", [same, parents, same.clone(), bits, None])


def _tokens(rng: random.Random, parents: torch.Tensor, kind: str) -> tuple[torch.Tensor, ...]:
    batch, nodes = parents.shape
    if kind == "all":
        line = torch.arange(100, 100 + nodes).expand(batch, nodes).contiguous()
        return line, line + 1
    if kind == "none":
        return torch.full((batch, nodes), 3), torch.full((batch, nodes), 4)
    draw = torch.Generator().manual_seed(rng.randrange(2**31))
    tokens = torch.randint(0, 2, (batch, nodes), generator=draw)
    targets = torch.randint(0, 2, (batch, nodes), generator=draw)
    invalid = torch.rand((batch, nodes), generator=draw) < 0.1
    return tokens, torch.where(invalid, -1, targets)


def kv_commit_cases(rng: random.Random, sizes: tuple[int, ...]) -> Iterator[Case]:
    """All, none and some rows moved, at the cache's edge; layouts, dtypes, idle requests."""
    for nodes in sizes:
        slots = nodes + 9
        some = [_ascending(rng, nodes) for _ in range(4)]
        starts = [9, *(rng.randint(0, 9) for _ in range(3))]
        yield commit_case(f"4 random paths of {nodes}, one at the edge", some, starts, slots, nodes)
        skip = [list(range(2, nodes)), list(range(1, nodes)), [], None]
        yield commit_case(f"all, none, idle of {nodes}", skip, [9, 9, 0, 5], slots, nodes)
    for dtype in (torch.float32, torch.float16, torch.float8_e4m3fn):
        for layout in ("BHSD", "BSHD", "wide"):
            for width in (3, 40, 128):
                paths = [_ascending(rng, 16), [2, 3, 15]]
                name = f"{str(dtype)[6:]} {layout} x {width}"
                yield commit_case(name, paths, [4, 16], 32, 16, dtype, layout, width, caches=3)


def _ascending(rng: random.Random, nodes: int) -> list[int]:
    return sorted(rng.sample(range(1, nodes), rng.randint(0, nodes - 1))) if nodes > 1 else []


def commit_case(
    name: str,
    paths: list,
    starts: list[int],
    slots: int,
    nodes: int,
    dtype: torch.dtype = torch.bfloat16,
    layout: str = "BHSD",
    width: int = 64,
    heads: int = 2,
    caches: int = 2,
) -> Case:
    """Caches of random bits, NaN patterns among them; a path of None is an idle request."""
    batch, word = len(paths), WORDS[dtype.itemsize]
    stored = {
        "BHSD": (batch, heads, slots, width),
        "BSHD": (batch, slots, heads, width),
        "wide": (batch, heads, slots + 3, width + 5),
    }[layout]
    draw = torch.Generator().manual_seed(slots * 1000 + nodes)
    limits = torch.iinfo(word)
    bases = [
        torch.randint(limits.min, limits.max, stored, dtype=word, generator=draw)
        for _ in range(caches)
    ]
    rows = [[*(path or []), *[-1] * (nodes - len(path or []))] for path in paths]
    lengths = [-1 if path is None else len(path) for path in paths]
    inputs = [torch.tensor(x, dtype=torch.int32) for x in (rows, lengths, starts)]

    def view(base: torch.Tensor) -> torch.Tensor:
        cache = base.view(dtype)
        if layout == "BSHD":
            return cache.transpose(1, 2)
        return cache[:, :, 1 : slots + 1, :width] if layout == "wide" else cache

    def call(given: Tensors, backend: str) -> list[torch.Tensor]:
        length = kv_commit([view(base) for base in given[3:]], *given[:3], backend=backend)
        return [length, *given[3:]]

    outputs = ("new_seqlens", *(f"caches[{i}]" for i in range(caches)))
    return Case("kv_commit", name, [*inputs, *bases], call, outputs)
