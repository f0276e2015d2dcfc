"""Products with many rows: the kernel that dequantizes, the buffer's bound, the choice by rows."""

from __future__ import annotations

import pytest
import torch

from conftest import INTERPRETED
from machine_code import facts, specialized
from xspec_kernels import Workspace, nf4, nf4_prefill
from xspec_kernels.nf4_prefill import by_parts, dequantize_into, prefill_linear

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("dtype", nf4.DTYPES, ids=str)
@pytest.mark.parametrize("double", [False, True])
def test_dequantized_parts_have_the_bits_of_the_format(dtype, double, op_backend, seed):
    """Every byte under many scales; sizes that are no multiple of a program's."""
    if op_backend.name == "cuda":
        pytest.skip("no CUDA C++ kernel")
    backend = "triton" if op_backend.name == "triton" else "torch"
    for rows, width in ((2, 64), (7, 576), (64, 512)):
        w = nf4.quantize(
            torch.exp(2 * torch.randn(rows, 1)) * torch.randn(rows, width), double=double
        )
        w = nf4.NF4Weight(torch.randint_like(w.packed, 256), w.scales, w.dtype, w.nested)
        w = w.to(op_backend.device)
        out = torch.empty(rows, width, dtype=dtype, device=op_backend.device)
        dequantize_into(out, w.packed, nf4.absmax(w), backend)
        assert torch.equal(out.view(torch.uint8), nf4.dequantize(w, dtype).view(torch.uint8))


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("rows", [1, 65, 300])
def test_parts_give_the_whole_product(rows, biased, op_backend, monkeypatch, seed):
    if op_backend.name == "cuda":
        pytest.skip("no CUDA C++ kernel")
    device = op_backend.device
    backend = "triton" if op_backend.name == "triton" else "torch"
    monkeypatch.setitem(nf4_prefill.BUFFER_BYTES, torch.device(device).type, 22 * 128 * 4)
    w, x = nf4.quantize(torch.randn(66, 128)).to(device), torch.randn(rows, 128, device=device)
    bias = torch.randn(66, device=device) if biased else None
    workspace = Workspace(device)
    y = by_parts(x, w, bias, workspace=workspace, backend=backend)
    want = x.double() @ nf4.dequantize(w, torch.float32).double().T + (0 if bias is None else bias)
    assert y.shape == (rows, 66) and (y - want).abs().max() < 1e-4
    assert workspace.nbytes == 22 * 128 * 4, "the buffer, and no more"
    again = by_parts(x, w, bias, workspace=workspace, backend=backend)
    assert torch.equal(again, y) and workspace.nbytes == 22 * 128 * 4


@pytest.mark.skipif(INTERPRETED, reason="about the choice")
def test_the_number_of_rows_chooses(monkeypatch, seed):
    w, calls = nf4.quantize(torch.randn(8, 64)), []
    fused, parts = nf4_prefill.nf4_linear, nf4_prefill.by_parts
    monkeypatch.setattr(
        nf4_prefill, "nf4_linear", lambda *a, **k: calls.append("fused") or fused(*a, **k)
    )
    monkeypatch.setattr(
        nf4_prefill, "by_parts", lambda *a, **k: calls.append("parts") or parts(*a, **k)
    )
    monkeypatch.setitem(nf4_prefill.FUSED_ROWS, "torch", 4)
    found = [prefill_linear(torch.ones(rows, 64), w) for rows in (4, 5)]
    assert calls == ["fused", "parts"]
    assert torch.allclose(found[0], found[1][:4], atol=1e-5)
    dense = prefill_linear(torch.ones(9, 64), w.with_dense(torch.float32))
    assert len(calls) == 2 and torch.allclose(dense[:5], found[1], atol=1e-5)
    half = prefill_linear(torch.ones(9, 64).half(), w.with_dense(torch.float32))
    assert calls[2:] == ["parts"] and half.dtype == torch.float16
    with pytest.raises(ValueError, match=r"x has shape \[64\], expected \[M, 64\]"):
        prefill_linear(torch.ones(64), w)


@pytest.mark.skipif(INTERPRETED, reason="compiles")
@pytest.mark.parametrize("cc", [80, 90])
def test_machine_code(cc):
    """No spills; whole words are stored; the weights are stored in 16-byte pieces."""
    pytest.importorskip("triton")
    x = torch.empty(0, dtype=torch.bfloat16)
    given = {
        "packed": x.to(torch.uint8), "scales": x.float(), "code": x.float(), "out": x,
        "count": 4096, "SIZE": nf4_prefill._BYTES, "INTERPRETED": False,
    }  # fmt: skip
    found = facts(specialized(nf4_prefill._dequantize_kernel, cc, given, num_warps=4)[1]())
    assert found.spilled == 0 and found.wide("STG")
    print(f"sm_{cc}: {sum(found.operations.values()) / 16:.1f} instructions a weight")
