from __future__ import annotations

import json
import re
import sys
import zipfile
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from weakref import ref

import pytest
import torch

from test_graphs import FakeCuda
from xspec_kernels import _dispatch
from xspec_runtime.files import write_json
from xspec_runtime.full_size.oracle import read_oracle
from xspec_runtime.gpu import bundle, check, clock, forward, kernels, law, rounds
from xspec_runtime.gpu.cases import tree_mask_cases
from xspec_runtime.gpu.clock import interleaved
from xspec_runtime.gpu.compiled import compiled_kernels
from xspec_runtime.gpu.decoder import Decoder, Shape
from xspec_runtime.gpu.full_size import RECORDED_GAMMA
from xspec_runtime.gpu.parts import CheckFailed, Context, Options


def one_case(wrong):
    """One case, `wrong` from the first call on that is compared with the reference: before it, one
    call for each of three backends finds those that run, and one makes the reference.
    """

    def make(rng, sizes):
        case = next(tree_mask_cases(rng, (5,)))
        calls = []

        def call(inputs, backend):
            calls.append(backend)
            got = case.call(inputs, "torch")
            return got if len(calls) <= 4 else wrong(got)

        yield type(case)("tree_mask", "planted", case.inputs, call, case.outputs)

    return make


@pytest.mark.parametrize(
    "wrong",
    [
        lambda got: [got[0], got[1] + 1, *got[2:]],
        lambda got: [torch.empty_like(tensor) for tensor in got],
        lambda got: [got[0].int(), *got[1:]],
    ],
    ids=["value", "unwritten", "dtype"],
)
def test_planted_mismatch_names_op_backend_and_case(wrong, monkeypatch):
    monkeypatch.setitem(check.OPS, "tree_mask", one_case(wrong))
    with pytest.raises(CheckFailed, match="tree_mask, torch, planted, repeat 0"):
        list(check.check_op("tree_mask", Context(Options(dry_run=True), 0)))
    monkeypatch.setitem(check.OPS, "tree_mask", one_case(lambda got: got))
    for fact in check.check_op("tree_mask", Context(Options(dry_run=True), 0)):
        assert fact["ops"][0]["unavailable"] or fact["ops"][0]["mismatches"] == 0


def test_a_row_that_is_off_is_found(rng):
    case = next(iter(check.OPS["skinny_linear"](rng, (5,))))
    want = case.run("torch", "cpu")
    got = [want[0].clone()]
    got[0][-1] *= 1 + case.tolerance / 2
    assert check.compare(case, got, want) is None
    got[0][-1] *= 1 + case.tolerance
    assert "y: a row is off by" in check.compare(case, got, want)
    got[0][-1] = torch.nan
    assert "y: a row is off by nan" in check.compare(case, got, want)


@pytest.fixture
def exact(monkeypatch):
    monkeypatch.setenv("XSPEC_EXACT", "1")
    with torch.inference_mode():
        yield forward.random_weights("tiny", "cpu", torch.float32, 0, 2)


def test_law_names_the_first_op_that_breaks_it(exact, monkeypatch):
    held = law.Law(exact, "torch", 40, 8, 3)
    tallies = [held.replay() for _ in range(3)]
    assert all(tally.first is None and tally.rows >= 8 for tally in tallies)
    assert held.graph() is None
    monkeypatch.setenv("XSPEC_EXACT", "0")
    found = [held.replay().first or "" for _ in range(3)]
    assert any(re.match(r"layer \d, op \d: (skinny_linear|tree_attention): row", x) for x in found)


@pytest.mark.parametrize(
    ("op", "place"),
    [("skinny_linear", 0), ("rope_append", 1), ("tree_attention", 2)],
)
def test_op_that_knows_its_neighbors_is_named(op, place, exact, monkeypatch):
    """In the last bits, wherever there is more than one row."""
    held = law.Law(exact, "torch", 40, 8, 3)
    sound = _dispatch._IMPLEMENTATIONS[op]["torch"]

    def planted(x, *rest):
        out = sound(x, *rest)
        rows = x.shape[1] if op == "tree_attention" else len(x)
        factor = 1 + 1e-6 * (rows > 1)
        return [t * factor for t in out] if isinstance(out, list) else out * factor

    monkeypatch.setitem(_dispatch._IMPLEMENTATIONS[op], "torch", planted)
    found = [held.replay().first for _ in range(3)]
    assert any(first and first.startswith(f"layer 0, op {place}: {op}: row") for first in found)


