"""Random forward passes on torch: the ops against definitions written out, and the law in exact
mode: what a row gets, it gets alone, moved, in a chain or in any tree."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attention_cases import violations
from conftest import INTERPRETED
from fuzz_cases import (
    DTYPES,
    NAN,
    SEEDS,
    SPREADS,
    Attention,
    attention_op,
    attentions,
    fuzz,
    grow,
    linears,
    seeded,
)
from linear_cases import EPILOGUES, epilogue, operands
from op_cases import int32, path_to
from test_embed_norm_rope import Rope, embed_oracle
from test_lm_head_argmax import ROUND_TO
from test_lm_head_argmax import oracle as argmax_oracle
from test_skinny_linear import check as check_linear
from test_tree_attention import errors, make
from xspec_kernels import (
    TOKENS,
    embed,
    lm_head_argmax,
    norm_act,
    rope_append,
    rope_table,
    skinny_linear,
    tree_attention,
    tree_mask,
    verify_tail,
)

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.skipif(INTERPRETED, reason="the kernels have cases of their own"),
]


@pytest.fixture
def case_backend(op_backend):
    if op_backend.name == "cuda":
        pytest.skip("no CUDA C++ kernel for these ops")
    return op_backend


@fuzz(60)
@given(
    vocab=st.integers(1, 40), width=st.integers(1, 80), rows=st.integers(1, 64),
    dtype=st.sampled_from(DTYPES), seed=SEEDS,
)  # fmt: skip
def test_embed(vocab, width, rows, dtype, seed, case_backend):
    rng = seeded(seed)
    weight = torch.randn(vocab, width).to(dtype)
    ids = [rng.choice([rng.randrange(vocab), -1, vocab, rng.randrange(vocab)]) for _ in range(rows)]
    kind = rng.choice([torch.int32, torch.int64])
    device = case_backend.device
    tokens = torch.tensor(ids, dtype=kind, device=device)
    got = embed(tokens, weight.to(device), backend=case_backend.name).cpu()
    torch.testing.assert_close(got, embed_oracle(ids, weight), rtol=0, atol=0, equal_nan=True)


@fuzz(80)
@given(
    rows=st.integers(1, 64), width=st.integers(1, 130), added=st.booleans(),
    dtype=st.sampled_from(DTYPES), scale=st.sampled_from([1e-4, 1.0, 100.0]),
    eps=st.sampled_from([0.0, 1e-6, 1e-2]), seed=SEEDS,
)  # fmt: skip
def test_norm_act(rows, width, added, dtype, scale, eps, seed, case_backend):
    """Against float64, and each row alone, with a row of NaN somewhere."""
    rng, device = seeded(seed), case_backend.device
    x, residual = ((scale * torch.randn(rows, width) + scale).to(dtype) for _ in range(2))
    bad = rng.randrange(rows + 1)
    x[bad : bad + 1] = NAN
    weight = torch.randn(width).to(dtype)

    def run(part: slice) -> list[torch.Tensor]:
        own = {"residual": residual[part].to(device)} if added else {}
        given = x[part].clone().to(device), weight.to(device)
        got = norm_act(*given, eps, backend=case_backend.name, **own)
        return [tensor.cpu() for tensor in (got if added else (got,))]

    whole = run(slice(None))
    row = rng.randrange(rows)
    for many, one in zip(whole, run(slice(row, row + 1)), strict=True):
        torch.testing.assert_close(many[row], one[0], rtol=0, atol=0, equal_nan=True)
    total = (x.double() + residual.double()).to(dtype) if added else x
    if added:
        torch.testing.assert_close(whole[1], total, rtol=0, atol=0, equal_nan=True)
    wide = total.double()
    want = weight.double() * wide / (wide.square().mean(1, keepdim=True) + eps).sqrt()
    # Rounded after the scaling and after the weight, and once for the float32 arithmetic.
    limit = 1.5 * torch.finfo(dtype).eps * want.abs() + torch.finfo(dtype).tiny
    limit = torch.maximum(limit, 4e-6 * want.abs())
    error = (whole[0].double() - want).abs()
    sound = torch.arange(rows) != bad
    assert bool((error <= limit)[sound].all())
    assert bool(whole[0][~sound].isnan().all())


@fuzz(60)
@given(
    sizes=st.lists(st.integers(0, 12), min_size=1, max_size=3), spare=st.integers(0, 3),
    kv_heads=st.integers(1, 3), group=st.integers(1, 3), half=st.integers(1, 20),
    dtype=st.sampled_from(DTYPES), norm=st.booleans(),
    layout=st.sampled_from(["BHSD", "BSHD", "part"]), seed=SEEDS,
)  # fmt: skip
def test_rope_append(
    sizes, spare, kv_heads, group, half, dtype, norm, layout, seed, case_backend
):  # fmt: skip
    """Against transformers' functions row by row; padding holds NaN and absurd depths."""
    nodes = max(*sizes, 1) + spare
    heads = (kv_heads * group, kv_heads)
    Rope(seeded(seed), sizes, nodes, dtype, heads, 2 * half, slots=nodes + 9, norm=norm).check(
        case_backend, layout
    )


