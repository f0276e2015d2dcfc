from __future__ import annotations

from importlib import import_module

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from conftest import OpBackend
from op_cases import int32, random_tree
from xspec_kernels import tree_mask
from xspec_kernels.kernels.embed import embed
from xspec_kernels.kernels.norm_act import norm_act
from xspec_kernels.kernels.rope_append import rope_append, rope_table

pytestmark = pytest.mark.usefixtures("poisoned")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NAN = float("nan")


def name_of(dtype: torch.dtype) -> str:
    return str(dtype)[6:]


@pytest.fixture
def case(op_backend):
    if op_backend.name == "cuda":
        pytest.skip("no CUDA C++ kernel for this op")
    return op_backend


def close(got: torch.Tensor, want: torch.Tensor, roundings: int, backend, size=None) -> None:
    """Equal for the reference; for a kernel within one unit in the last place of `size` a rounding.

    The interpreter truncates where a device rounds to bfloat16, hence a whole unit.
    """
    assert got.dtype == want.dtype
    if backend.name != "triton":
        assert torch.equal(got, want)
        return
    size = want if size is None else size
    error = (got.double() - want.double()).abs()
    limit = roundings * torch.finfo(want.dtype).eps * size.double().abs()
    assert bool((error <= limit).all()), f"{(error / limit).max()} of what is allowed"


