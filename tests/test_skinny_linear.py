from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import INTERPRETED, OpBackend
from linear_cases import (
    DTYPES,
    EPILOGUES,
    EPS,
    arrive,
    cut,
    epilogue,
    flips,
    operands,
    oracle,
    plant,
    rejected,
    row_norm,
)
from op_cases import int32
from xspec_kernels import _dispatch, tiles
from xspec_kernels.kernels import _product
from xspec_kernels.kernels._row_norm import RowNorm
from xspec_kernels.kernels.norm_act import norm_act
from xspec_kernels.kernels.skinny_linear import interleave_gate, skinny_linear
from xspec_kernels.workspace import Workspace

pytestmark = pytest.mark.usefixtures("poisoned")
NAN = float("nan")
# Half a unit in the last place, and what float32 sums of K = 448 terms of unit size may lose.
HALF_ULP = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
SUM_ERROR = 2e-6


def named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def limit(want: torch.Tensor, dtype: torch.dtype, op_backend) -> torch.Tensor:
    """The error allowed per element: the kernel rounds once, `torch` after the product too."""
    roundings = 1 if op_backend.name == "triton" else 4
    # The product and the residual may cancel, or a large gate multiply the other factor's error.
    return (want.abs() + (0 if roundings == 1 else 4)) * HALF_ULP[dtype] * roundings * 1.01 + 1e-5


def check(M, N, K, dtype, name, op_backend, num_rows=None, workspace=None, parts=0):
    """One product against float64, with NaN in every row that does not count; `parts` of a norm,
    see `row_norm`, or 0."""
    device, rows = op_backend.device, M if num_rows is None else num_rows
    x, w = operands(M, N, K, dtype, device)
    x[rows:] = NAN
    given = epilogue(name, M, N, dtype, device)
    count = None if num_rows is None else int32([num_rows], device)
    norm = None if parts == 0 else row_norm(x, parts)
    y = skinny_linear(x, w, count, norm=norm, workspace=workspace, backend=op_backend.name, **given)
    if norm is not None:
        x = norm_act(x, norm.weight, EPS, backend="torch")
    want = oracle(x, w, **given)
    assert y.dtype == dtype and y.shape == want.shape
    error = (y.double() - want)[:rows].abs()
    allowed = limit(want[:rows], dtype, op_backend)
    if norm is not None and "gate" in name:
        # The other factor multiplies what a rounding of x changes.
        allowed = allowed + 8 * flips(x, w)[:rows].unflatten(1, (-1, 2)).sum(2)
    elif norm is not None:
        allowed = allowed + flips(x, w)[:rows]
    assert (error <= allowed).all(), error.max()
    if op_backend.name == "triton":
        assert y[rows:].isnan().all(), "rows that do not count are not written"
    return y