def test_kernel_that_is_off_is_not_timed(monkeypatch):
    def off(*arguments, **options):
        return 1.1 * sound(*arguments, **options)

    sound = kernels.skinny_linear
    monkeypatch.setattr(kernels, "skinny_linear", off)
    found = []
    with pytest.raises(CheckFailed, match=r"skinny_linear qkv, 1 rows: off by 0\.1"):
        found += kernels.linear(Context(Options(dry_run=True), 0))
    assert found == []


def test_planted_mismatch_of_a_round_is_found(monkeypatch):
    sound = rounds.kv_commit

    def stuck(caches, *arguments, backend):
        if backend == "torch":
            return sound(caches, *arguments, backend=backend)
        return arguments[2] + arguments[1] + 1

    backends = {"tree_mask": "torch", "verify_greedy": "torch", "kv_commit": "auto"}
    assert rounds.check_rounds(backends, "cpu", 0, 5)["mismatch"] is None
    monkeypatch.setattr(rounds, "kv_commit", stuck)
    assert "cache" in rounds.check_rounds(backends, "cpu", 0, 5)["mismatch"]


@pytest.mark.parametrize("rows", [1, 3, 6])
@pytest.mark.parametrize("dense", [False, True], ids=["causal", "mask"])
def test_decoder_is_the_llama_of_transformers(rows, dense, seed):
    from transformers import LlamaConfig, LlamaForCausalLM

    shape, start = Shape(2, 64, 4, 96, 128), 11
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=2,
                         intermediate_size=96, vocab_size=128, rms_norm_eps=shape.eps,
                         rope_theta=shape.theta, tie_word_embeddings=False)  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.inference_mode():
        ours = Decoder(shape, start, 6, "cpu", torch.float32, seed=3)
        ours.layers += [ours.random_layer() for _ in range(shape.layers)]
        model.model.embed_tokens.weight.copy_(ours.embedding)
        model.model.norm.weight.copy_(ours.norm)
        model.lm_head.weight.copy_(ours.head.weight)
        for mine, theirs in zip(ours.split().layers, model.model.layers, strict=True):
            attention, mlp = theirs.self_attn, theirs.mlp
            names = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj,
                     mlp.gate_proj, mlp.up_proj, mlp.down_proj)  # fmt: skip
            linears = (*mine.qkv, mine.out, *mine.gate_up, mine.down)
            for linear, module in zip(linears, names, strict=True):
                module.weight.copy_(linear.weight)
            theirs.input_layernorm.weight.copy_(mine.attention_norm)
            theirs.post_attention_layernorm.weight.copy_(mine.mlp_norm)
        prompt = torch.randint(128, (1, start))
        done = model(torch.cat([prompt, ours.ids[None, :rows]], 1), use_cache=True)
        for mine, theirs in zip(ours.layers, done.past_key_values.layers, strict=True):
            mine.keys[:, :, :start] = theirs.keys[:, :, :start]
            mine.values[:, :, :start] = theirs.values[:, :, :start]
        for decoder in (ours, ours.split()):
            tokens, logits = decoder.forward(rows, decoder.mask(rows, dense))
            torch.testing.assert_close(logits, done.logits[0, start:], atol=1e-4, rtol=1e-4)
            assert torch.equal(tokens, logits.argmax(-1))


def test_bytes_of_a_7b_verify():
    """Weights and head of Vicuna-7B in bf16, and half a megabyte of K and V a token."""
    weights = 32 * (4 * 4096**2 + 3 * 4096 * 11008) * 2 + 32064 * 4096 * 2
    decoder = object.__new__(Decoder)
    layer = SimpleNamespace(
        nbytes=(weights - 32064 * 4096 * 2) // 32,
        keys=torch.empty(1, 32, 2140, 128, dtype=torch.bfloat16, device="meta"),
    )
    decoder.layers, decoder.start = [layer] * 32, 2076
    decoder.head = SimpleNamespace(nbytes=32064 * 4096 * 2)
    assert decoder.nbytes(22) == weights + (2076 + 22) * 2**19


def test_interleaved_times_every_entry():
    calls = []
    work = {key: (lambda key=key: calls.append(key)) for key in "abc"}
    timings = interleaved(work, "cpu", repeats=4, burst=2)
    assert {key: timing.calls for key, timing in timings.items()} == dict.fromkeys("abc", 8)
    assert all(timing.ms > 0 and timing.spread >= 0 for timing in timings.values())
    assert calls[:3] == ["a"] * 3 and calls[9:12] == ["b"] * 3


