"""Random rounds: draft trees, acceptance and commits against walks along every path."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import INTERPRETED, OpBackend
from fuzz_cases import SEEDS, SIZES, SPREADS, fuzz, grow, seeded
from op_cases import bits_of, int32, padded, path_to
from test_kv_commit import DTYPES as CACHE_DTYPES
from test_kv_commit import check as check_commit
from test_kv_commit import make as make_cache
from test_tree_mask import check as check_mask
from test_tree_mask import oracle as mask_oracle
from test_verify_greedy import check as check_greedy
from test_verify_tail import NAN as NAN_ROW
from test_verify_tail import TIE
from test_verify_tail import Round as TailRound
from test_verify_tail import run as check_tail
from xspec_kernels import TOKENS, kv_commit, read_record, tree_mask, verify_greedy, verify_tail

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.skipif(INTERPRETED, reason="the interpreter's time goes to the forward pass"),
]
INT32 = torch.iinfo(torch.int32)


class Trees(NamedTuple):
    """A batch of trees of up to `nodes` nodes."""

    batch: int
    nodes: int
    spread: int
    ragged: bool
    seed: int

    def grow(self, rng, max_depth: int = 64) -> list[list[int]]:
        sizes = [rng.randint(0, self.nodes) if self.ragged else self.nodes] * self.batch
        return [grow(rng, size, self.spread, max_depth) for size in sizes]


TREES = st.builds(
    Trees, batch=st.integers(1, 4), nodes=SIZES, spread=SPREADS, ragged=st.booleans(), seed=SEEDS
)


def without_cuda(case: OpBackend) -> None:
    if case.name == "cuda":
        pytest.skip("no CUDA C++ kernel for this op")


@fuzz(150)
@given(case=TREES, max_depth=st.sampled_from([32, 64]), broken=st.integers(0, 2))
def test_tree_mask(case, max_depth, broken, op_backend):
    rng = seeded(case.seed)
    trees = case.grow(rng, rng.choice([64, max_depth, max_depth + 1]))
    for tree in rng.sample(trees, min(broken, len(trees))):
        if tree:
            wrong = [-3, -2, -1, 0, len(tree), case.nodes + 2, INT32.min, INT32.max]
            tree[rng.randrange(len(tree))] = rng.choice([*wrong, rng.randrange(len(tree))])
    check_mask(trees, case.nodes, max_depth, op_backend, case.ragged)


@fuzz(75)
@given(case=TREES)
def test_tree_mask_of_garbage(case, op_backend):
    """Any words as parents, any count as the number of rows."""
    rng = seeded(case.seed)
    near = [-2, -1, 0, case.nodes, INT32.max, *range(case.nodes)]
    parents = [rng.choices(near, k=case.nodes) for _ in range(case.batch)]
    rows = [rng.randint(-3, case.nodes + 3) for _ in range(case.batch)]
    device = op_backend.device
    got = tree_mask(int32(parents, device), int32(rows, device), backend=op_backend.name)
    for b, (words, count) in enumerate(zip(parents, rows, strict=True)):
        want = mask_oracle(words[: max(count, 0)], case.nodes, 32)
        assert [part[b].tolist() for part in got] == list(want)


def draw_tokens(rng, trees, letters: int, invalid: bool):
    # A draft of -1 must not match a target of -1, which is no token.
    words = [*range(letters), *([-1] if invalid else [])]
    return tuple([[rng.choice(words) for _ in tree] for tree in trees] for _ in "tt")


@fuzz(150)
@given(
    case=TREES,
    letters=st.sampled_from([1, 2, 3]),
    invalid=st.booleans(),
    dtype=st.sampled_from([torch.int32, torch.int64]),
)
def test_verify_greedy(case, letters, invalid, dtype, op_backend):
    rng = seeded(case.seed)
    trees = case.grow(rng)
    tokens = draw_tokens(rng, trees, letters, invalid)
    check_greedy(trees, *tokens, case.nodes, op_backend, dtype, case.ragged)


@fuzz(50)
@given(case=TREES)
def test_verify_greedy_of_garbage(case, op_backend):
    """Words that no tree has: every backend decides as the reference and stays in range."""
    rng = seeded(case.seed)
    shape = (case.batch, case.nodes)
    kept = torch.tensor([bits_of(grow(rng, case.nodes, case.spread), case.nodes)] * case.batch)
    flips = torch.randint(-(2**63), 2**63 - 1, shape) & torch.randint(-(2**63), 2**63 - 1, shape)
    bits = torch.where(torch.rand(shape) < 0.3, kept ^ flips, kept)
    parents = torch.randint(-2, case.nodes + 2, shape, dtype=torch.int32)
    tokens, targets = torch.randint(0, 2, shape), torch.randint(-1, 2, shape)
    rows = int32([rng.randint(-2, case.nodes + 2) for _ in range(case.batch)])
    given = (tokens, parents, targets, bits, rows.clamp(0, case.nodes))
    want = verify_greedy(*given, backend="torch")
    got = verify_greedy(*(x.to(op_backend.device) for x in given), backend=op_backend.name)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(got, want, strict=True))
    assert int(got.accept_len.min()) >= -1 and int(got.accept_len.max()) < case.nodes


@fuzz(100)
@given(
    case=TREES,
    heads=st.integers(1, 3),
    width=st.sampled_from([1, 3, 8, 33, 64]),
    layers=st.integers(1, 3),
    room=st.integers(0, 4),
    dtype=st.sampled_from(CACHE_DTYPES),
    layout=st.sampled_from(["BHSD", "BSHD", "wide"]),
)
def test_kv_commit(case, heads, width, layers, room, dtype, layout, op_backend):
    rng = seeded(case.seed)
    shape = (case.batch, heads, case.nodes + room, width)
    caches = [make_cache(shape, dtype, layout, op_backend.device) for _ in range(2 * layers)]
    paths: list[list[int] | None] = []
    for tree in case.grow(rng):
        paths.append(path_to(tree, rng.randrange(len(tree)))[1:] if tree else None)
    starts = [rng.randint(0, room) for _ in paths]
    check_commit(caches, paths, starts, op_backend, case.nodes)


@fuzz(40)
@given(case=TREES)
def test_kv_commit_refuses_before_it_moves(case):
    """On the CPU a path that is no path raises and leaves all requests as they were."""
    rng = seeded(case.seed)
    cache = make_cache((case.batch, 1, case.nodes + 2, 4))
    before = cache.clone()
    start, bad = rng.randint(0, 2), rng.randrange(case.batch)
    paths = [sorted(rng.sample(range(1, case.nodes), (case.nodes - 1) // 2))] * case.batch
    lengths = [len(path) for path in paths]
    words = [padded(path, case.nodes) for path in paths]
    lengths[bad] = case.nodes
    descending = [0] if case.nodes == 1 else list(range(case.nodes, 0, -1))
    words[bad] = rng.choice([[0] * case.nodes, descending])
    for backend in ("torch", "auto"):
        with pytest.raises(ValueError, match=f"request {bad} commits {case.nodes} nodes"):
            starts = int32([start] * case.batch)
            kv_commit([cache], int32(words), int32(lengths), starts, backend=backend)
        assert torch.equal(cache.view(torch.int32), before.view(torch.int32))


@fuzz(100)
@given(
    case=TREES,
    letters=st.sampled_from([1, 2]),
    flags=st.booleans(),
    limited=st.booleans(),
    slots=st.integers(1, 90),
    spare=st.integers(0, 3),
)
def test_verify_tail(case, letters, flags, limited, slots, spare, op_backend):
    without_cuda(op_backend)
    rng = seeded(case.seed)
    trees = case.grow(rng)
    words = [0, 0, 0, TIE, NAN_ROW] if flags else [0]
    rounds = [
        TailRound(
            tree, tokens, targets, rng.randint(0, slots), [rng.choice(words) for _ in tree],
            rng.randint(0, len(tree) + 1) if limited else None,
        )
        for tree, tokens, targets in zip(
            trees, *draw_tokens(rng, trees, letters, flags), strict=True
        )
    ]  # fmt: skip
    check_tail(rounds, op_backend, case.nodes, slots, spare, layers=1)


def next_token(prefix: list[int]) -> int:
    """A model: any function of all tokens before."""
    return hash(tuple(prefix[-5:])) % 7


class Decode(NamedTuple):
    """Requests decoded together, each round with trees of up to `nodes` rows."""

    batch: int
    nodes: int
    spread: int
    new: int
    luck: float
    seed: int


DECODES = st.builds(
    Decode,
    batch=st.integers(1, 3),
    nodes=st.integers(1, 24),
    spread=SPREADS,
    new=st.integers(1, 30),
    luck=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    seed=SEEDS,
)


def draft(rng, case: Decode, text: list[int]) -> tuple[list[int], list[int], list[int]]:
    """(parents, tokens, the model's token after each node) of a tree below the text's last."""
    parents = grow(rng, rng.randint(1, case.nodes), case.spread)
    tokens, targets = [], []
    for node in range(len(parents)):
        above = [*text, *(tokens[i] for i in path_to(parents, node)[1:-1])]
        right = next_token(above)
        tokens.append(right if rng.random() < case.luck else rng.randrange(7))
        if node == 0:
            tokens[0] = text[-1]
        targets.append(next_token(above if node == 0 else [*above, tokens[node]]))
    return parents, tokens, targets


@fuzz(50)
@given(case=DECODES)
def test_many_rounds_are_plain_decoding(case, op_backend):
    """tree_mask and verify_tail round after round: what is said, where it lies in the cache, and
    what the device keeps of it, against a loop that takes one token at a time."""
    without_cuda(op_backend)
    rng, device = seeded(case.seed), op_backend.device
    said = [[rng.randrange(7)] for _ in range(case.batch)]
    slots = case.new + case.nodes + 1
    cache = torch.full((case.batch, 1, slots, 1), -5.0, device=device)
    seqlens = int32([0] * case.batch, device)
    root = torch.tensor([text[0] for text in said], device=device)
    sequence = torch.zeros(case.batch, dtype=torch.int64, device=device)
    record = torch.zeros(case.batch, TOKENS + case.nodes, dtype=torch.int64, device=device)
    for rounds in range(1, case.new + 1):
        left = [case.new + 1 - len(text) for text in said]
        if not any(left):
            break
        trees = [draft(rng, case, text) for text in said]
        wide = [
            torch.tensor([padded(tree[part], case.nodes, 0) for tree in trees], device=device)
            for part in (2, 1)
        ]
        parents = int32([padded(tree[0], case.nodes, 0) for tree in trees], device)
        rows = int32([len(tree[0]) for tree in trees], device)
        mask = tree_mask(parents, rows, max_depth=64, backend=op_backend.name)
        assert not mask.status.any()
        for b, (text, tree) in enumerate(zip(said, trees, strict=True)):
            start = len(text) - 1
            cache[b, 0, start : start + len(tree[1]), 0] = torch.tensor(tree[1]).to(cache)
        verify_tail(
            wide[0], torch.zeros_like(parents), wide[1], parents, mask.ancestor_bits, [cache],
            seqlens, root, sequence, record, rows, max_new=int32(left, device),
            backend=op_backend.name,
        )  # fmt: skip
        for b, text in enumerate(said):
            got = read_record(record.cpu(), b)
            assert (got.sequence, got.status) == (rounds, 0) and bool(got.tokens) == (left[b] > 0)
            for token in got.tokens:
                assert token == next_token(text)
                text.append(token)
            assert seqlens[b].item() == got.length == len(text) - 1
            assert root[b].item() == text[-1]
            assert cache[b, 0, : len(text) - 1, 0].tolist() == text[:-1]
    assert [len(text) for text in said] == [case.new + 1] * case.batch
