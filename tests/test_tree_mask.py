from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from op_cases import SIZES, bits_of, chain, int32, padded, path_to, random_tree, signed
from xspec_kernels import tree_mask

pytestmark = pytest.mark.usefixtures("poisoned")
RUBBISH = -77


def oracle(parents: list[int], nodes: int, max_depth: int):
    """Lists of one request: bits, depth, path_slot, status; `parents` holds the real rows only."""
    rows = len(parents)
    paths = [path_to(parents, i) for i in range(rows)]
    status = 0
    if any(max_depth < len(path) <= 64 for path in paths):
        status |= 1
    if any(p != -1 if i == 0 else not 0 <= p < i for i, p in enumerate(parents)):
        status |= 2
    if any(len(path) > 64 for path in paths):
        status |= 4
    if status:
        paths = [[i] for i in range(rows)]
    bits = [signed(sum(1 << a for a in path)) for path in paths]
    depth = [len(path) - 1 for path in paths]
    slots = [padded(path, max_depth) for path in paths]
    empty = [[-1] * max_depth] * (nodes - rows)
    return padded(bits, nodes, 0), padded(depth, nodes, 0), slots + empty, status


def check(trees: list[list[int]], nodes: int, max_depth: int, op_backend, ragged: bool = True):
    device = op_backend.device
    parent_idx = int32([padded(tree, nodes, RUBBISH) for tree in trees], device)
    rows = int32([len(tree) for tree in trees], device) if ragged else None
    got = tree_mask(parent_idx, rows, max_depth=max_depth, backend=op_backend.name)
    want = [oracle(tree, nodes, max_depth) for tree in trees]
    assert got.ancestor_bits.tolist() == [case[0] for case in want]
    assert got.depth.tolist() == [case[1] for case in want]
    assert got.path_slot.tolist() == [case[2] for case in want]
    assert got.status.tolist() == [case[3] for case in want]
    dtypes = [tensor.dtype for tensor in got]
    assert dtypes == [torch.int64, torch.int32, torch.int32, torch.int32]
    return got


def test_example(op_backend):
    #     0 - 1 - 3
    #       \ 2
    got = tree_mask(int32([[-1, 0, 0, 1]], op_backend.device), backend=op_backend.name)
    assert got.ancestor_bits.tolist() == [[0b1, 0b11, 0b101, 0b1011]]
    assert got.depth.tolist() == [[0, 1, 1, 2]]
    assert got.path_slot[0, 3].tolist() == padded([0, 1, 3], 32)
    assert got.status.tolist() == [0]


@pytest.mark.parametrize("nodes", SIZES)
@pytest.mark.parametrize("batch", [1, 7])
def test_trees(nodes, batch, op_backend, rng):
    check([random_tree(rng, nodes) for _ in range(batch)], nodes, 32, op_backend, ragged=False)
    lengths = [rng.randint(0, nodes) for _ in range(batch)]
    check([random_tree(rng, n)[:n] for n in lengths], nodes, 32, op_backend)


@pytest.mark.parametrize("nodes", SIZES)
def test_chains_reach_depth_63(nodes, op_backend):
    got = check([chain(nodes)], nodes, 64, op_backend)
    assert got.status.item() == 0
    assert got.path_slot[0, -1].tolist() == padded(list(range(nodes)), 64)


def test_status(op_backend):
    trees = [
        chain(32),
        chain(33),
        [-1, 9, 0],
        [-1, -1, 0],
        [1, -1, 0],
        [-1, 2, 1],
        [-1, 1],
        [-1, 2, 0],
        [],
    ]
    got = check(trees, 64, 32, op_backend)
    assert got.status.tolist() == [0, 1, 2, 2, 2, 6, 6, 2, 0]
    assert got.path_slot.max() < 64 and got.path_slot.min() == -1


def test_broken_tree_keeps_rows_apart(op_backend):
    got = check([[-1, 0, 3, 1]], 5, 32, op_backend)
    assert got.ancestor_bits.tolist() == [[1, 2, 4, 8, 0]]


@given(data=st.data())
def test_any_parents(data, op_backend):
    nodes = data.draw(st.integers(1, 64))
    max_depth = data.draw(st.sampled_from([32, 64]))
    sound = st.integers(0, 2**31).map(lambda n: n)
    trees = []
    for _ in range(data.draw(st.integers(1, 3))):
        rows = data.draw(st.integers(0, nodes))
        picks = data.draw(st.lists(sound, min_size=rows, max_size=rows))
        tree = [pick % i if i else -1 for i, pick in enumerate(picks)]
        if rows and data.draw(st.booleans()):
            wrong = st.integers(-3, nodes + 2) | st.sampled_from([-(2**31), 2**31 - 1])
            tree[data.draw(st.integers(0, rows - 1))] = data.draw(wrong)
        trees.append(tree)
    check(trees, nodes, max_depth, op_backend)


def test_bits_are_what_verify_expects(op_backend, rng):
    tree = random_tree(rng, 64)
    got = check([tree], 64, 32, op_backend)
    assert got.ancestor_bits[0].tolist() == bits_of(tree, 64)


@pytest.mark.parametrize(
    ("parent_idx", "options", "message"),
    [
        (torch.zeros(1, 65, dtype=torch.int32), {}, r"\[1, 65\].*N 1..64"),
        (torch.zeros(3, dtype=torch.int32), {}, r"shape \[3\]"),
        (torch.zeros(1, 4), {}, "float32, expected torch.int32"),
        (torch.zeros(4, 2, dtype=torch.int32).T, {}, "contiguous"),
        (torch.zeros(1, 4, dtype=torch.int32), {"max_depth": 16}, "16, expected 32 or 64"),
        (torch.zeros(1, 4, dtype=torch.int32), {"num_rows": torch.zeros(1)}, "num_rows is"),
        (torch.zeros(1, 4, dtype=torch.int32), {"backend": "fast"}, "'fast', expected one of"),
    ],
)
def test_bad_arguments(parent_idx, options, message):
    with pytest.raises(ValueError, match=message):
        tree_mask(parent_idx, **options)


@pytest.mark.parametrize("rows", [None, [2]])
def test_opcheck(rows):
    rows = None if rows is None else int32(rows)
    torch.library.opcheck(torch.ops.xspec.tree_mask, (int32([[-1, 0, 1]]), rows, 32, "auto"))