@pytest.mark.parametrize("dtype", DTYPES, ids=named)
@pytest.mark.parametrize("name", EPILOGUES)
@pytest.mark.parametrize("split_k", [1, 3, 4])
def test_epilogues_and_splits(dtype, name, split_k, op_backend, monkeypatch, rng):
    cut(monkeypatch, split_k=split_k)
    workspace = Workspace(op_backend.device)
    for M in (rng.choice([1, 2, 15, 16, 17, 33]), rng.choice([63, 64, 65, 70])):
        N = rng.choice([2, 32, 34, 62, 64])
        N += rng.randint(0, 1) if "gate" not in name else 0
        check(M, N, 448, dtype, name, op_backend, rng.choice([None, M, (M + 1) // 2]), workspace)
        assert not workspace.semaphores("linear.semaphore", 8).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=named)
@pytest.mark.parametrize("name", ["none", "bias+residual", "bias+gate"])
@pytest.mark.parametrize("parts", [None, 1, 5])
def test_norms(dtype, name, parts, op_backend, monkeypatch, rng):
    """Five parts are a number that no power of two helps with."""
    cut(monkeypatch, split_k=rng.choice([1, 3]))
    M, N = rng.choice([1, 16, 22, 65]), rng.choice([2, 34, 64])
    for num_rows in (None, (M + 1) // 2):
        check(M, N, 320, dtype, name, op_backend, num_rows, Workspace(op_backend.device), parts)


@pytest.mark.parametrize("dtype", DTYPES, ids=named)
@pytest.mark.parametrize("name", ["none", "residual", "gate"])
def test_squares_of_what_is_returned(dtype, name, op_backend, monkeypatch, rng):
    cut(monkeypatch, split_k=rng.choice([1, 3]))
    M, N, device = 66, 70, op_backend.device
    x, w = operands(M, N, 192, dtype, device)
    x[40:] = NAN
    given = epilogue(name, M, N, dtype, device)
    run = {"workspace": Workspace(device), "backend": op_backend.name, **given}
    count = int32([40], device)
    y, squares = skinny_linear(x, w, count, with_squares=True, **run)
    assert torch.equal(y[:40], skinny_linear(x, w, count, **run)[:40])
    if op_backend.name != "triton":
        assert squares is None
        return
    # A tile has 32 columns, half of them behind a gate.
    pieces = y[:40].double().split(16 if given.get("gate") else 32, 1)
    want = torch.stack([piece.square().sum(1) for piece in pieces])
    assert squares.dtype == torch.float32 and squares.shape == (3, M)
    assert ((squares[:, :40] - want).abs() <= 4e-6 * want).all()
    assert squares[:, 40:].isnan().all(), "rows that do not count are not written"


@pytest.mark.parametrize("dtype", DTYPES, ids=named)
def test_product_to_norm_to_product(dtype, op_backend, monkeypatch, seed):
    """What the first leaves is what the second wants: the pair against the three ops."""
    cut(monkeypatch)
    x, w = operands(22, 192, 64, dtype, op_backend.device)
    residual = torch.randn(22, 192).to(x)
    weight, after = torch.randn(192).to(x), operands(1, 34, 192, dtype, op_backend.device)[1]
    on = {"backend": op_backend.name}
    y, squares = skinny_linear(x, w, residual=residual, with_squares=True, **on)
    got = skinny_linear(y, after, norm=RowNorm(weight, EPS, squares), **on)
    # The kernel of norm_act, interpreted, would truncate to bfloat16.
    normed = norm_act(y, weight, EPS, backend="torch")
    want = skinny_linear(normed, after, **on)
    if op_backend.name != "triton":
        assert torch.equal(got, want)
        return
    allowed = flips(normed, after) + 2 * limit(want, dtype, op_backend)
    assert ((got.double() - want.double()).abs() <= allowed).all()


@pytest.mark.parametrize("M", [1, 22, 64, 70])
def test_a_workspace_serves_one_launch_after_another(M, op_backend, monkeypatch, seed):
    cut(monkeypatch, split_k=3)
    workspace = Workspace(op_backend.device)
    x, w = operands(M, 66, 448, torch.float32, op_backend.device)
    results = [skinny_linear(x, w, workspace=workspace, backend=op_backend.name) for _ in "abc"]
    check(M, 64, 192, torch.float32, "gate", op_backend, workspace=workspace)
    alone = skinny_linear(x, w, backend=op_backend.name)
    assert all(torch.equal(result, alone) for result in results)


def test_no_row_counts(op_backend, monkeypatch, seed):
    cut(monkeypatch)
    for count in (0, -5):
        check(5, 33, 128, torch.float32, "none", op_backend, num_rows=count)


def test_more_rows_than_there_are(op_backend, monkeypatch, seed):
    cut(monkeypatch)
    x, w = operands(5, 33, 192, torch.float32, op_backend.device)
    y = skinny_linear(x, w, int32([99], op_backend.device), backend=op_backend.name)
    assert torch.equal(y, skinny_linear(x, w, backend=op_backend.name))


@given(data=st.data())
def test_any_shape(data, op_backend, seed):
    draw = data.draw
    name, dtype = draw(st.sampled_from(EPILOGUES)), draw(st.sampled_from(DTYPES))
    M, K = draw(st.integers(1, 70)), 64 * draw(st.integers(1, 7))
    N = draw(st.integers(1, 70)) * (2 if "gate" in name else 1)
    num_rows = draw(st.none() | st.integers(0, M))
    split_k, tma = draw(st.integers(1, K // 64)), draw(st.booleans())
    parts = draw(st.sampled_from([0, None, 1, 2, 33]))
    with pytest.MonkeyPatch.context() as patch:
        cut(patch, draw(st.sampled_from([16, 32, 64])), split_k, tma and INTERPRETED)
        check(M, N, K, dtype, name, op_backend, num_rows, parts=parts)


@pytest.mark.parametrize("dtype", DTYPES, ids=named)
@pytest.mark.parametrize("name", ["none", "bias+residual", "gate"])
def test_error_is_at_most_twice_torchs(dtype, name, op_backend, monkeypatch, seed):
    cut(monkeypatch, split_k=4)
    x, w = operands(22, 66, 832, dtype, op_backend.device)
    given = epilogue(name, 22, 66, dtype, op_backend.device)
    want = oracle(x, w, **given)
    product = torch.nn.functional.linear(x, w, given.get("bias"))
    if "gate" in given:
        product = torch.nn.functional.silu(product[:, 0::2]) * product[:, 1::2]
    theirs = product + given.get("residual", 0)
    ours = skinny_linear(x, w, backend=op_backend.name, **given)
    assert (ours - want).abs().max() <= 2 * (theirs - want).abs().max()
    assert (ours - want).norm() <= 2 * (theirs - want).norm()


def check_rows_are_independent(op_backend, dtype=torch.float32, N=34, K=256):
    """Each row alone, moved and among garbage has the bits it has among its siblings."""
    device = op_backend.device
    for name in ("none", "norm bias+residual", "norm gate"):
        x, w = operands(70, N, K, dtype, device)
        given = epilogue(name, 70, N, dtype, device)
        residual = given.pop("residual", None)
        norm = row_norm(x, 3) if "norm" in name else None

        def run(rows, at, count=None, w=w, given=given, residual=residual, norm=norm):
            own = {} if residual is None else {"residual": residual[at]}
            if norm is not None:
                own["norm"] = norm._replace(squares=norm.squares[:, at].contiguous())
            rows = rows.contiguous()
            y, squares = skinny_linear(
                rows, w, count, with_squares=True, backend=op_backend.name, **given, **own
            )
            # Bits of the squares are bits of the row.
            return y if squares is None else torch.cat([y.float(), squares.T], 1)

        every = torch.arange(70, device=device)
        whole = run(x, every)
        for rows in (1, 15, 33, 64) if INTERPRETED else (1, 2, 15, 16, 17, 22, 33, 64):
            assert torch.equal(run(x[:rows], every[:rows]), whole[:rows]), rows
        assert torch.equal(run(x, every, int32([22], device))[:22], whole[:22])
        order = torch.randperm(70, device=device)
        assert torch.equal(run(x[order], order), whole[order])
        for row, place in ((0, 63), (69, 0), (33, 64))[: 1 if INTERPRETED else 3]:
            assert torch.equal(run(x[row : row + 1], every[row : row + 1])[0], whole[row])
            garbage = torch.full_like(x, NAN)
            garbage[place] = x[row]
            moved = every.clone()
            moved[place] = row
            assert torch.equal(run(garbage, moved)[place], whole[row])


@pytest.mark.parametrize("dtype", DTYPES, ids=named)
def test_rows_are_independent(dtype, op_backend, monkeypatch, seed):
    monkeypatch.setenv("XSPEC_EXACT", "1")
    cut(monkeypatch, split_k=3)
    check_rows_are_independent(op_backend, dtype)


@pytest.mark.skipif(INTERPRETED, reason="about torch's own product")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("N", "K"), [(958, 576), (66, 1536)])
def test_exact_mode_at_any_thread_count(threads, N, K, monkeypatch, seed):
    monkeypatch.setenv("XSPEC_EXACT", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check_rows_are_independent(OpBackend("torch", "cpu"), torch.float32, N, K)
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(INTERPRETED, reason="about torch's own product")
def test_exact_mode_always_multiplies_64_rows(monkeypatch, seed):
    calls = []
    linear = torch.nn.functional.linear
    monkeypatch.setattr(_product.F, "linear", lambda *a: calls.append(len(a[0])) or linear(*a))
    x, w = operands(130, 32, 64, torch.float32)
    skinny_linear(x[:3], w, backend="torch")
    assert calls == [3]
    monkeypatch.setenv("XSPEC_EXACT", "1")
    skinny_linear(x, w, backend="torch")
    assert calls == [3, 64, 64, 64]


def test_exact_mode_is_read_at_call_time(monkeypatch):
    for value, expected in ((None, False), ("", False), ("0", False), ("1", True)):
        monkeypatch.delenv("XSPEC_EXACT", raising=False)
        if value is not None:
            monkeypatch.setenv("XSPEC_EXACT", value)
        assert _dispatch.exact() is expected
    monkeypatch.setenv("XSPEC_EXACT", "yes")
    with pytest.raises(ValueError, match="XSPEC_EXACT is 'yes', expected 0 or 1"):
        _dispatch.exact()


def check_arrival_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits whichever split comes last."""
    x, w = operands(22, 32, 448, torch.float32)
    want = skinny_linear(x, w, backend="triton")
    for order in itertools.permutations(range(3)):
        arrive(monkeypatch, list(order))
        assert torch.equal(skinny_linear(x, w, backend="triton"), want), order


def check_against_oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two launches on one workspace, K not a multiple of the split."""
    x, w = operands(22, 34, 448, torch.float32)
    workspace = Workspace("cpu")
    for _ in range(2):
        y = skinny_linear(x, w, workspace=workspace, backend="triton")
        assert ((y.double() - oracle(x, w)).abs() < 1e-5).all()


def check_norm_against_oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a layer uses it: 40 of 66 rows, a maker with 70 columns in tiles of 32."""
    backend, workspace = OpBackend("triton", "cpu"), Workspace("cpu")
    check(66, 34, 448, torch.float32, "none", backend, 40, workspace, parts=5)
    x, w = operands(66, 70, 64, torch.bfloat16)
    x[3] = torch.inf
    y, squares = skinny_linear(x, w, int32([40]), with_squares=True, backend="triton")
    want = torch.stack([piece.double().square().sum(1) for piece in y[:40].split(32, 1)])
    same = (squares[:, :40] - want).abs() <= 4e-6 * want
    assert (same | ~want.isfinite()).all()
    # Zeros of W behind its last row, times infinity, are no part of the row.
    inf = x[:4].nan_to_num(posinf=torch.inf)
    padded = torch.ones(33, 64, dtype=torch.bfloat16)
    assert skinny_linear(inf, padded, with_squares=True, backend="triton")[1][1, 3] == torch.inf


MUTANTS = {
    "sums in order of arrival": (
        check_arrival_order, "leave_partial", "* SPLIT_K + split",
        "* SPLIT_K + tl.load(semaphore + block * TILES + tile)",
    ),
    "drops the end of K": (
        check_against_oracle, "tile_product", "(split + 1) * STEPS // SPLIT_K",
        "split * STEPS // SPLIT_K + STEPS // SPLIT_K",
    ),
    "leaves the semaphore up": (
        check_against_oracle, "sum_partials", "tl.store(semaphore + block * TILES + tile, 0)",
        "pass",
    ),
    "normalizes with the first weights only": (
        check_norm_against_oracle, "tile_product", "factor = following", "pass",
    ),
    "takes the rows that count for all rows": (
        check_norm_against_oracle, "row_scale", "part[:, None] * M", "part[:, None] * rows",
    ),
    "leaves out the last part": (
        check_norm_against_oracle, "row_scale", "(part < PARTS)", "(part < PARTS - 1)",
    ),
    "squares before rounding": (
        check_norm_against_oracle, "finish",
        "total = narrow(total, y.dtype.element_ty, INTERPRETED)\n    tl.store(y + at, total,",
        "tl.store(y + at, narrow(total, y.dtype.element_ty, INTERPRETED),",
    ),
    "squares of columns that are not there": (
        check_norm_against_oracle, "finish", "row_squares(total, inside)",
        "row_squares(total, (m < rows)[:, None])",
    ),
    "sums one split too few": (
        check_against_oracle, "sum_partials", "tl.range(1, SPLIT_K,", "tl.range(2, SPLIT_K,",
    ),
}  # fmt: skip


@pytest.mark.interpreter
@pytest.mark.parametrize(
    "run", [check_arrival_order, check_against_oracle, check_norm_against_oracle]
)
def test_splits_in_the_interpreter(run, monkeypatch, seed):
    cut(monkeypatch, split_k=3)
    run(monkeypatch)


@pytest.mark.interpreter
@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_rejected(name, monkeypatch, tmp_path, seed):
    run, function, old, new = MUTANTS[name]
    cut(monkeypatch, split_k=3)
    plant(monkeypatch, function, old, new, tmp_path)
    assert rejected(lambda: run(monkeypatch))


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=named)
def test_interpreted_rounding_is_to_nearest(dtype, monkeypatch, seed):
    """The interpreter alone would truncate to bfloat16."""
    cut(monkeypatch, split_k=1)
    x, w = torch.zeros(64, 64, dtype=dtype), torch.zeros(32, 64, dtype=dtype)
    x[:, 0], x[:, 1] = 1, torch.arange(64)
    w[:, 0], w[:, 1] = 1, HALF_ULP[dtype] / 2
    exact = x.float() @ w.float().T
    assert torch.equal(skinny_linear(x, w, backend="triton"), exact.to(dtype))


def test_interleave_gate():
    gate, up = torch.arange(6.0).view(3, 2), torch.arange(6.0, 12).view(3, 2)
    mixed = interleave_gate(gate, up)
    assert torch.equal(mixed[0::2], gate) and torch.equal(mixed[1::2], up)
    assert mixed.is_contiguous()
    assert interleave_gate(gate[:, 0], up[:, 0]).tolist() == [0, 6, 2, 8, 4, 10]
    with pytest.raises(ValueError, match=r"\[3, 2\] and \[2, 2\] differ"):
        interleave_gate(gate, up[:2])
    for other in (up.double(), up.to("meta")):
        with pytest.raises(ValueError, match=r"torch\.float32 on cpu and .* differ"):
            interleave_gate(gate, other)


X, W = torch.zeros(3, 64), torch.zeros(6, 64)


@pytest.mark.parametrize(
    ("x", "w", "options", "message"),
    [
        (X[0], W, {}, r"x has shape \[64\]"),
        (X[:0], W, {}, r"x has shape \[0, 64\]"),
        (X, W[:0], {}, r"w \[0, 64\]"),
        (X, torch.zeros(6, 128), {}, r"w \[6, 128\]"),
        (X[:, :63], W[:, :63], {}, "K is 63, expected a multiple of 64"),
        (X.double(), W.double(), {}, "x is torch.float64, expected torch.float32 or"),
        (X, W.half(), {}, "w is torch.float16, expected torch.float32"),
        (torch.zeros(64, 3).T, W, {}, "x must be contiguous"),
        (X, torch.zeros(64, 6).T, {}, "w must be contiguous"),
        (X, W, {"num_rows": torch.zeros(1)}, "num_rows is torch.float32"),
        (X, W, {"num_rows": int32([1, 2])}, r"num_rows has shape \[2\]"),
        (X, W, {"bias": torch.zeros(5)}, r"bias has shape \[5\], expected \[6\]"),
        (X, W, {"bias": torch.zeros(6).half()}, "bias is torch.float16"),
        (X, W, {"residual": torch.zeros(3, 5)}, r"residual has shape \[3, 5\], expected \[3, 6\]"),
        (X, W[:5], {"gate": True}, "even N and no residual, got N 5"),
        (X, W, {"gate": True, "residual": torch.zeros(3, 6)}, "no residual"),
        (X, W, {"norm": RowNorm(X[0, :5], EPS)}, r"norm.weight has shape \[5\], expected \[64\]"),
        (X, W, {"norm": RowNorm(X[0].half(), EPS)}, "norm.weight is torch.float16"),
        (X, W, {"norm": RowNorm(X[0], -EPS)}, "eps is -1e-05, expected a number >= 0"),
        (X, W, {"norm": RowNorm(X[0], EPS, X[0])}, r"squares has shape \[64\], expected \[T, 3\]"),
        (X, W, {"norm": RowNorm(X[0], EPS, X)}, r"squares has shape \[3, 64\], expected \[3, 3\]"),
        (X, W, {"norm": RowNorm(X[0], EPS, X[:, :3].half())}, "squares is torch.float16"),
        (X, W, {"backend": "fast"}, "'fast', expected one of"),
    ],
)  # fmt: skip
def test_bad_arguments(x, w, options, message):
    with pytest.raises(ValueError, match=message):
        skinny_linear(x, w, **options)


@pytest.mark.interpreter
def test_kernel_wants_aligned_operands():
    shifted = torch.zeros(3 * 64 + 1)[1:].view(3, 64)
    for x, w, options, name in (
        (shifted, W, {}, "x"),
        (X, shifted, {}, "w"),
        (X, X, {"residual": torch.zeros(10)[1:].view(3, 3)}, "residual"),
        (X, X, {"norm": RowNorm(torch.zeros(65)[1:], EPS)}, "norm.weight"),
    ):
        with pytest.raises(ValueError, match=f"{name} starts at .*, expected 16-byte steps"):
            skinny_linear(x, w, backend="triton", **options)


def test_backends_that_are_missing():
    with pytest.raises(RuntimeError, match="there is no cuda kernel for this op"):
        skinny_linear(X, W, backend="cuda")


@pytest.mark.parametrize("scratch", [[], [torch.zeros(1), torch.zeros(1, dtype=torch.int32)]])
@pytest.mark.parametrize("gate", [False, True])
def test_opcheck(scratch, gate, seed):
    x, w = operands(3, 6, 64, torch.float32)
    residual = None if gate else torch.ones(3, 6)
    norm = (torch.ones(64), EPS, torch.ones(2, 3), torch.ones(1, 3))
    given = (int32([2]), torch.ones(6), residual, gate, *norm, scratch, "auto")
    torch.library.opcheck(torch.ops.xspec.skinny_linear, (x, w, *given))


class TestWorkspace:
    def test_buffers_grow_and_keep_what_graphs_may_hold(self):
        workspace = Workspace("cpu")
        first = workspace.buffer("a", (4, 5), torch.float32)
        assert first.shape == (4, 5) and workspace.nbytes == 80
        assert workspace.buffer("a", (3,), torch.float32).data_ptr() == first.data_ptr()
        second = workspace.buffer("a", (21,), torch.float32)
        assert second.data_ptr() != first.data_ptr()
        assert workspace.nbytes == 80 + 160
        assert workspace.buffer("a", (40,), torch.float32).data_ptr() == second.data_ptr()
        assert workspace.buffer("b", (1,), torch.float32).data_ptr() != second.data_ptr()

    def test_semaphores_start_at_zero_and_can_be_reset(self):
        workspace = Workspace("cpu")
        assert workspace.semaphores("s", 3).tolist() == [0, 0, 0]
        workspace.semaphores("s", 3).fill_(7)
        assert workspace.semaphores("s", 9).tolist() == [0] * 9
        workspace.semaphores("s", 9).fill_(7)
        workspace.reset()
        assert not workspace.semaphores("s", 9).any()

    def test_one_name_has_one_dtype(self):
        workspace = Workspace("cpu")
        workspace.buffer("a", (4,), torch.float32)
        with pytest.raises(ValueError, match=r"'a' is torch.float32, .* as torch.int32"):
            workspace.buffer("a", (4,), torch.int32)

    def test_no_growth_inside_a_graph(self, monkeypatch):
        workspace = Workspace("cpu")
        held = workspace.buffer("a", (4,), torch.float32)
        workspace.device = torch.device("cuda")
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert workspace.buffer("a", (4,), torch.float32).data_ptr() == held.data_ptr()
        with pytest.raises(RuntimeError, match="'a' needs 5 elements and has 4; run the op once"):
            workspace.buffer("a", (5,), torch.float32)


CARDS = [tiles.INTERPRETER, 80, 86, 89, 90, 100, 120]


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=named)
def test_tiles_can_cut_every_shape(card, dtype):
    for N, K in itertools.product((1, 33, 576, 4096, 22016, 49152, 151936), (64, 576, 4096, 14336)):
        tile = tiles.tile_of(N, K, dtype, card)
        assert tile.block_n & (tile.block_n - 1) == 0 and K % tile.block_k == 0
        assert 1 <= tile.split_k <= K // tile.block_k
        assert not tile.tma or (card == 90 and dtype != torch.float32)


def test_config_hash_names_the_card():
    hashes = {tiles.config_hash(card) for card in CARDS}
    assert len(hashes) == len(CARDS)
    assert all(len(value) == 12 and int(value, 16) >= 0 for value in hashes)
    assert tiles.config_hash(90) == tiles.config_hash(90)


@pytest.mark.parametrize("file", ["tiles.py", "_tree_attention_triton.py"])
def test_config_hash_follows_every_constant(file, monkeypatch):
    before, read = tiles.config_hash(90), Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read(path) + b"#" * (path.name == file))
    assert tiles.config_hash(90) != before


def test_early_launch_can_be_switched_off(monkeypatch):
    monkeypatch.delenv("XSPEC_PDL", raising=False)
    assert [tiles.early_launch(card) for card in (0, 89, 90)] == [False, False, True]
    monkeypatch.setenv("XSPEC_PDL", "0")
    assert not tiles.early_launch(90)