def test_a_graph_keeps_what_it_reads(monkeypatch):
    """Another graph's capture empties torch's caches: memory that was let go would be gone."""
    FakeCuda(monkeypatch)
    graphs = []
    for number in range(3):
        weight = torch.full((2,), float(number))
        graphs.append((clock.captured(partial(weight.add, 1), "cuda"), ref(weight)))
        del weight
    assert [held().tolist() for _, held in graphs] == [[0, 0], [1, 1], [2, 2]]
    assert [replay().tolist() for replay, _ in graphs] == [[1, 1], [2, 2], [3, 3]]


def test_a_second_device_is_made_current(monkeypatch):
    seen = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: seen.append(device) or nullcontext())
    for device in ("cpu", "cuda", "cuda:1"):
        with clock.current(device):
            pass
    assert seen == ["cuda", "cuda:1"]


def test_compiled_kernels_come_from_tritons_caches(monkeypatch):
    assert all("spills" in kernel for kernel in compiled_kernels())
    form = SimpleNamespace(asm={"cubin": b"code"}, n_regs=40, n_spills=3,
                           metadata=SimpleNamespace(shared=128, num_warps=2))  # fmt: skip
    name = "xspec_kernels.planted"
    kernel = SimpleNamespace(__module__=name, __name__="k", device_caches={0: ({"key": form}, {})})
    module = ModuleType(name)
    module.kernel = kernel
    monkeypatch.setitem(sys.modules, name, module)
    (found,) = [fact for fact in compiled_kernels() if fact["name"] == f"{name}.k"]
    assert (found["registers"], found["spills"], found["shared"]) == (40, 3, 128)
    with pytest.raises(CheckFailed, match="spills 3"):
        list(check.compiled(Context(Options(dry_run=True), 0)))


def wheel(path: Path, *names: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, name)
    return path


def test_bundle_keeps_one_library(tmp_path):
    base = [f"bitsandbytes/{lib}" for lib in bundle.LIBRARIES]
    others = ["bitsandbytes/libbitsandbytes_cuda118.so", "bitsandbytes/libbitsandbytes_xpu.so"]
    python = ["bitsandbytes/__init__.py", "bitsandbytes-1.10.0.dist-info/METADATA"]
    full = wheel(tmp_path / "a.whl", *base, *others, *python)
    for version in ("1.9.0", "1.10.0"):
        bundle.unpack(full, tmp_path / f"bitsandbytes-{version}")
    (tmp_path / "bitsandbytes-broken").mkdir()
    assert list(bundle.carried(tmp_path, "bitsandbytes")) == ["1.10.0", "1.9.0"]
    kept = {str(f.relative_to(tmp_path / "bitsandbytes-1.9.0"))
            for f in (tmp_path / "bitsandbytes-1.9.0").rglob("*") if f.is_file()}  # fmt: skip
    assert kept == {*base, *python}


def test_bundle_refuses_a_wheel_without_the_library(tmp_path):
    target = tmp_path / "bitsandbytes-1.0"
    bundle.unpack(wheel(tmp_path / "a.whl", *(f"b/{lib}" for lib in bundle.LIBRARIES)), target)
    with pytest.raises(RuntimeError, match=r"holds no libbitsandbytes_cuda130\.so"):
        bundle.unpack(wheel(tmp_path / "b.whl", "b/libbitsandbytes_cpu.so"), target)
    assert (target / "b").is_dir()


def test_bundle_counts_are_an_oracle(tmp_path):
    runs = [{"L4+VL": {"accepted": n}} for n in (1, 0, 1, 12)]
    recording = tmp_path / bundle.CHAINS
    recording.write_text("".join(json.dumps(run) + "\n" for run in runs))
    counts = bundle.accepted_counts(recording)
    assert counts == {0: 1, 1: 2, 12: 1}
    write_json(tmp_path / "counts.json", counts)
    oracle = read_oracle(tmp_path / "counts.json", RECORDED_GAMMA + 1)
    assert sorted(oracle.accepted) == [0, 1, 1, 12]
    recording.write_text('{"L4+VL": {}}\n')
    with pytest.raises(ValueError, match=r"L4\+VL\.accepted"):
        bundle.accepted_counts(recording)
