from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from conftest import INTERPRETED
from linear_cases import DTYPES, EPILOGUES, EPS, epilogue, flips, oracle, row_norm
from op_cases import int32
from xspec_kernels import nf4
from xspec_kernels.kernels import _product
from xspec_kernels.kernels import nf4_linear as module
from xspec_kernels.kernels._nf4_linear_triton import lookup_source, table_source
from xspec_kernels.kernels._row_norm import RowNorm
from xspec_kernels.kernels.nf4_linear import nf4_linear
from xspec_kernels.kernels.norm_act import norm_act
from xspec_kernels.nf4 import NF4Weight
from xspec_kernels.tiles import Tile
from xspec_kernels.workspace import Workspace

pytestmark = pytest.mark.usefixtures("poisoned")
NAN = float("nan")
HALF_ULP = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def named(value: object) -> str:
    return str(value).removeprefix("torch.")


def cut(monkeypatch: pytest.MonkeyPatch, block_n: int = 32, split_k: int = 3) -> None:
    """Use this tile, whatever the shape."""
    monkeypatch.setattr(module, "nf4_tile_of", lambda *_: Tile(block_n, 64, split_k, 4, 1))


def operands(M: int, N: int, K: int, dtype: torch.dtype, device: str, kind: str = "double"):
    """x [M, K] and a weight whose products are of about unit size."""
    shape = (N // 2, K) if kind == "gate" else (N, K)
    draws = [torch.randn(shape) / K**0.5 for _ in range(2 if kind == "gate" else 1)]
    weights = [nf4.quantize(draw, double=kind != "plain") for draw in draws]
    w = nf4.interleave(*weights) if kind == "gate" else weights[0]
    return torch.randn(M, K).to(device, dtype), w.to(device)


def check(M, N, K, dtype, name, op_backend, num_rows=None, kind="double", workspace=None):
    """One product against float64, with NaN in every row that does not count."""
    device, rows = op_backend.device, M if num_rows is None else num_rows
    x, w = operands(M, N, K, dtype, device, "gate" if "gate" in name else kind)
    x[rows:] = NAN
    given = epilogue(name, M, N, dtype, device)
    count = None if num_rows is None else int32([num_rows], device)
    y = nf4_linear(x, w, count, workspace=workspace, backend=op_backend.name, **given)
    want = oracle(x, nf4.dequantize(w, dtype), **given)
    assert y.dtype == dtype and y.shape == want.shape
    roundings = 1 if op_backend.name == "triton" else 4
    error, size = (y.double() - want)[:rows].abs(), want[:rows].abs()
    allowed = (size + (0 if roundings == 1 else 4)) * HALF_ULP[dtype] * roundings * 1.01 + 1e-5
    assert (error <= allowed).all(), error.max()
    if op_backend.name == "triton":
        assert y[rows:].isnan().all(), "rows that do not count are not written"


@pytest.mark.parametrize("dtype", DTYPES, ids=named)
@pytest.mark.parametrize("name", EPILOGUES)
@pytest.mark.parametrize("split_k", [1, 3])
def test_epilogues_and_splits(dtype, name, split_k, op_backend, monkeypatch, rng):
    if op_backend.name == "cuda":
        pytest.skip("no CUDA C++ kernel")
    cut(monkeypatch, split_k=split_k)
    M, N, K = rng.choice([1, 16, 22, 63, 65]), rng.choice([2, 32, 34, 62]), 64 * rng.choice([3, 7])
    workspace, kind = Workspace(op_backend.device), rng.choice(["double", "plain"])
    for num_rows in (None, (M + 1) // 2):
        check(M, N, K, dtype, name, op_backend, num_rows, kind, workspace)
        assert not workspace.semaphores("linear.semaphore", 8).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=named)
@pytest.mark.parametrize("parts", [None, 3])
@pytest.mark.parametrize("gate", [False, True], ids=["plain", "gate"])
def test_norm_and_squares(gate, parts, dtype, op_backend, monkeypatch, rng):
    """The composition for torch; for the kernel within its own rounding of that."""
    if op_backend.name == "cuda":
        pytest.skip("no CUDA C++ kernel")
    cut(monkeypatch, split_k=rng.choice([1, 3]))
    x, w = operands(22, 70, 192, dtype, op_backend.device, "gate" if gate else "double")
    norm, run = row_norm(x, parts), {"gate": gate, "backend": op_backend.name}
    normed = norm_act(x, norm.weight, EPS, backend="torch")
    y, squares = nf4_linear(x, w, int32([20], x.device), norm=norm, with_squares=True, **run)
    want = nf4_linear(normed, w, **run)
    if op_backend.name != "triton":
        assert torch.equal(y, want) and squares is None
        return
    change = flips(normed, nf4.dequantize(w, dtype))
    allowed = 8 * change.unflatten(1, (-1, 2)).sum(2) if gate else change
    allowed = allowed + 2.01 * HALF_ULP[dtype] * want.double().abs() + 1e-5
    assert ((y.double() - want.double()).abs() <= allowed)[:20].all()
    pieces = y[:20].double().split(16 if gate else 32, 1)
    sums = torch.stack([piece.square().sum(1) for piece in pieces])
    assert squares.shape == (3, 22) and squares[:, 20:].isnan().all()
    assert ((squares[:, :20] - sums).abs() <= 4e-6 * sums).all()


def check_rows_are_independent(op_backend, w: NF4Weight, counts, dtype=torch.float32) -> None:
    """Each row alone, among others and moved has the same bits, normalized or not."""
    x = torch.randn(64, w.shape[1]).to(op_backend.device, dtype)
    for norm in (None, row_norm(x, 3)):

        def run(rows, norm=norm):
            own = norm and norm._replace(squares=norm.squares[:, rows].contiguous())
            y, squares = nf4_linear(
                x[rows].contiguous(), w, norm=own, with_squares=True, backend=op_backend.name
            )
            return y if squares is None else torch.cat([y.float(), squares.T], 1)

        every = list(range(64))
        whole = run(every)
        for rows in counts:
            assert torch.equal(run(every[:rows]), whole[:rows]), rows
        for row in (0, 21, 63):
            assert torch.equal(run([row])[0], whole[row])
        order = torch.randperm(64).tolist()
        assert torch.equal(run(order), whole[order])


@pytest.mark.parametrize("dtype", DTYPES, ids=named)
def test_rows_are_independent(dtype, op_backend, monkeypatch, seed):
    if op_backend.name == "cuda":
        pytest.skip("no CUDA C++ kernel")
    monkeypatch.setenv("XSPEC_EXACT", "1")
    cut(monkeypatch, split_k=2)
    w = operands(1, 34, 256, dtype, op_backend.device)[1]
    counts = (1, 22) if INTERPRETED else range(1, 65)
    check_rows_are_independent(op_backend, w, counts, dtype)


@pytest.mark.skipif(INTERPRETED, reason="about torch's own product")
def test_pieces_dense_weights_and_the_whole_agree(op_backend, monkeypatch, seed):
    """Cut into many pieces, with dequantized weights kept or not: the same bits."""
    if op_backend.name not in ("torch", "auto"):
        pytest.skip("about the torch path")
    monkeypatch.setattr(nf4, "_PIECE", 20 * 192)
    x, w = operands(5, 66, 192, torch.float32, "cpu")
    assert len(nf4.pieces(w)) == 4
    given: dict[str, Any] = epilogue("bias+residual", 5, 66, torch.float32)
    pieces = nf4_linear(x, w, backend=op_backend.name, **given)
    assert torch.equal(pieces, nf4_linear(x, w.with_dense(), backend=op_backend.name, **given))
    half = nf4_linear(x.half(), w.with_dense(), backend=op_backend.name)
    assert torch.equal(half, nf4_linear(x.half(), w, backend=op_backend.name)), "another dtype"
    gate = operands(1, 66, 192, torch.float32, "cpu", "gate")[1]
    assert nf4_linear(x, gate, gate=True, backend=op_backend.name).shape == (5, 33)


@pytest.mark.skipif(INTERPRETED, reason="about torch's own product")
def test_without_exact_mode_the_promise_is_not_made(monkeypatch, seed):
    """What the tests above would miss if exact mode did nothing."""
    calls = []
    linear = torch.nn.functional.linear
    monkeypatch.setattr(_product.F, "linear", lambda *a: calls.append(len(a[0])) or linear(*a))
    x, w = operands(3, 32, 64, torch.float32, "cpu")
    nf4_linear(x, w, backend="torch")
    monkeypatch.setenv("XSPEC_EXACT", "1")
    nf4_linear(x, w, backend="torch")
    assert calls == [3, 64]


class Ptx:
    """The few PTX instructions of the kernel's two sources, on arrays of 32-bit words."""

    def __init__(self, **inputs: np.ndarray) -> None:
        self.words = {name.replace("r", "$"): value for name, value in inputs.items()}

    def read(self, name: str) -> np.ndarray:
        if name.startswith("0f"):
            return np.uint32(int(name[2:], 16))
        return np.uint32(int(name, 16 if "0x" in name else 10)) if name[0].isdigit() else (
            self.words[name]
        )  # fmt: skip

    def run(self, source: str) -> Ptx:
        for line in source.strip("{} ").replace("\n", " ").split(";"):
            line = line.strip()
            if not line or line.startswith(".reg"):
                continue
            opcode, rest = line.split(" ", 1)
            if opcode == "mov.b32":
                low, high, word = re.findall(r"[$\w]+", rest)
                self.words[low] = self.read(word) & np.uint32(0xFFFF)
                self.words[high] = self.read(word) >> np.uint32(16)
                continue
            to, *names = (part.strip() for part in rest.split(","))
            self.words[to] = self.step(opcode, *(self.read(name) for name in names))
        return self

    def step(self, opcode: str, *given: np.ndarray) -> np.ndarray:
        if opcode == "mul.rn.f32":
            a, b = (np.asarray(word, np.uint32).view(np.float32) for word in given)
            return (a * b).view(np.uint32)
        if opcode.startswith("cvt.rn."):
            kind = torch.bfloat16 if "bf16" in opcode else torch.float16
            high, low = (
                torch.from_numpy(word.view(np.float32).copy()).to(kind).view(torch.int16)
                .numpy().view(np.uint16).astype(np.uint32) for word in given
            )  # fmt: skip
            return high << np.uint32(16) | low
        if opcode == "prmt.b32":
            a, b, selector = (np.asarray(word, np.uint64) for word in given)
            both, out = a | b << np.uint64(32), np.uint64(0)
            for i in range(4):
                index = selector >> np.uint64(4 * i) & np.uint64(15)
                assert not (index & np.uint64(8)).any(), "would replicate a sign"
                out = out | (both >> index * np.uint64(8) & np.uint64(255)) << np.uint64(8 * i)
            return out.astype(np.uint32)
        operation = {"and.b32": np.bitwise_and, "or.b32": np.bitwise_or, "shr.b32": np.right_shift}
        return operation[opcode](*given)


@pytest.mark.skipif(INTERPRETED, reason="needs no interpreter")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=named)
def test_compiled_look_up_is_exact(dtype, seed):
    """The PTX, emulated: every byte value at every place in a word, under many scales."""
    scales = torch.cat([
        torch.exp(4 * torch.randn(500)), torch.tensor([0.0, 1.0, 1e-8, 6e-8, 1e-40, 65504, 1e38]),
    ])  # fmt: skip
    bytes_ = torch.randint(0, 256, (len(scales), 256, 4), dtype=torch.uint8)
    for place in range(4):
        bytes_[:, :, place] = bytes_[:, :, place] if place else torch.arange(256)
        bytes_[:, :, place] = torch.roll(torch.arange(256, dtype=torch.uint8), 64 * place)
    words = bytes_.numpy().view(np.uint32)[:, :, 0]
    bits = scales.numpy().view(np.uint32)[:, None]
    table = Ptx(r8=bits).run(table_source("f16x2" if dtype == torch.float16 else "bf16x2"))
    planes = {f"r{9 + i}": table.words[f"${i}"] for i in range(8)}
    found = Ptx(r8=words, **planes).run(lookup_source())
    got = np.stack([found.words[f"${i}"] for i in range(8)], 2).astype(np.uint16).view(np.int16)
    index = torch.stack([bytes_ >> 4, bytes_ & 15], 3).flatten(2).long()
    want = (torch.tensor(nf4.CODE)[index] * scales[:, None, None]).to(dtype).view(torch.int16)
    assert torch.equal(torch.from_numpy(got), want)