@fuzz(60)
@given(
    M=st.integers(1, 70), N=st.integers(1, 130), steps=st.integers(1, 3),
    dtype=st.sampled_from(DTYPES), round_to=st.sampled_from(ROUND_TO), nans=st.integers(0, 2),
    seed=SEEDS,
)  # fmt: skip
def test_lm_head_argmax(M, N, steps, dtype, round_to, nans, seed, case_backend):
    """Small integers: sums are exact, ties are common, and the oracle looks at one row a time."""
    rng, device = seeded(seed), case_backend.device
    x = torch.randint(-3, 4, (M, 64 * steps)).to(dtype)
    w = torch.randint(-1, 2, (N, 64 * steps)).to(dtype)
    for _ in range(nans):
        x[rng.randrange(M), rng.randrange(64 * steps)] = NAN
    rows = rng.choice([M, rng.randint(0, M)])
    count = None if rows == M else int32([rows], device)
    got = lm_head_argmax(
        x.to(device), w.to(device), count, round_to=round_to, backend=case_backend.name
    )
    want = argmax_oracle((x.double() @ w.double().T)[:rows].float(), round_to)
    assert repr(list(zip(*(part[:rows].tolist() for part in got), strict=True))) == repr(want)


@fuzz(60)
@given(
    cases=st.lists(attentions(130, 14, [4, 20, 32]), min_size=1, max_size=2),
    spare=st.integers(0, 3),
)
def test_tree_attention(cases, spare, case_backend):
    """A ragged batch against float64, with NaN wherever nothing is to be read."""
    first = cases[0]
    rng = seeded(first.seed)
    trees = [case.round(rng).tree for case in cases]
    case = make(
        rng, trees, [one.n for one in cases], (first.kv_heads * first.group, first.kv_heads),
        32 if case_backend.device == "cuda" else first.head_dim, first.dtype, 64,
        max(len(tree.row) for tree in trees) + spare, device=case_backend.device,
    )  # fmt: skip
    out = case.run(case_backend.name)
    ours, theirs = errors(case, out)
    # Torch's error can be 0 by chance; one rounding of the largest value is always granted.
    assert (
        ours.max()
        <= 2 * theirs.max() + torch.finfo(first.dtype).eps * case.v.nan_to_num().abs().max()
    )
    for b, tree in enumerate(trees):
        assert not out[b, len(tree.row) :].any()


