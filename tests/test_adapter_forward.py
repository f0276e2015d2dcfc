"""adapter_forward and the ops it is made of against the modules, row by row."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from adapter_cases import EXACT, KINDS, VOCAB, Given
from conftest import INTERPRETED
from op_cases import int32
from xspec_kernels import (
    LayerNorm,
    adapter_forward,
    embed,
    layer_linear,
    layer_norm,
    lm_head_argmax,
    row_attention,
)
from xspec_runtime.adapters.hidden import HiddenAdapter, HiddenAdapterConfig
from xspec_runtime.adapters.network import state_network

pytestmark = pytest.mark.usefixtures("poisoned")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Every network on a few rows; on others one of each make, as the interpreter is slow.
MORE = [("token padded", 64), ("L3", 16), ("L4", 1)] if INTERPRETED else [
    (kind, rows) for kind in ("token padded", "L3", "L4") for rows in (1, 16, 64)
]  # fmt: skip
SIZES = [*((kind, 5) for kind in KINDS), *MORE]


@pytest.fixture
def case(op_backend):
    if op_backend.name == "cuda":
        pytest.skip("no CUDA C++ kernels for these ops")
    return op_backend


@pytest.fixture
def exact(case, monkeypatch):
    """A backend that promises bits: kernels always, torch in exact mode."""
    monkeypatch.setenv("XSPEC_EXACT", "1")
    return case


def run(given: Given, case, rows: int | None = None, spare: int = 0, **options):
    """(ids, flags, best) of the first `rows`; behind them, `spare` rows of rubbish."""
    fed = given.fed[:rows]
    count = int32([len(fed)], case.device) if spare else None
    rubbish = fed.new_full((spare, *fed.shape[1:]), 3 if given.reads_tokens else torch.nan)
    fed = torch.cat([fed, rubbish]).to(case.device)
    found = adapter_forward(given.network(case.device), fed, count, backend=case.name, **options)
    return [part[: len(given.fed[:rows])].cpu() for part in found]


@pytest.mark.parametrize(("kind", "rows"), SIZES)
def test_network_is_the_module(kind, rows, case, seed):
    given = Given(kind, rows)
    ids, flags, best = run(given, case, spare=3 if rows < 64 else 0)
    want = given.logits(torch.float64).float()
    top, second = want.topk(2).values.T
    clear = top - second > 1e-4
    assert torch.equal(ids[clear], want.argmax(-1)[clear]) and clear.float().mean() > 0.7
    torch.testing.assert_close(best, top, rtol=2e-5, atol=2e-5)
    assert not flags[clear].any()


@pytest.mark.parametrize("kind", ["token", "L3", "L4"])
@pytest.mark.parametrize("dtype", DTYPES[2:] if INTERPRETED else DTYPES[1:])
def test_no_further_off_than_the_module(dtype, kind, case, seed):
    """In the same precision, against float32 of the same weights."""
    given = Given(kind, 16 if case.name == "triton" else 64, dtype)
    best = run(given, case)[2]
    want = given.logits(torch.float32).amax(1)
    error, theirs = ((x.float() - want).norm().item() for x in (best, given.logits().amax(1)))
    assert 0 < error <= 2 * theirs


@pytest.mark.parametrize("kind", ("token padded", "L3") if INTERPRETED else EXACT)
def test_row_does_not_know_how_many_there_are(kind, exact, seed):
    """Of a causal network what comes behind, of one without attention any other."""
    given, last = Given(kind, 64 if exact.name == "torch" else 24), 19
    together = run(given, exact)
    for rows in (17,) if exact.name == "triton" else (1, 2, 17, 33):
        for mine, ours in zip(run(given, exact, rows), together, strict=True):
            assert torch.equal(mine, ours[:rows])
    if not given.reads_tokens:
        given.fed = given.fed[last : last + 1]
        for mine, ours in zip(run(given, exact), together, strict=True):
            assert torch.equal(mine, ours[last : last + 1])


def test_padding_costs_no_bits_where_all_look_at_all(exact, seed):
    given = Given("L4", 6)
    alone = run(given, exact)
    for mine, ours in zip(run(given, exact, spare=14), alone, strict=True):
        assert torch.equal(mine, ours)


def test_an_id_outside_the_table_is_flagged(case, seed):
    given = Given("token", 5)
    given.fed[3] = -1
    ids, flags, _ = run(given, case)
    assert (flags == 2).tolist() == (ids == -1).tolist() == [False, False, False, True, True]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda fed: fed[:, None], "fed has shape"),
        (lambda fed: fed.float(), "expected torch.int32 or torch.int64"),
        (lambda fed: fed.repeat(30), "M from 1 to 80"),
    ],
)
def test_bad_tokens(change, words, seed):
    given = Given("token", 4)
    with pytest.raises(ValueError, match=words):
        adapter_forward(given.network(), change(given.fed))


def test_bad_states(seed):
    given = Given("L1", 4)
    with pytest.raises(ValueError, match=r"expected \[M, 64\] states"):
        adapter_forward(given.network(), given.fed[:, :32])
    with pytest.raises(ValueError, match=r"head must be \[V, 64\]"):
        state_network(given.adapter, torch.zeros(9, 32))
    causal = HiddenAdapter(HiddenAdapterConfig("L5", 64, 64, heads=1))
    with pytest.raises(ValueError, match="L5 has no kernels"):
        state_network(causal, torch.zeros(9, 64))


def norm_of(width: int, dtype: torch.dtype = torch.float32) -> LayerNorm:
    return LayerNorm((torch.rand(width) + 0.5).to(dtype), torch.randn(width).to(dtype), 1e-5)


def normed(x: torch.Tensor, norm: LayerNorm) -> torch.Tensor:
    return F.layer_norm(x, x.shape[1:], norm.weight.to(x), norm.bias.to(x), norm.eps)


@pytest.mark.parametrize("rows", [3] if INTERPRETED else [3, 70])
def test_every_part_of_a_product(rows, case, seed):
    x, w, v = torch.randn(rows, 64), torch.randn(100, 64) / 8, torch.randn(192, 64) / 8
    bias, residual = torch.randn(100), torch.randn(rows, 100)
    first, second, third = norm_of(64), norm_of(192), norm_of(100)
    count, options = int32([rows - 1]), {"backend": case.name}
    x[-1] = residual[-1] = torch.nan
    y, moments = layer_linear(x, v, count, norm=first, with_moments=True, **options)
    z = layer_linear(
        y, torch.cat([w] * 3, 1), count, bias=bias, norm=second._replace(moments=moments),
        gelu_in=True, gelu_out=True, scale=0.25, residual=residual, keep=-2.0, residual_norm=third,
        **options,
    )  # fmt: skip
    y_want = normed(x.double(), first) @ v.T.double()
    inner = F.gelu(normed(y_want, second)) @ torch.cat([w] * 3, 1).T.double() + bias
    want = 0.25 * F.gelu(inner) - 2 * normed(residual.double(), third)
    for got, expected in ((y, y_want), (z, want)):
        torch.testing.assert_close(got[:-1], expected[:-1].float(), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("far", [0.0, 3000.0])
def test_rows_far_from_zero_keep_their_digits(far, case, seed):
    """The second product takes the moments that the tiles of the first left."""
    x, bias, norm = torch.randn(4, 64), torch.full((192,), far), norm_of(192)
    w, v = torch.randn(192, 64) / 8, torch.randn(9, 192) / 14
    y, moments = layer_linear(x, w, bias=bias, with_moments=True, backend=case.name)
    got = layer_linear(y, v, norm=norm._replace(moments=moments), backend=case.name)
    want = normed(y.double(), norm) @ v.T.double()
    # The mean itself is rounded to float32; squares of such rows would be off by 1.
    torch.testing.assert_close(got, want.float(), rtol=0, atol=1e-4 + 4 * far * 2**-23)


@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize(("heads", "size"), [(3, 24), (1, 130)])
def test_attention(heads, size, causal, case, seed):
    rows, count = 80, 75
    qkv, ids = torch.randn(rows, 3 * heads * size), torch.randint(0, 3, (rows,))
    qkv[count:], ids[0] = torch.nan, 1
    for given in (None, ids):
        got = row_attention(qkv, int32([count]), heads=heads, causal=causal, token_ids=given,
                            pad=1, backend=case.name)  # fmt: skip
        q, k, v = (
            part.unflatten(1, (heads, size)).transpose(0, 1).double()
            for part in qkv[:count].chunk(3, 1)
        )
        place = torch.arange(count)
        seen = (place <= place[:, None]) if causal else torch.ones(count, count).bool()
        if given is not None:
            seen = seen & ((ids[:count] != 1) | (place == 0))
        want = F.scaled_dot_product_attention(q, k, v, seen).transpose(0, 1).flatten(1)
        torch.testing.assert_close(got[:count], want.float(), rtol=1e-5, atol=1e-5)


def test_causal_rows_across_tiles_of_keys(exact, seed):
    qkv = torch.randn(130, 3 * 32)
    whole = row_attention(qkv, heads=1, causal=True, backend=exact.name)
    for rows in (1, 16, 64, 65, 100):
        part = row_attention(qkv[:rows].clone(), heads=1, causal=True, backend=exact.name)
        assert torch.equal(part, whole[:rows])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [40, 512])
def test_norms(width, dtype, case, seed):
    x, first, second = (5 + torch.randn(3, width)).to(dtype), *(norm_of(width, dtype) for _ in "ab")
    got = layer_norm(x, first, then=second, backend=case.name)
    once = layer_norm(x, first, backend=case.name)
    want = normed(x.double(), first)
    # A value that rounds the other way behind the first norm is one rounding off in the second.
    limit = {"rtol": 8 * torch.finfo(dtype).eps, "atol": 32 * torch.finfo(dtype).eps}
    torch.testing.assert_close(once.double(), want, **limit)
    torch.testing.assert_close(got.double(), normed(once.double(), second), **limit)


def test_embedding_with_positions(case, seed):
    for dtype in DTYPES:
        table, position = torch.randn(9, 40).to(dtype), torch.randn(6, 40).to(dtype)
        ids = torch.tensor([8, 0, -1, 3])
        got = embed(ids, table, position=position, backend=case.name)
        assert torch.equal(got[[0, 1, 3]], (table[ids] + position[:4])[[0, 1, 3]])
        assert got[2].isnan().all()
    with pytest.raises(ValueError, match="4 ids and 2 positions"):
        embed(ids, table, position=position[:2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_head_with_a_bias(dtype, case, seed):
    """Small whole numbers: sums are exact and ties common."""
    x, w = (torch.randint(-2, 3, size).to(dtype) for size in ((5, 64), (VOCAB, 64)))
    bias = torch.randint(-9, 9, (VOCAB,)).to(dtype)
    found = lm_head_argmax(x, w, bias=bias, round_to=dtype, backend=case.name)
    want = (x.double() @ w.double().T + bias).max(1)
    assert torch.equal(found.best.double(), want.values)
    assert found.ids.tolist() == want.indices.tolist()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bias": torch.zeros(3)}, "bias has shape"),
        ({"gelu_in": True}, "gelu_in stands behind a norm"),
        ({"residual_norm": norm_of(5)}, "residual_norm without a residual"),
        ({"norm": norm_of(32)}, r"norm\.weight has shape \[32\]"),
        ({"norm": norm_of(64)._replace(moments=torch.zeros(2, 4))}, r"expected \[T, 2, 4\]"),
        ({"norm": norm_of(64)._replace(eps=-1.0)}, "eps is -1.0"),
    ],
)
def test_bad_products(options, words):
    with pytest.raises(ValueError, match=words):
        layer_linear(torch.zeros(4, 64), torch.zeros(5, 64), **options)


def test_bad_attention():
    with pytest.raises(ValueError, match=r"expected \[M, 3 \* 5 \* D\]"):
        row_attention(torch.zeros(4, 96), heads=5)
    with pytest.raises(ValueError, match="token_ids has shape"):
        row_attention(torch.zeros(4, 96), heads=1, token_ids=torch.zeros(3).long())


def test_operators_are_well_formed(seed):
    ops, name = torch.ops.xspec, "auto"
    x, w, norm = torch.randn(3, 64), torch.randn(5, 64), list(norm_of(64)[:2])
    rest = ([], 0.0, None, None, [], name)
    torch.library.opcheck(
        ops.layer_linear,
        (x, w, int32([3]), None, norm, 1e-5, None, True, False, 0.5, None, 1.0, *rest),
    )
    torch.library.opcheck(ops.row_attention, (torch.randn(3, 96), None, None, 0, 2, True, name))
    torch.library.opcheck(ops.layer_norm, (x, norm, 1e-5, [], 0.0, name))
