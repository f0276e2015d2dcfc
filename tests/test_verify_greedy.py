from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from op_cases import SIZES, bits_of, chain, greedy_oracle, int32, padded, random_tree
from xspec_kernels import tree_mask, verify_greedy

pytestmark = pytest.mark.usefixtures("poisoned")


def run(trees, tokens, targets, nodes, op_backend, dtype=torch.int64, ragged=True):
    """verify_greedy on lists of the real rows; padding holds values that would match if read."""
    device = op_backend.device
    rows = int32([len(tree) for tree in trees], device) if ragged else None
    return verify_greedy(
        torch.tensor([padded(row, nodes, 5) for row in tokens], dtype=dtype, device=device),
        int32([padded(tree, nodes, 0) for tree in trees], device),
        torch.tensor([padded(row, nodes, 5) for row in targets], dtype=dtype, device=device),
        torch.tensor([bits_of(tree, nodes) for tree in trees], dtype=torch.int64, device=device),
        rows,
        backend=op_backend.name,
    )


def check(trees, tokens, targets, nodes, op_backend, dtype=torch.int64, ragged=True):
    got = run(trees, tokens, targets, nodes, op_backend, dtype, ragged)
    for b, case in enumerate(zip(trees, tokens, targets, strict=True)):
        path, emitted = greedy_oracle(*case)
        assert got.accept_len[b].item() == (-1 if path is None else len(path))
        assert got.accept_path[b].tolist() == padded(path or [], nodes)
        assert got.output_ids[b].tolist() == padded(emitted, nodes)
    assert (got.accept_len.dtype, got.accept_path.dtype) == (torch.int32, torch.int32)
    assert got.output_ids.dtype == dtype
    return got


def test_example(op_backend):
    #     the - cat - sat        the target says: the -> cat -> ran
    #        \- dog
    the, cat, dog, sat, ran = range(10, 15)
    got = check([[-1, 0, 0, 1]], [[the, cat, dog, sat]], [[cat, ran, sat, the]], 4, op_backend)
    assert got.accept_len.tolist() == [1]
    assert got.accept_path.tolist() == [[1, -1, -1, -1]]
    assert got.output_ids.tolist() == [[cat, ran, -1, -1]]


@pytest.mark.parametrize("nodes", SIZES)
@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_random_trees(nodes, batch, dtype, op_backend, rng):
    for ragged in (False, True):
        sizes = [rng.randint(0, nodes) if ragged else nodes for _ in range(batch)]
        trees = [random_tree(rng, size)[:size] for size in sizes]
        tokens = [[rng.randrange(2) for _ in tree] for tree in trees]
        targets = [[rng.choice([0, 0, 1, 1, -1]) for _ in tree] for tree in trees]
        check(trees, tokens, targets, nodes, op_backend, dtype, ragged)


@pytest.mark.parametrize("nodes", SIZES)
def test_chain_all_accepted(nodes, op_backend):
    tokens = list(range(100, 100 + nodes))
    got = check([chain(nodes)], [tokens], [[*tokens[1:], 7]], nodes, op_backend)
    assert got.accept_len.item() == nodes - 1
    assert got.output_ids.tolist() == [[*tokens[1:], 7]]


@pytest.mark.parametrize("nodes", SIZES)
def test_none_accepted(nodes, op_backend):
    got = check([chain(nodes)], [[1] * nodes], [[2] * nodes], nodes, op_backend)
    assert got.accept_len.item() == 0
    assert got.output_ids.tolist() == [padded([2], nodes)]


def test_equal_lengths_take_the_lowest_index(op_backend):
    got = check([[-1, 0, 0, 0]], [[9, 3, 4, 4]], [[4, 1, 2, 5]], 4, op_backend)
    assert got.accept_path[0, 0].item() == 2
    assert got.output_ids[0, :2].tolist() == [4, 2]


def test_longer_path_beats_lower_index(op_backend):
    tree, tokens, targets = [-1, 0, 0, 2], [9, 4, 4, 6], [4, 1, 6, 8]
    got = check([tree], [tokens], [targets], 4, op_backend)
    assert got.accept_path.tolist() == [[2, 3, -1, -1]]


def test_invalid_target_stops_the_path(op_backend):
    got = check([chain(4)], [[5, 6, -1, 7]], [[6, -1, 7, 8]], 4, op_backend)
    assert got.accept_len.item() == 1
    assert got.output_ids.tolist() == [[6, -1, -1, -1]]