@fuzz(400)
@given(case=attentions(600, 64, [16, 32, 40]))
def test_exact_attention_holds_the_law(case: Attention):
    rng = seeded(case.seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XSPEC_EXACT", "1")
        whole = case.round(rng)
        assert violations(attention_op("torch"), whole, rng, case.width, min(3, case.nodes)) == 0


@fuzz(60)
@given(case=linears(70, 70, EPILOGUES, 7), rows=st.integers(0, 70))
def test_skinny_linear(case, rows, case_backend):
    seeded(case.seed)
    num_rows = rows if rows <= case.M else None
    check_linear(case.M, case.N, case.K, case.dtype, case.epilogue, case_backend, num_rows)


@fuzz(300)
@given(case=linears(130, 200, EPILOGUES, 9))
def test_exact_linear_holds_the_law(case):
    """A few rows of many, in any order and among garbage, have the bits they have among all."""
    rng = seeded(case.seed)
    x, w = operands(case.M, case.N, case.K, case.dtype)
    given = epilogue(case.epilogue, case.M, case.N, case.dtype)
    residual = given.pop("residual", None)

    def run(rows: list[int], x: torch.Tensor) -> torch.Tensor:
        own = {} if residual is None else {"residual": residual[rows]}
        return skinny_linear(x[rows], w, backend="torch", **given, **own)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XSPEC_EXACT", "1")
        whole = run(list(range(case.M)), x)
        row = rng.randrange(case.M)
        some = rng.sample(range(case.M), rng.randint(1, case.M))
        assert torch.equal(run([row], x)[0], whole[row])
        assert torch.equal(run(some, x), whole[some])
        garbage = torch.full_like(x, rng.choice([NAN, math.inf, 1e4]))
        garbage[some[0]] = x[some[0]]
        assert torch.equal(run(some, garbage)[0], whole[some[0]])


class Decoder(NamedTuple):
    """A random two-layer model on the ops, 64 wide."""

    layers: list[dict[str, torch.Tensor]]
    table: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    kv_heads: int

    @classmethod
    def random(cls, kv_heads: int, slots: int, dtype: torch.dtype) -> Decoder:
        shapes = {"qkv": (64 + 64 * kv_heads, 64), "o": (64, 64), "up": (128, 64), "down": (64, 64)}
        layers = [
            {name: (torch.randn(shape) / 6).to(dtype) for name, shape in shapes.items()}
            for _ in range(2)
        ]
        turns = rope_table(100.0 ** -(torch.arange(16) / 16), slots, dtype)
        return cls(layers, torch.randn(37, 64).to(dtype), *turns, kv_heads)

    def caches(self, slots: int) -> list[torch.Tensor]:
        shape = (1, self.kv_heads, slots, 32)
        return [torch.full(shape, NAN, dtype=self.table.dtype) for _ in range(4)]

    def targets(self, tokens, depth, path_slot, seqlens, caches) -> tuple[torch.Tensor, ...]:
        """(token after each row, flags, logit), [N] each."""
        ones = torch.ones(64, dtype=self.table.dtype)
        hidden = embed(tokens, self.table, backend="torch")
        for weights, k, v in zip(self.layers, caches[::2], caches[1::2], strict=True):
            qkv = skinny_linear(norm_act(hidden, ones, 1e-6), weights["qkv"])
            q = rope_append(qkv, self.cos, self.sin, depth, seqlens, k, v)
            mixed = tree_attention(q, k, v, depth, path_slot, seqlens)[0].flatten(1)
            hidden = skinny_linear(mixed, weights["o"], residual=hidden)
            inner = skinny_linear(norm_act(hidden, ones, 1e-6), weights["up"], gate=True)
            hidden = skinny_linear(inner, weights["down"], residual=hidden)
        return lm_head_argmax(norm_act(hidden, ones, 1e-6), self.table, round_to=hidden.dtype)


class Session(NamedTuple):
    """Decoding of `new` tokens behind `prompt` committed ones, in rounds of trees."""

    prompt: int
    new: int
    nodes: int
    spread: int
    kv_heads: int
    luck: float
    dtype: torch.dtype
    seed: int

    def decode(self, model: Decoder, rng, guess: list[int]) -> tuple[list[int], list, list]:
        """(tokens, logits of the rows that were kept, committed K and V); `guess` is what drafts
        say where they are lucky, and without it every round has one row."""
        slots = self.prompt + self.new + self.nodes
        caches = model.caches(slots)
        for number, cache in enumerate(caches):
            made = torch.Generator().manual_seed(self.seed + number)
            values = torch.randn(cache[:, :, : self.prompt].shape, generator=made)
            cache[:, :, : self.prompt] = values.to(cache.dtype)
        seqlens = int32([self.prompt])
        root, sequence = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
        record = torch.zeros(1, TOKENS + self.nodes, dtype=torch.int64)
        said, logits = [0], []
        while len(said) <= self.new:
            parents = grow(rng, self.nodes if guess else 1, self.spread)
            mask = tree_mask(int32([parents]), max_depth=64)
            at = [len(said) - 1 + len(path_to(parents, i)) - 1 for i in range(len(parents))]
            tokens = [
                guess[a] if a < len(guess) and rng.random() < self.luck else rng.randrange(37)
                for a in at
            ]
            tokens[0] = said[-1]
            ids = torch.tensor(tokens)
            found = model.targets(ids, mask.depth, mask.path_slot, seqlens, caches)
            left = int32([self.new + 1 - len(said)])
            tail = verify_tail(
                found.ids[None], found.flags[None], ids[None], int32([parents]),
                mask.ancestor_bits, caches, seqlens, root, sequence,
                record, max_new=left,
            )  # fmt: skip
            path = [0, *tail.accept_path[0].tolist()]
            rows = path[: int(tail.accept_len) + 1]
            logits += found.best[rows].tolist()
            said += [int(found.ids[row]) for row in rows]
        return said, logits, [cache[:, :, : int(seqlens)] for cache in caches]


@fuzz(100)
@given(
    case=st.builds(
        Session,
        prompt=st.sampled_from([0, 20, 60, 64, 90, 250]),
        new=st.integers(1, 12),
        nodes=st.integers(1, 16),
        spread=SPREADS,
        kv_heads=st.sampled_from([1, 2]),
        luck=st.sampled_from([0.0, 0.6, 1.0]),
        dtype=st.sampled_from([torch.float32, torch.bfloat16]),
        seed=SEEDS,
    )
)
def test_decoding_in_trees_is_plain_decoding(case):
    """Tokens, logits and the K and V of every layer, by their bits."""
    rng = seeded(case.seed)
    model = Decoder.random(case.kv_heads, case.prompt + case.new + case.nodes, case.dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XSPEC_EXACT", "1")
        plain = case.decode(model, rng, [])
        tree = case.decode(model, rng, plain[0])
    assert tree[0] == plain[0]
    assert tree[1] == plain[1]
    for layer, (one, other) in enumerate(zip(tree[2], plain[2], strict=True)):
        assert torch.equal(one, other), f"cache {layer}"
