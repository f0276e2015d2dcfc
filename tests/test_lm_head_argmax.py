from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import INTERPRETED, OpBackend
from linear_cases import DTYPES, arrive, cut, operands, plant, rejected
from op_cases import int32
from xspec_kernels.kernels.lm_head_argmax import NEAR_TIE, NOT_A_NUMBER, lm_head_argmax
from xspec_kernels.workspace import Workspace

pytestmark = pytest.mark.usefixtures("poisoned")
NAN, INF = float("nan"), float("inf")
ROUND_TO = [None, *DTYPES]


def named(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


def rows_of(logits: list[list[float]], dtype=torch.float32, device: str = "cpu"):
    """x and w whose product is exactly these logits, as far as `dtype` holds them.

    Each logit of up to two parts that `dtype` holds: x selects a row's two columns of w.
    """
    want = torch.tensor(logits)
    M, N = want.shape
    high = want.to(dtype)
    low = torch.where(want.isfinite(), want - high.float(), 0).to(dtype)
    x, w = torch.zeros(M, 64, dtype=dtype), torch.zeros(N, 64, dtype=dtype)
    assert 2 * M <= 64
    for row in range(M):
        x[row, 2 * row : 2 * row + 2] = 1
        w[:, 2 * row], w[:, 2 * row + 1] = high[row], low[row]
    return x.to(device), w.to(device)


def run(logits, op_backend, round_to=None, dtype=torch.float32):
    """(ids, flags, best) of a list of finite rows, as lists."""
    x, w = rows_of(logits, dtype, op_backend.device)
    got = lm_head_argmax(x, w, round_to=round_to, backend=op_backend.name)
    return tuple(tensor.tolist() for tensor in got)


def oracle(logits: torch.Tensor, round_to: torch.dtype | None):
    """(ids, flags, best) of [M, N] float32 logits, one row and one comparison at a time."""
    dtype = round_to or torch.float32
    result = []
    for row in logits.to(dtype).float().tolist():
        if any(value != value for value in row):
            result.append((-1, NOT_A_NUMBER, NAN))
            continue
        best = max(row)
        index = row.index(best)
        second = max([*row[:index], *row[index + 1 :]], default=-INF)
        ulp = torch.finfo(dtype).eps * 2.0 ** (torch.frexp(torch.tensor(best)).exponent.item() - 1)
        near = best == second or best - second <= 2 * ulp
        result.append((index, NEAR_TIE if near else 0, best))
    return result


@pytest.mark.parametrize("dtype", DTYPES, ids=named)
@pytest.mark.parametrize("round_to", ROUND_TO, ids=named)
def test_random_logits(dtype, round_to, op_backend, monkeypatch, rng):
    cut(monkeypatch, split_k=rng.choice([1, 2]))
    workspace = Workspace(op_backend.device)
    for M, N in ((1, 1), (rng.choice([2, 22, 33]), 33), (70, 97)):
        # Small integers: every sum is exact, ties are common, and float64 is the oracle.
        x = torch.randint(-3, 4, (M, 128)).to(op_backend.device, dtype)
        w = torch.randint(-2, 3, (N, 128)).to(op_backend.device, dtype) / 8
        rows = rng.choice([M, (M + 1) // 2])
        x[rows:] = NAN
        count = None if rows == M else int32([rows], op_backend.device)
        got = lm_head_argmax(
            x, w, count, round_to=round_to, workspace=workspace, backend=op_backend.name
        )
        want = oracle((x.double() @ w.double().T)[:rows].float(), round_to)
        assert list(zip(*(part[:rows].tolist() for part in got), strict=True)) == want
        assert [part.dtype for part in got] == [torch.int64, torch.int32, torch.float32]
        if op_backend.name == "triton":
            assert got.best[rows:].isnan().all() and (got.flags[rows:] < 0).all()
            assert not workspace.semaphores("linear.semaphore", 8).any()


@given(data=st.data())
def test_any_shape(data, op_backend, seed):
    draw = data.draw
    M, N, K = draw(st.integers(1, 70)), draw(st.integers(1, 130)), 64 * draw(st.integers(1, 4))
    round_to, dtype = draw(st.sampled_from(ROUND_TO)), draw(st.sampled_from(DTYPES))
    x = torch.randint(-3, 4, (M, K)).to(op_backend.device, dtype)
    w = torch.randint(-1, 2, (N, K)).to(op_backend.device, dtype)
    x[draw(st.integers(0, M - 1)), draw(st.integers(0, K - 1))] = draw(st.sampled_from([1, NAN]))
    with pytest.MonkeyPatch.context() as patch:
        tma = draw(st.booleans()) and INTERPRETED
        cut(patch, draw(st.sampled_from([16, 32])), draw(st.integers(1, K // 64)), tma)
        got = lm_head_argmax(x, w, round_to=round_to, backend=op_backend.name)
    want = oracle((x.double() @ w.double().T).float(), round_to)
    assert repr(list(zip(*(part.tolist() for part in got), strict=True))) == repr(want)


def check_ties(op_backend) -> None:
    """The lowest index wins, within a tile of 32 and across tiles."""
    for first, second in ((3, 9), (3, 40), (31, 32), (64, 65), (0, 69)):
        row = [-1.0] * 70
        row[first] = row[second] = 2.0
        assert run([row], op_backend) == ([first], [NEAR_TIE], [2.0]), (first, second)
    assert run([[-1.0] * 70], op_backend)[0] == [0]


def check_second(op_backend) -> None:
    """A runner-up is found in the winner's tile and in others, at 2 ulp and not at 3."""
    ulp = 2.0**-23
    for winner, other in ((3, 9), (9, 3), (3, 40), (40, 3)):
        for distance, flag in ((1, NEAR_TIE), (2, NEAR_TIE), (3, 0)):
            row = [0.0] * 70
            row[winner], row[other] = 1.5, 1.5 - distance * ulp
            assert run([row], op_backend) == ([winner], [flag], [1.5]), (winner, other, distance)


def test_ties(op_backend, monkeypatch):
    cut(monkeypatch, split_k=1)
    check_ties(op_backend)


def test_second(op_backend, monkeypatch):
    cut(monkeypatch, split_k=1)
    check_second(op_backend)


def test_rounding_decides_which_values_are_equal(op_backend, monkeypatch):
    cut(monkeypatch, split_k=1)
    row = [0.0] * 40
    row[5], row[35] = 1.0, 1.0 + 2.0**-10
    assert run([row], op_backend) == ([35], [0], [1.0 + 2.0**-10])
    assert run([row], op_backend, torch.float32) == run([row], op_backend)
    assert run([row], op_backend, torch.float16) == ([35], [NEAR_TIE], [1.0 + 2.0**-10])
    assert run([row], op_backend, torch.bfloat16) == ([5], [NEAR_TIE], [1.0])
    row[35] = 1.0 + 2.0**-7
    assert run([row], op_backend, torch.bfloat16) == ([35], [NEAR_TIE], [1.0 + 2.0**-7])
    row[35] = 1.0 + 3 * 2.0**-7
    assert run([row], op_backend, torch.bfloat16) == ([35], [0], [1.0 + 3 * 2.0**-7])


def test_half_precision_weights_are_compared_in_float32(op_backend, monkeypatch):
    cut(monkeypatch, split_k=1)
    row = [0.0] * 40
    row[5], row[35] = 1.0, 1.0 + 2.0**-12
    got = run([row], op_backend, None, torch.bfloat16)
    assert got == ([35], [0], [1.0 + 2.0**-12])
    assert run([row], op_backend, torch.bfloat16, torch.bfloat16) == ([5], [NEAR_TIE], [1.0])


def test_nan_and_infinity(op_backend, monkeypatch):
    cut(monkeypatch, split_k=2)
    x, w = torch.zeros(5, 128), torch.zeros(70, 128)
    w[:, 0] = torch.arange(1, 71)
    w[66, 100] = 2.0**127
    x[:, 0] = torch.tensor([1.0, NAN, -1.0, INF, -INF])
    x[0, 100] = 2
    got = lm_head_argmax(x.to(op_backend.device), w.to(op_backend.device), backend=op_backend.name)
    assert got.ids.tolist() == [66, -1, 0, 0, 0]
    assert got.flags.tolist() == [0, NOT_A_NUMBER, 0, NEAR_TIE, NEAR_TIE]
    assert repr(got.best.tolist()) == repr([INF, NAN, -1.0, INF, -INF])


def test_nan_anywhere_in_a_row_marks_it(op_backend, monkeypatch):
    cut(monkeypatch, split_k=1)
    for column in (0, 31, 32, 69):
        x, w = torch.ones(2, 64), torch.ones(70, 64)
        w[column, 5] = NAN
        got = lm_head_argmax(
            x.to(op_backend.device), w.to(op_backend.device), backend=op_backend.name
        )
        assert got.ids.tolist() == [-1, -1] and got.flags.tolist() == [NOT_A_NUMBER] * 2


@pytest.mark.parametrize("dtype", DTYPES, ids=named)
def test_rows_are_independent(dtype, op_backend, monkeypatch, seed):
    monkeypatch.setenv("XSPEC_EXACT", "1")
    cut(monkeypatch, split_k=3)
    x, w = operands(70, 70, 256, dtype, op_backend.device)

    def best(rows):
        return lm_head_argmax(rows.contiguous(), w, backend=op_backend.name).best

    whole = best(x)
    for rows in (1, 16, 17, 64):
        assert torch.equal(best(x[:rows]), whole[:rows])
    order = torch.randperm(70, device=op_backend.device)
    assert torch.equal(best(x[order]), whole[order])
    garbage = torch.full_like(x, NAN)
    garbage[63] = x[5]
    assert torch.equal(best(garbage)[63], whole[5])


def check_arrival(monkeypatch) -> None:
    """Three splits of K in two orders give the same bits."""
    x, w = operands(5, 70, 448, torch.float32)
    want = lm_head_argmax(x, w, backend="triton")
    arrive(monkeypatch, [2, 0, 1])
    assert torch.equal(lm_head_argmax(x, w, backend="triton").best, want.best)


MUTANTS = {
    "highest index of a tile": (
        check_ties, "_lm_head_tiles_kernel",
        "tl.min(tl.where((logits == best[:, None]) & (n < N), n, N), 1)",
        "tl.max(tl.where((logits == best[:, None]) & (n < N), n, 0), 1)",
    ),
    "highest tile": (
        check_ties, "join_tiles", "tl.min(tl.where(bests == best, indices, 2147483647), 0)",
        "tl.max(tl.where(bests == best, indices, 0), 0)",
    ),
    "runner-up of the winner's tile forgotten": (
        check_second, "join_tiles", "tl.where(indices == index, seconds, bests)",
        'tl.where(indices == index, float("-inf"), bests)',
    ),
    "runner-up of other tiles forgotten": (
        check_second, "join_tiles", "tl.where(indices == index, seconds, bests)", "seconds",
    ),
    "columns past the vocabulary": (
        check_ties, "_lm_head_tiles_kernel", "tl.where((n < N) & (logits == logits),",
        "tl.where((logits == logits),",
    ),
}  # fmt: skip


@pytest.mark.interpreter
@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_rejected(name, monkeypatch, tmp_path):
    run_check, function, old, new = MUTANTS[name]
    cut(monkeypatch, split_k=1)
    plant(monkeypatch, function, old, new, tmp_path)
    assert rejected(lambda: run_check(OpBackend("triton", "cpu")))


@pytest.mark.interpreter
def test_arrival_order(monkeypatch, seed):
    cut(monkeypatch, split_k=3)
    check_arrival(monkeypatch)


X, W = torch.zeros(3, 64), torch.zeros(6, 64)


@pytest.mark.parametrize(
    ("x", "w", "options", "message"),
    [
        (X, torch.zeros(6, 128), {}, r"lm_head_argmax: x has shape \[3, 64\] and w \[6, 128\]"),
        (X, W.half(), {}, "w is torch.float16"),
        (X[:, :32], W[:, :32], {}, "K is 32, expected a multiple of 64"),
        (X, W, {"round_to": torch.int8}, "round_to is torch.int8, expected None, torch.float32"),
        (X, W, {"num_rows": int32([[1]])}, r"num_rows has shape \[1, 1\]"),
        (X, W, {"backend": "fast"}, "'fast', expected one of"),
    ],
)  # fmt: skip
def test_bad_arguments(x, w, options, message):
    with pytest.raises(ValueError, match=message):
        lm_head_argmax(x, w, **options)


@pytest.mark.parametrize("round_to", [None, torch.bfloat16])
def test_opcheck(round_to, seed):
    x, w = operands(3, 6, 64, torch.float32)
    torch.library.opcheck(
        torch.ops.xspec.lm_head_argmax, (x, w, int32([2]), None, round_to, [], "auto")
    )