@pytest.mark.parametrize("invalid", [-1, -2, -(2**31)])
def test_invalid_root_emits_nothing(invalid, op_backend):
    got = check([chain(3)], [[5, invalid, 6]], [[invalid, 6, 7]], 3, op_backend, torch.int32)
    assert (got.accept_len.item(), got.output_ids.tolist()) == (0, [[-1, -1, -1]])


def test_idle_request(op_backend):
    got = check([[], chain(2)], [[], [5, 6]], [[], [6, 7]], 3, op_backend)
    assert got.accept_len.tolist() == [-1, 1]


def test_padding_is_never_accepted(op_backend):
    got = run([chain(2)], [[5, 5]], [[5, 5]], 6, op_backend)
    assert (got.accept_len.item(), got.output_ids.tolist()) == (1, [[5, 5, -1, -1, -1, -1]])


@pytest.mark.parametrize("parents", [[-1, 2, 1], [-1, 0, 9], [-1, -1, 1], [0, 0, 1]])
def test_broken_tree_accepts_only_the_root(parents, op_backend):
    mask = tree_mask(int32([parents], op_backend.device), backend=op_backend.name)
    same = torch.full((1, 3), 4, dtype=torch.int64, device=op_backend.device)
    parent_idx = int32([parents], op_backend.device)
    got = verify_greedy(same, parent_idx, same, mask.ancestor_bits, backend=op_backend.name)
    assert mask.status.item() != 0
    assert (got.accept_len.item(), got.output_ids.tolist()) == (0, [[4, -1, -1]])


def test_any_bits_stay_in_range(op_backend, rng):
    shape = (32, 64)
    draw = torch.Generator().manual_seed(rng.randrange(2**31))
    tokens = torch.zeros(shape, dtype=torch.int64)
    parents = torch.randint(-9, 80, shape, generator=draw, dtype=torch.int32)
    bits = torch.randint(-(2**63), 2**63 - 1, shape, generator=draw)
    got = [
        verify_greedy(*(tensor.to(case.device) for tensor in (tokens, parents, tokens, bits)),
                      backend=case.name)
        for case in (op_backend, op_backend._replace(name="torch"))
    ]  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(*got, strict=True))
    assert got[0].accept_path.max() < 64 and got[0].accept_len.min() >= 0


@given(data=st.data())
def test_against_oracle(data, op_backend):
    nodes = data.draw(st.integers(1, 64))
    words = st.integers(0, 2**16)
    trees, tokens, targets = [], [], []
    for _ in range(data.draw(st.integers(1, 3))):
        rows = data.draw(st.integers(0, nodes))
        spread = data.draw(st.integers(1, 64))
        picks = data.draw(st.lists(words, min_size=rows, max_size=rows))
        trees.append([i - 1 - pick % min(i, spread) if i else -1 for i, pick in enumerate(picks)])
        tokens.append([pick // 64 % 2 for pick in picks])
        ids = st.lists(st.sampled_from([0, 1, 1, -1]), min_size=rows, max_size=rows)
        targets.append(data.draw(ids))
    check(trees, tokens, targets, nodes, op_backend)


def arguments(**changes):
    made = {
        "token_ids": torch.zeros(2, 4, dtype=torch.int64),
        "parent_idx": torch.zeros(2, 4, dtype=torch.int32),
        "target_ids": torch.zeros(2, 4, dtype=torch.int64),
        "ancestor_bits": torch.zeros(2, 4, dtype=torch.int64),
    }
    return made | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_ids": torch.zeros(2, 65, dtype=torch.int64)}, "token_ids has shape"),
        ({"token_ids": torch.zeros(2, 4)}, "token_ids is torch.float32"),
        ({"target_ids": torch.zeros(2, 4, dtype=torch.int32)}, "target_ids is torch.int32"),
        ({"target_ids": torch.zeros(2, 3, dtype=torch.int64)}, r"\[2, 3\], expected \[2, 4\]"),
        ({"parent_idx": torch.zeros(2, 4, dtype=torch.int64)}, "parent_idx is torch.int64"),
        ({"ancestor_bits": torch.zeros(2, 8, dtype=torch.int64)[:, ::2]}, "contiguous"),
        ({"ancestor_bits": torch.zeros(2, 4, device="meta").long()}, "on meta, expected cpu"),
        ({"num_rows": torch.zeros(3, dtype=torch.int32)}, r"num_rows has shape \[3\]"),
    ],
)
def test_bad_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        verify_greedy(**arguments(**changes))


def test_opcheck():
    made = (*arguments().values(), int32([4, 3]), "auto")
    torch.library.opcheck(torch.ops.xspec.verify_greedy, made)