def embed_oracle(ids: list[int], weight: torch.Tensor) -> torch.Tensor:
    nothing = torch.full_like(weight[0], NAN)
    return torch.stack([weight[i] if 0 <= i < len(weight) else nothing for i in ids])


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("width", [1, 7, 64, 192, 1032, 2048])
@pytest.mark.parametrize("rows", [1, 5])
def test_embed(rows, width, dtype, case, rng):
    weight = torch.randn(11, width).to(dtype)
    ids = [rng.randrange(11) for _ in range(rows)]
    for kind in (torch.int32, torch.int64):
        tokens = torch.tensor(ids, dtype=kind, device=case.device)
        got = embed(tokens, weight.to(case.device), backend=case.name)
        assert got.dtype == dtype
        assert torch.equal(got.cpu(), embed_oracle(ids, weight))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_embed_token_outside_the_table_is_nan(dtype, case):
    weight = torch.randn(4, 24).to(dtype)
    ids = [-1, 3, 4, -(2**62), 2**62, 0]
    got = embed(torch.tensor(ids, device=case.device), weight.to(case.device), backend=case.name)
    assert torch.equal(got.cpu().isnan().all(1), torch.tensor([not 0 <= i < 4 for i in ids]))
    torch.testing.assert_close(got.cpu(), embed_oracle(ids, weight), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("width", [1, 7, 64, 576, 1280])
@pytest.mark.parametrize("added", [False, True], ids=["plain", "residual"])
def test_norm_is_transformers(added, width, dtype, case, seed):
    rows = 3
    x, residual = (torch.randn(rows, width).to(dtype) for _ in range(2))
    module = LlamaRMSNorm(width, eps=1e-5)
    torch.nn.init.normal_(module.weight)
    module = module.to(dtype)
    weight = module.weight.detach()
    inputs = [tensor.to(case.device) for tensor in (x, weight)]
    with torch.inference_mode():
        if not added:
            got = norm_act(*inputs, 1e-5, backend=case.name).cpu()
            close(got, module(x), 4, case)
            return
        got = norm_act(*inputs, 1e-5, residual=residual.to(case.device), backend=case.name)
        total = got[1].cpu()
        close(total, residual + x, 1, case)
        close(got[0].cpu(), module(total), 4, case)


@pytest.mark.parametrize("width", [64, 192, 576])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_norm_of_a_row_does_not_know_its_neighbors(dtype, width, case, seed):
    x = torch.randn(33, width).to(dtype).to(case.device)
    weight = torch.randn(width).to(dtype).to(case.device)
    together, total = norm_act(x, weight, 1e-6, residual=x, backend=case.name)
    for rows in (slice(0, 1), slice(15, 17), slice(32, 33), slice(1, 23)):
        part = x[rows].clone()
        alone = norm_act(part, weight, 1e-6, residual=part, backend=case.name)
        assert torch.equal(alone[0], together[rows]) and torch.equal(alone[1], total[rows])


def test_norm_keeps_nan_in_its_row(case, seed):
    x = torch.randn(3, 40)
    x[1, 7] = NAN
    got = norm_act(x.to(case.device), torch.ones(40, device=case.device), 1e-6, backend=case.name)
    assert got.cpu().isnan().all(1).tolist() == [False, True, False]


class Rope:
    """Arguments of one rope_append, and what transformers' modules make of them."""

    def __init__(self, rng, sizes, nodes, dtype, heads=(4, 2), width=64, slots=24, norm=False):
        batch = len(sizes)
        self.dtype, self.heads, self.width, self.slots = dtype, heads, width, slots
        self.sizes, self.nodes = sizes, nodes
        parents = [random_tree(rng, size)[:size] + [-1] * (nodes - size) for size in sizes]
        self.num_rows = int32(sizes)
        depth = tree_mask(int32(parents), self.num_rows, max_depth=64, backend="torch").depth
        real = torch.arange(nodes) < self.num_rows[:, None]
        self.depth = torch.where(real, depth, 2**30).int()
        self.starts = [rng.randint(0, slots - size) for size in sizes]
        total = (heads[0] + 2 * heads[1]) * width
        self.qkv = torch.where(real[..., None], torch.randn(batch, nodes, total), NAN).to(dtype)
        inverse = 1.0 / (10000 ** (torch.arange(0, width, 2).float() / width))
        self.cos, self.sin = rope_table(inverse, slots + 3, dtype)
        self.norms = [torch.rand(width).add(0.5).to(dtype) for _ in range(2)] if norm else None

    def caches(self, layout: str = "BHSD") -> list[torch.Tensor]:
        shape = (len(self.sizes), self.heads[1], self.slots, self.width)
        made = [torch.randn(shape).to(self.dtype) for _ in range(2)]
        if layout == "BSHD":
            made = [cache.transpose(1, 2).contiguous().transpose(1, 2) for cache in made]
        elif layout == "part":
            made = [torch.cat([cache, cache], 2)[:, :, : self.slots] for cache in made]
        return made

    def run(self, caches, case, ragged=True):
        rows = self.num_rows if ragged else None
        norms = dict(zip(("q_norm", "k_norm"), self.norms, strict=True)) if self.norms else {}
        on = {name: tensor.to(case.device) for name, tensor in norms.items()}
        inputs = (self.qkv.flatten(0, 1), self.cos, self.sin, self.depth, int32(self.starts))
        rows = None if rows is None else rows.to(case.device)
        return rope_append(
            *(tensor.to(case.device) for tensor in inputs), *caches, rows,
            **on, eps=1e-5, backend=case.name,
        )  # fmt: skip

    def oracle(self, caches):
        """Row by row through transformers' functions."""
        q_heads, kv_heads = self.heads
        out = torch.zeros(len(self.sizes), self.nodes, q_heads, self.width, dtype=self.dtype)
        for b, (size, start) in enumerate(zip(self.sizes, self.starts, strict=True)):
            for r in range(size):
                row = self.qkv[b, r].view(1, 1, -1, self.width)
                q, k, v = row.split((q_heads, kv_heads, kv_heads), 2)
                if self.norms:
                    q, k = (self._norm(x, w) for x, w in zip((q, k), self.norms, strict=True))
                at = start + int(self.depth[b, r])
                turn = self.cos[at].view(1, 1, -1), self.sin[at].view(1, 1, -1)
                q, k = apply_rotary_pos_emb(q, k, *turn, unsqueeze_dim=2)
                out[b, r] = q[0, 0]
                caches[0][b, :, start + r], caches[1][b, :, start + r] = k[0, 0], v[0, 0]
        return out

    def _norm(self, x, weight):
        module = Qwen3RMSNorm(self.width, eps=1e-5).to(self.dtype)
        module.weight.data.copy_(weight)
        with torch.inference_mode():
            return module(x)

    def check(self, case, layout="BHSD", ragged=True):
        before = self.caches(layout)
        want = [cache.clone() for cache in before]
        got = [cache.to(case.device) for cache in before]
        expected, q = self.oracle(want), self.run(got, case, ragged).cpu()
        roundings = 6 if self.norms else 3
        for one, other in ((q, expected), (got[0].cpu(), want[0])):
            close(one, other, roundings, case, other.abs().amax(-1, keepdim=True))
        assert torch.equal(got[1].cpu(), want[1])
        for b, (size, start) in enumerate(zip(self.sizes, self.starts, strict=True)):
            assert not q[b, size:].any()
            rest = [slot for slot in range(self.slots) if not start <= slot < start + size]
            assert torch.equal(got[0].cpu()[b, :, rest], before[0][b, :, rest])


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("norm", [False, True], ids=["llama", "qwen3"])
@pytest.mark.parametrize(
    ("heads", "width"), [((4, 2), 64), ((3, 1), 32), ((2, 2), 128), ((1, 1), 256), ((5, 1), 12)]
)
def test_rope_is_transformers(heads, width, norm, dtype, case, rng):
    Rope(rng, [3, 5], 5, dtype, heads, width, norm=norm).check(case)


@pytest.mark.parametrize("nodes", [1, 2, 17])
@pytest.mark.parametrize("layout", ["BHSD", "BSHD", "part"])
def test_rope_rows_and_layouts(layout, nodes, case, rng):
    Rope(rng, [nodes, nodes], nodes, torch.float16).check(case, layout, ragged=False)
    Rope(rng, [0, nodes, rng.randint(0, nodes)], nodes, torch.float16).check(case, layout)


def test_rope_fills_the_cache_to_its_edge(case, rng):
    made = Rope(rng, [6, 4], 6, torch.float32, slots=10)
    made.starts = [4, 6]
    made.check(case)


def test_rope_of_float32_and_float16_is_exact(case, rng):
    """Without a norm every step is one rounding, so the kernel gives the reference's bits."""
    for dtype in DTYPES[:2]:
        made = Rope(rng, [5], 5, dtype)
        want = made.caches()
        got = [cache.to(case.device) for cache in want]
        expected = made.oracle(want)
        assert torch.equal(made.run(got, case).cpu(), expected)
        assert torch.equal(got[0].cpu(), want[0])


def test_rope_of_a_row_does_not_know_its_neighbors(case, rng):
    made = Rope(rng, [9], 9, torch.float16, norm=True)
    caches = [cache.to(case.device) for cache in made.caches()]
    together = made.run(caches, case)
    for row in range(9):
        alone = Rope(rng, [1], 1, torch.float16, norm=True)
        alone.norms, alone.qkv = made.norms, made.qkv[:, row : row + 1].contiguous()
        alone.starts = [made.starts[0] + int(made.depth[0, row])]
        fresh = [cache.to(case.device) for cache in made.caches()]
        assert torch.equal(alone.run(fresh, case)[0, 0], together[0, row])
        there, here = made.starts[0] + row, alone.starts[0]
        for one, many in zip(fresh, caches, strict=True):
            assert torch.equal(one[0, :, here], many[0, :, there])


@pytest.mark.parametrize(("start", "message"), [(6, "row 4 of request 1"), (-1, "row 0 of req")])
@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_rope_beyond_the_edge_raises_and_writes_nothing(backend, start, message, rng):
    made = Rope(rng, [5, 5], 5, torch.float32, slots=10)
    made.starts = [0, start]
    caches = made.caches()
    before = [cache.clone() for cache in caches]
    with pytest.raises(ValueError, match=message):
        made.run(caches, OpBackend(backend, "cpu"))
    assert all(torch.equal(a, b) for a, b in zip(caches, before, strict=True))


@pytest.mark.parametrize("start", [6, 9, 10, 2**30, -1, -3])
def test_rope_on_a_device_drops_rows_without_a_place(start, case, rng, monkeypatch):
    module = import_module("xspec_kernels.kernels.rope_append")
    monkeypatch.setattr(module, "_check_placed", lambda *_: None)
    made = Rope(rng, [5], 5, torch.float32, slots=10)
    made.depth.fill_(0)
    made.starts = [start]
    guarded = [torch.randn(1, 2, 14, 64).to(case.device) for _ in range(2)]
    before = [cache.clone() for cache in guarded]
    inside = [row for row in range(5) if 0 <= start + row < 10 and start >= 0]
    q = made.run([cache[:, :, 2:12] for cache in guarded], case)
    assert [bool(q[0, row].any()) for row in range(5)] == [row in inside for row in range(5)]
    changed = [[not torch.equal(g[0, :, s], b[0, :, s]) for s in range(14)]
               for g, b in zip(guarded, before, strict=True)]  # fmt: skip
    assert changed == [[s - 2 - start in inside for s in range(14)]] * 2


def rope_arguments(**changes):
    cache = torch.zeros(2, 1, 8, 4)
    made = {
        "qkv": torch.zeros(6, 16),
        "cos": torch.zeros(8, 4),
        "sin": torch.zeros(8, 4),
        "depth": torch.zeros(2, 3, dtype=torch.int32),
        "cache_seqlens": int32([0, 0]),
        "k_cache": cache,
        "v_cache": cache.clone(),
    }
    return made | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qkv": torch.zeros(5, 16)}, r"qkv has shape \[5, 16\], expected \[6,"),
        ({"qkv": torch.zeros(6, 8)}, "with H_q >= 1"),
        ({"qkv": torch.zeros(6, 18)}, "qkv has shape"),
        ({"qkv": torch.zeros(6, 16).half()}, "k_cache is torch.float32"),
        ({"cos": torch.zeros(7, 4)}, "P >= 8"),
        ({"sin": torch.zeros(8, 2)}, "sin has shape"),
        ({"depth": torch.zeros(3, 2, dtype=torch.int32)}, r"depth has shape \[3, 2\]"),
        ({"depth": torch.zeros(2, 3)}, "depth is torch.float32"),
        ({"cache_seqlens": int32([0])}, "cache_seqlens has shape"),
        ({"num_rows": torch.zeros(2)}, "num_rows is torch.float32"),
        ({"k_cache": torch.zeros(2, 1, 8, 8)[..., ::2]}, "contiguous rows"),
        ({"k_cache": torch.zeros(2, 1, 8, 6)[..., :4]}, "multiples of D"),
        ({"k_cache": torch.zeros(2, 1, 8, 3)}, "D even"),
        ({"v_cache": torch.zeros(2, 8, 1, 4).transpose(1, 2)}, "v_cache is .* with strides"),
        ({"q_norm": torch.ones(4)}, "given together"),
        ({"q_norm": torch.ones(4), "k_norm": torch.ones(3)}, "k_norm has shape"),
        ({"eps": NAN}, "eps is nan"),
    ],
)
def test_rope_bad_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        rope_append(**rope_arguments(**changes))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: embed(torch.zeros(2, 2).long(), torch.zeros(4, 4)), r"expected \[M\]"),
        (lambda: embed(torch.zeros(2), torch.zeros(4, 4)), "token_ids is torch.float32"),
        (lambda: embed(torch.zeros(2).long(), torch.zeros(4)), r"expected \[V, D\]"),
        (lambda: embed(torch.zeros(2).long(), torch.zeros(4, 8)[:, ::2]), "contiguous"),
        (lambda: norm_act(torch.zeros(4), torch.zeros(4), 0.1), r"expected \[M, D\]"),
        (lambda: norm_act(torch.zeros(1, 4), torch.zeros(3), 0.1), "weight has shape"),
        (lambda: norm_act(torch.zeros(1, 4), torch.zeros(4).half(), 0.1), "weight is"),
        (lambda: norm_act(torch.zeros(1, 4), torch.zeros(4), -1.0), "eps is -1.0"),
        (
            lambda: norm_act(torch.zeros(1, 4), torch.zeros(4), 0.1, residual=torch.zeros(2, 4)),
            "residual has shape",
        ),
        (lambda: rope_table(torch.ones(2, 2), 8, torch.float32), r"inv_freq is .* \[2, 2\]"),
        (lambda: rope_table(torch.ones(2).int(), 8, torch.float32), r"inv_freq is torch.int32"),
        (lambda: rope_table(torch.ones(2), 0, torch.float32), "positions must be at least 1"),
        (lambda: rope_table(torch.ones(2), 8, torch.int8), "dtype must be one of floats"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.interpreter
def test_kernel_asks_for_alignment():
    x = torch.zeros(9)[1:].view(1, 8)
    with pytest.raises(ValueError, match="x starts at 4 bytes past a multiple of 16"):
        norm_act(x, torch.zeros(8), 1e-6, backend="triton")


@pytest.mark.parametrize("norm", [False, True])
def test_opcheck(norm, rng):
    made = Rope(rng, [3, 5], 5, torch.float32, norm=norm)
    norms = made.norms or [None, None]
    inputs = (made.qkv.nan_to_num().flatten(0, 1), made.cos, made.sin, made.depth.clamp_max(4))
    starts = int32([2, 3])
    torch.library.opcheck(
        torch.ops.xspec.rope_append,
        (*inputs, starts, *made.caches(), made.num_rows, *norms, 1e-5, "auto"),
    )
    x, weight = torch.randn(2, 8), torch.randn(8)
    residual = x.clone() if norm else None
    torch.library.opcheck(torch.ops.xspec.norm_act, (x, weight, 1e-5, residual, "auto"))
    torch.library.opcheck(torch.ops.xspec.embed, (int32([0, 1]), x, None, "auto"))