X = torch.zeros(3, 64)
W = nf4.quantize(torch.ones(6, 64))


@pytest.mark.parametrize(
    ("x", "w", "options", "message"),
    [
        (X[0], W, {}, r"x has shape \[64\]"),
        (X[:0], W, {}, r"x has shape \[0, 64\]"),
        (torch.zeros(3, 128), W, {}, r"x has K 128, w has shape \[6, 64\]"),
        (X.double(), W, {}, "x is torch.float64, expected torch.float32 or"),
        (torch.zeros(64, 3).T, W, {}, "x must be contiguous"),
        (X, replace(W, scales=W.scales.float()), {}, "w.scales is torch.float32"),
        (X, replace(W, scales=W.scales[:5]), {}, r"w.scales has shape \[5, 1\]"),
        (X, replace(W, packed=W.packed.int()), {}, "w.packed is torch.int32"),
        (X, replace(W, nested=W.nested._replace(parts=3)), {}, "3 parts"),
        (X, replace(W, nested=W.nested._replace(parts=2)), {}, r"\[2, 2\]"),
        (X, W, {"num_rows": torch.zeros(1)}, "num_rows is torch.float32"),
        (X, W, {"bias": torch.zeros(5)}, r"bias has shape \[5\], expected \[6\]"),
        (X, W, {"residual": torch.zeros(3, 5)}, r"residual has shape \[3, 5\], expected \[3, 6\]"),
        (X, W, {"gate": True, "residual": torch.zeros(3, 6)}, "no residual"),
        (X, W, {"norm": RowNorm(X[0, :5], EPS)}, r"norm.weight has shape \[5\], expected \[64\]"),
        (X, W, {"norm": RowNorm(X[0], EPS, X)}, r"squares has shape \[3, 64\], expected \[3, 3\]"),
        (X, W, {"backend": "fast"}, "'fast', expected one of"),
    ],
)  # fmt: skip
def test_bad_arguments(x, w, options, message):
    with pytest.raises(ValueError, match=message):
        nf4_linear(x, w, **options)


@pytest.mark.interpreter
def test_kernel_wants_aligned_operands():
    shifted = torch.zeros(3 * 64 + 1)[1:].view(3, 64)
    with pytest.raises(ValueError, match=r"x starts at .*, expected 16-byte steps"):
        nf4_linear(shifted, W, backend="triton")


def test_opcheck(seed):
    x, w = operands(3, 6, 64, torch.float32, "cpu")
    nested = [w.nested.code, w.nested.levels]
    given = (x, w.packed, w.scales, nested, 1, None, int32([2]), torch.ones(6), torch.ones(3, 6))
    norm = (torch.ones(64), EPS, torch.ones(2, 3), torch.ones(1, 3))
    torch.library.opcheck(torch.ops.xspec.nf4_linear, (*given, False, *norm, [], "auto"))
