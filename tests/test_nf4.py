from __future__ import annotations

import copy
import hashlib
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from torch import nn

from tiny import prompt, reference, tiny_llama
from xspec_kernels import nf4
from xspec_runtime.nf4_model import NF4Linear, quantize_model, replace_linear4bit

DATA = Path(__file__).parent / "data" / "nf4.safetensors"


@pytest.fixture
def saved() -> dict[str, torch.Tensor]:
    with safe_open(DATA, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("name", ["plain", "double"])
@pytest.mark.parametrize("dtype", nf4.DTYPES, ids=str)
def test_recorded_weights_have_bitsandbytes_bits(name, dtype, saved):
    with safe_open(DATA, framework="pt") as file:
        want = file.metadata()[f"{name} {dtype}"]
    w = nf4.from_tensors(saved, f"{name}.weight")
    assert w.dtype == torch.float16 and (w.nested is None) == (name == "plain")
    found = nf4.dequantize(w, dtype)
    assert hashlib.sha256(bits(found).numpy().tobytes()).hexdigest() == want


EXTREMES = [0.0, 1e-45, 1e-40, 6e-8, 1e-8, 1.0, 65504.0, 1e38, 3.4e38]


@pytest.mark.parametrize(("rows", "width"), [(1, 64), (33, 192), (40, 512), (6, 11008)])
@pytest.mark.parametrize("dtype", nf4.DTYPES, ids=str)
def test_dequantize_is_the_definition(rows, width, dtype, seed):
    """One weight at a time: every byte value under many scales, extreme ones among them."""
    blocks = rows * width // nf4.BLOCK
    order = torch.randperm(256 * -(-rows * width // 512))[: rows * width // 2] % 256
    packed = order.to(torch.uint8).view(rows, -1)
    scales = torch.exp(3 * torch.randn(blocks))
    for place, scale in zip(torch.randperm(blocks), EXTREMES, strict=False):
        scales[place] = scale
    w = nf4.NF4Weight(packed, scales.view(rows, -1), torch.float16)
    code = torch.tensor(nf4.CODE)
    halves = [code[(packed >> 4).long()], code[(packed & 15).long()]]
    values = torch.stack(halves, 2).flatten(1) * w.scales.repeat_interleave(nf4.BLOCK, 1)
    assert torch.equal(bits(nf4.dequantize(w, dtype)), bits(values.to(dtype)))


def test_every_byte_under_every_scale():
    """Eight blocks hold all 256 values; each row of them has another scale, from 1e-40 to 1e38."""
    packed = torch.arange(256, dtype=torch.uint8).repeat(2000, 1)
    scales = (torch.linspace(-40, 38, 2000).double() * math.log(10)).exp().float()[:, None]
    w = nf4.NF4Weight(packed, scales.repeat(1, 8), torch.float32)
    table = torch.tensor(nf4.CODE)[[[byte >> 4, byte & 15] for byte in range(256)]]
    want = table.flatten() * scales
    for dtype in nf4.DTYPES:
        assert torch.equal(bits(nf4.dequantize(w, dtype)), bits(want.to(dtype)))


def bitsandbytes():
    return pytest.importorskip("bitsandbytes", reason="bitsandbytes is the oracle").functional


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", nf4.DTYPES, ids=str)
def test_against_bitsandbytes(dtype, double, seed):
    """No weight differs; our own quantization gives its 4-bit codes, and 8-bit ones
    at least as near to the scales (its search on a CPU is approximate)."""
    library = bitsandbytes()
    for shape in ((4, 64), (64, 512), (96, 576), (33, 1088)):
        for size in (1e-8, 1e-3, 1.0, 300.0):
            weight = (torch.randn(shape) * size).to(dtype)
            weight[0] = 0
            packed, state = library.quantize_4bit(
                weight, blocksize=64, quant_type="nf4", compress_statistics=double
            )
            w = nf4.from_bitsandbytes(packed, state)
            assert torch.equal(
                bits(nf4.dequantize(w)), bits(library.dequantize_4bit(packed, state))
            )
            ours = nf4.quantize(weight, double=double)
            assert torch.equal(ours.packed, w.packed)
            if double:
                true = nf4.quantize(weight, double=False).scales
                mine, theirs = ((nf4.absmax(each) - true).abs() for each in (ours, w))
                assert (mine <= theirs + 1e-6 * true.max()).all()
                assert (ours.scales != w.scales).sum() <= 1 + 0.02 * true.numel()
                assert torch.equal(ours.nested.code, w.nested.code)
                assert torch.equal(ours.nested.levels, w.nested.levels)
            else:
                assert torch.equal(ours.scales, w.scales)


@pytest.mark.parametrize("double", [False, True])
def test_quantization_is_close_and_idempotent(double, seed):
    weight = torch.randn(70, 320)
    w = nf4.quantize(weight, double=double)
    error = (nf4.dequantize(w) - weight).abs().mean()
    assert 0.05 < error < 0.08, "about 0.07 for a normal distribution"
    again = nf4.quantize(nf4.dequantize(w), double=False)
    assert torch.equal(again.packed, w.packed)
    assert w.nbytes < 0.58 * weight.numel() + 2048 * double


def rows_of(weights) -> torch.Tensor:
    return torch.cat([nf4.dequantize(w) for w in weights])


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize(
    ("rows", "K", "stays"),
    [((256, 64, 64), 256, True), ((64, 32, 32), 512, True), ((33, 64, 5), 576, False)],
)
def test_cat_changes_no_weight(rows, K, stays, double, seed):
    weights = [nf4.quantize(torch.randn(n, K) * (i + 1), double=double) for i, n in enumerate(rows)]
    w = nf4.cat(weights)
    assert (w.nested is not None) == (double and stays)
    assert torch.equal(bits(nf4.dequantize(w)), bits(rows_of(weights)))


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize(("rows", "K"), [(33, 576), (64, 256), (3, 11008)])
def test_interleave_changes_no_weight(rows, K, double, seed):
    gate, up = (nf4.quantize(torch.randn(rows, K) * size, double=double) for size in (1, 9))
    w = nf4.interleave(gate, up)
    assert (w.nested is not None) == double
    whole = nf4.dequantize(w)
    assert torch.equal(bits(whole[0::2]), bits(nf4.dequantize(gate)))
    assert torch.equal(bits(whole[1::2]), bits(nf4.dequantize(up)))


def test_joining_unlike_weights():
    w = nf4.quantize(torch.randn(4, 64))
    with pytest.raises(ValueError, match=r"different \(K, dtype\)"):
        nf4.cat([w, nf4.quantize(torch.randn(4, 128))])
    with pytest.raises(ValueError, match=r"\[4, 64\] and \[8, 64\] cannot alternate"):
        nf4.interleave(w, nf4.quantize(torch.randn(8, 64)))
    mixed = nf4.cat([w, nf4.quantize(torch.randn(4, 64), double=False)])
    assert mixed.nested is None and torch.equal(nf4.dequantize(mixed)[:4], nf4.dequantize(w))


def state_changed(tensors: dict[str, torch.Tensor], **changes: object) -> None:
    key = "double.weight.quant_state.bitsandbytes__nf4"
    values = json.loads(bytes(tensors[key].tolist())) | changes
    tensors[key] = torch.tensor(list(json.dumps(values).encode()), dtype=torch.uint8)


KEY = "double.weight.quant_state.bitsandbytes__nf4"
DAMAGE = {
    "wrong block size": (lambda t: state_changed(t, blocksize=128), "blocksize 128, expected 64"),
    "FP4 in the state": (lambda t: state_changed(t, quant_type="fp4"), "quant_type fp4, expected"),
    "FP4 file": (
        lambda t: t.update({KEY.replace("nf4", "fp4"): t.pop(KEY)}), "has FP4 weights, expected",
    ),
    "no state": (lambda t: t.pop(KEY), "has no quant_state"),
    "truncated state": (lambda t: t.update({KEY: t[KEY][:-9]}), "not JSON: damaged or cut short"),
    "state is no object": (
        lambda t: t.update({KEY: torch.tensor([91, 93], dtype=torch.uint8)}), "expected an object",
    ),
    "state without end": (
        lambda t: t.update({KEY: torch.full((9999,), 91, dtype=torch.uint8)}), "not JSON: damaged",
    ),
    "shape mismatch": (lambda t: state_changed(t, shape=[52, 384]), r"\[52, 384\] and weights"),
    "shape of a vector": (lambda t: state_changed(t, shape=[640]), r"shape \[640\], expected"),
    "odd width": (lambda t: state_changed(t, shape=[320, 52]), "K a multiple of 64"),
    "unknown dtype": (lambda t: state_changed(t, dtype="int8"), "dtype int8, expected float16"),
    "groups": (lambda t: state_changed(t, nested_blocksize=64), "nested_blocksize 64, expected"),
    "offset": (lambda t: state_changed(t, nested_offset="x"), "nested_offset x, expected a finite"),
    "no offset": (lambda t: state_changed(t, nested_offset=None), "nested_offset None"),
    "no weight": (lambda t: t.pop("double.weight"), "double.weight is missing"),
    "no scales": (lambda t: t.pop("double.weight.absmax"), "absmax is missing"),
    "no scale code": (lambda t: t.pop("double.weight.nested_quant_map"), "map is missing"),
    "half the scales": (
        lambda t: t.update({"double.weight.absmax": t["double.weight.absmax"][:100]}),
        "absmax of 100, expected 260",
    ),
    "another code": (
        lambda t: t.update({"double.weight.quant_map": torch.linspace(-1, 1, 16)}),
        "not the codebook",
    ),
    "plain with 8-bit scales": (lambda t: t.pop("double.weight.nested_absmax"), "is torch.uint8"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_state(name, saved):
    damage, message = DAMAGE[name]
    damage(saved)
    with pytest.raises(ValueError, match=message):
        nf4.from_tensors(saved, "double.weight")


def test_quantize_refuses(seed):
    for weight, message in (
        (torch.ones(64), r"shape \[64\]"),
        (torch.ones(4, 65), r"\[4, 65\], expected \[N, K\], K a multiple of 64"),
        (torch.ones(4, 64, dtype=torch.int64), "is torch.int64"),
    ):
        with pytest.raises(ValueError, match=message):
            nf4.quantize(weight)


def quant_state(w: nf4.NF4Weight) -> SimpleNamespace:
    """What bitsandbytes keeps beside a weight."""
    nested, second, offset = w.nested is not None, None, None
    if nested:
        code, levels, _ = w.nested
        second = SimpleNamespace(absmax=levels[0], code=code, blocksize=256)
        offset = levels[1, 0]
    return SimpleNamespace(
        absmax=w.scales.flatten(), code=nf4.codebook(w.device), quant_type="nf4", blocksize=64,
        dtype=w.dtype, shape=w.shape, nested=nested, state2=second, offset=offset,
    )  # fmt: skip


class Linear4bit(nn.Linear):
    """Stands in for bitsandbytes' module."""

    __module__ = "bitsandbytes.nn.modules"

    def __init__(self, linear: nn.Linear, double: bool) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None)
        w = nf4.quantize(linear.weight, double=double)
        self.weight = nn.Parameter(w.packed.reshape(-1, 1), requires_grad=False)
        self.weight.quant_state = quant_state(w)
        self.bias, self.compute_dtype = linear.bias, None


def dequantized(model: nn.Module, names: list[str], double: bool) -> nn.Module:
    """A copy with the plain weights that NF4 stands for."""
    plain = copy.deepcopy(model)
    for name in names:
        linear = plain.get_submodule(name)
        linear.weight.data = nf4.dequantize(nf4.quantize(linear.weight, double=double))
    return plain


@pytest.mark.parametrize("double", [False, True])
def test_replaced_layers_answer_as_plain_ones(double, monkeypatch):
    monkeypatch.setenv("XSPEC_EXACT", "1")
    model, ids = tiny_llama(3), prompt(4)
    names = [n for n, m in model.named_modules() if type(m) is nn.Linear and n != "lm_head"]
    plain, ours = dequantized(model, names, double), copy.deepcopy(model)
    assert quantize_model(ours, double=double) == names
    for name in names:
        parent, child = name.rsplit(".", 1)
        setattr(model.get_submodule(parent), child, Linear4bit(model.get_submodule(name), double))
    packed = model.get_submodule(names[0]).weight
    assert replace_linear4bit(model) == names
    assert model.get_submodule(names[0]).weight.packed.data_ptr() == packed.data_ptr()
    answer = reference(plain, ids, 12)
    assert reference(model, ids, 12) == reference(ours, ids, 12) == answer
    assert torch.allclose(ours(ids).logits, plain(ids).logits, atol=1e-4)
    ours.get_submodule(names[0]).keep_dense()
    assert reference(ours, ids, 12) == answer


def test_module_keeps_its_scales_in_float32():
    linear = NF4Linear(nf4.quantize(torch.randn(8, 64)), torch.ones(8)).to(torch.bfloat16)
    assert (
        linear.weight.nested.levels.dtype == torch.float32 and linear.bias.dtype == torch.bfloat16
    )
    y = linear(torch.ones(2, 3, 64, dtype=torch.bfloat16))
    assert y.shape == (2, 3, 8) and y.dtype == torch.bfloat16
    assert NF4Linear(linear.weight, None, torch.float32)(y.new_ones(1, 64)).dtype == torch.bfloat16


@pytest.mark.parametrize("dense", [False, True])
def test_row_of_a_module_is_independent_of_the_others(dense, monkeypatch, seed):
    """For every M: the last of M rows has the bits that it has alone."""
    monkeypatch.setenv("XSPEC_EXACT", "1")
    layer = NF4Linear(nf4.quantize(torch.randn(98, 576)), torch.randn(98))
    if dense:
        layer.keep_dense()
    x = torch.randn(64, 576)
    for rows in range(1, 65):
        assert torch.equal(layer(x[:rows])[-1], layer(x[rows - 1 : rows])[0]), rows
        assert torch.equal(layer(x[None, :rows])[0], layer(x)[:rows]), rows


def test_models_that_cannot_be_replaced():
    model = tiny_llama(1)
    with pytest.raises(ValueError, match="LlamaForCausalLM has no Linear4bit"):
        replace_linear4bit(model)
    with pytest.raises(ValueError, match=r"no module 'model.nothing' to skip"):
        quantize_model(model, skip=["model.nothing"])
    assert "model.layers.0.mlp.gate_proj" not in quantize_model(model, skip=["model.layers.0"])
    for field, value, message in (
        ("packing_format_for_cpu", True, "o_proj.weight is packed for bitsandbytes' CPU kernel"),
        ("quant_type", "fp4", "o_proj.weight has quant_type fp4, expected nf4"),
        ("blocksize", 32, "blocksize 32, expected 64"),
    ):
        model = tiny_llama(1)
        attention = model.model.layers[1].self_attn
        attention.q_proj = Linear4bit(attention.q_proj, True)
        attention.o_proj = Linear4bit(attention.o_proj, True)
        setattr(attention.o_proj.weight.quant_state, field, value)
        with pytest.raises(ValueError, match=message):
            replace_linear4bit(model)
        assert isinstance(attention.q_proj, Linear4bit), "unchanged"
    attention.o_proj.weight.quant_state = None
    with pytest.raises(ValueError, match=r"o_proj\.weight has no quant_state: it has not been"):
        replace_linear4bit(model)


def test_a_model_saved_by_bitsandbytes(tmp_path):
    """transformers with bitsandbytes writes, loads; its layers are replaced, its file is read."""
    bitsandbytes()
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    tiny_llama(5).save_pretrained(tmp_path / "plain")
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    load = AutoModelForCausalLM.from_pretrained
    load(tmp_path / "plain", quantization_config=config, device_map="cpu").save_pretrained(
        tmp_path / "nf4"
    )
    model = load(tmp_path / "nf4", device_map="cpu")
    names = replace_linear4bit(model)
    assert len(names) == 21
    with safe_open(tmp_path / "nf4" / "model.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name in names:
        read = nf4.from_tensors(tensors, f"{name}.weight")
        held = model.get_submodule(name).weight
        assert torch.equal(nf4.dequantize(read), nf4.dequantize(held))
    assert model(prompt(6)).logits.isfinite().all()
