"""Folders that bitsandbytes wrote: loaded as they are, answered as its weights say, or refused."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import VideoLlavaForConditionalGeneration

import tiny
from xspec_kernels import NF4Weight
from xspec_runtime.config import SpecConfig
from xspec_runtime.engine import SpeculativeDecoder
from xspec_runtime.nf4_checkpoint import is_nf4, load_nf4
from xspec_runtime.nf4_dense import keep_dense, plain_weight, with_dense
from xspec_runtime.nf4_model import NF4Linear
from xspec_runtime.targets.llama import LlamaTarget
from xspec_runtime.targets.llama_weights import LlamaWeights
from xspec_runtime.targets.transformers import TransformersTarget

FOLDER = Path(__file__).parent / "data" / "nf4_video_llava"
FRAMES, PATCH_TOKENS, VIDEO = 8, 5, 4


def inputs() -> dict[str, torch.Tensor]:
    """The prompt that the recorded answers belong to."""
    ids = torch.tensor([[1, 20, 30, *[VIDEO] * (FRAMES * PATCH_TOKENS), 5, 6, 7]])
    pixels = torch.sin(torch.arange(FRAMES * 3 * 16) * 0.37).view(1, FRAMES, 3, 4, 4)
    return {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values_videos": pixels,
    }  # fmt: skip


def recorded(name: str) -> list[int]:
    """What transformers answers with the weights that bitsandbytes dequantizes."""
    with safe_open(FOLDER / name / "model.safetensors", framework="pt") as file:
        return json.loads(file.metadata()["answer"])


def sharded(source: Path, folder: Path, parts: int = 3) -> Path:
    """The same tensors in several files, so that parts of one weight lie in different ones."""
    tensors = load_file(source / "model.safetensors")
    shutil.copyfile(source / "config.json", folder / "config.json")
    files = {name: f"model-{i % parts}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(files.values()):
        save_file({n: tensors[n] for n, place in files.items() if place == file}, folder / file)
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("name", ["plain", "double"])
def test_transformers_modules_answer_as_bitsandbytes_weights(name):
    model = load_nf4(FOLDER / name)
    assert isinstance(model, VideoLlavaForConditionalGeneration) and is_nf4(FOLDER / name)
    layers = [m for m in model.modules() if isinstance(m, NF4Linear)]
    assert len(layers) == 2 * 7 + 2 * 6 + 2
    assert all((m.weight.nested is not None) == (name == "double") for m in layers)
    prompt, answer = inputs(), recorded(name)
    assert len(answer) == 40
    out = model.generate(**prompt, max_new_tokens=len(answer), do_sample=False)
    assert out[0, prompt["input_ids"].shape[1] :].tolist() == answer


def test_the_weights_are_those_that_lie_in_the_file():
    """And no float copy of a packed one is made on the way."""
    model = load_nf4(FOLDER / "double")
    tensors = load_file(FOLDER / "double" / "model.safetensors")
    q = model.model.language_model.layers[1].self_attn.q_proj.weight
    name = "language_model.model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(q.packed.flatten(), tensors[name].flatten())
    assert torch.equal(q.scales.flatten(), tensors[f"{name}.absmax"])
    assert torch.equal(q.nested.levels[0], tensors[f"{name}.nested_absmax"])
    assert q.dense is None
    assert sum(p.numel() for p in model.parameters()) < sum(t.numel() for t in tensors.values())


class Spoken(random.Random):
    """Draws tokens of the model's vocabulary that stand for no media."""

    def randrange(self, stop: int) -> int:
        return 5 + super().randrange(59) if stop == tiny.VOCAB else super().randrange(stop)


def oracle(answer: list[int], seed: int) -> tiny.OracleDrafter:
    drafter = tiny.OracleDrafter(answer, seed)
    drafter.rng = Spoken(seed)
    return drafter


@pytest.mark.parametrize("name", ["plain", "double"])
@pytest.mark.parametrize("engine", ["llama", "transformers"])
@pytest.mark.parametrize("files", ["one", "shards"])
def test_identical_answers_chain_and_tree(name, engine, files, tmp_path, monkeypatch, seed):
    monkeypatch.setenv("XSPEC_EXACT", "1")
    folder = FOLDER / name if files == "one" else sharded(FOLDER / name, tmp_path)
    model = load_nf4(folder)
    target = LlamaTarget(model, 128) if engine == "llama" else TransformersTarget(model, 128)
    answer = recorded(name)[:24]
    for rows in (1, 6, 24):
        drafter = oracle(answer, seed) if rows > 1 else None
        decoder = SpeculativeDecoder(target, drafter, SpecConfig(rows, len(answer), ()))
        found = decoder.generate(inputs())
        assert found.tokens == answer, (rows, seed)
        assert drafter is None or len(found.rounds) < len(answer) - 1


def test_copies_for_a_cpu_are_bounded_and_change_no_bit(monkeypatch):
    monkeypatch.setenv("XSPEC_EXACT", "1")
    model = load_nf4(FOLDER / "double")
    logits = model(**inputs()).logits
    q = model.model.language_model.layers[0].self_attn.q_proj
    made = plain_weight(q)
    first = 4 * q.weight.shape.numel()
    assert keep_dense(model, 0) == 0 and q.weight.dense is None
    kept = keep_dense(model, 5 * first)
    assert 0 < kept <= 5 * first
    assert kept == sum(
        m.weight.dense.nbytes
        for m in model.modules()
        if isinstance(m, NF4Linear) and m.weight.dense is not None
    )
    keep_dense(model)
    assert plain_weight(q) is q.weight.dense and torch.equal(made, q.weight.dense)
    assert torch.equal(model(**inputs()).logits, logits)
    weights = LlamaWeights.of(model)
    limited = with_dense(weights, 4 * weights.layers[0].qkv.shape.numel())
    assert limited.layers[0].qkv.dense is not None and limited.layers[1].qkv.dense is None
    matrices = [m for layer in with_dense(weights).layers for m in layer]
    assert all(m.dense is not None for m in matrices if isinstance(m, NF4Weight))


def edited(folder: Path, **changes: object) -> None:
    values = json.loads((folder / "config.json").read_text()) | changes
    values = {key: value for key, value in values.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(values))


def quantization(**changes: object) -> dict:
    values = json.loads((FOLDER / "double" / "config.json").read_text())["quantization_config"]
    return values | changes


Q = "language_model.model.layers.0.self_attn.q_proj.weight"
STATE = f"{Q}.quant_state.bitsandbytes__nf4"
BAD = {
    "plain weights": (
        lambda f, t: edited(f, quantization_config=None), "plain weights, expected bitsandbytes"),
    "fp4": (
        lambda f, t: edited(f, quantization_config=quantization(bnb_4bit_quant_type="fp4")),
        "expected plain weights or NF4"),
    "another architecture": (
        lambda f, t: edited(f, architectures=["LlamaForCausalLM"]),
        "'LlamaForCausalLM' is no model of transformers for VideoLlavaConfig"),
    "no model at all": (
        lambda f, t: edited(f, architectures=["logging"]), "'logging' is no model of transformers"),
    "truncated state": (lambda f, t: t.update({STATE: t[STATE][:40]}), "damaged or cut short"),
    "missing scales": (lambda f, t: t.pop(f"{Q}.absmax"), "q_proj.weight.absmax is missing"),
    "missing norm": (lambda f, t: t.pop("language_model.model.norm.weight"), "missing .*norm"),
    "another tensor": (lambda f, t: t.update(extra=torch.ones(1)), "unexpected .'extra'"),
    "no state": (lambda f, t: t.pop(STATE), "q_proj.weight has no quant_state"),
    "shape": (
        lambda f, t: t.update({"language_model.model.embed_tokens.weight": torch.ones(60, 64)}),
        r"embed_tokens.weight is \[60, 64\], expected \[64, 64\]"),
    "nothing packed": (
        lambda f, t: [t.pop(n) for n in list(t) if ".weight." in n], "no weight in NF4"),
    "wrong layer": (
        lambda f, t: t.update({
            n.replace("layers.0", "layers.9"): v.clone() for n, v in t.items() if n.startswith(Q)}),
        "no such linear layer"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_folder_that_cannot_be_loaded(name, tmp_path):
    damage, message = BAD[name]
    folder = tmp_path / "model"
    shutil.copytree(FOLDER / "double", folder)
    tensors = load_file(folder / "model.safetensors")
    damage(folder, tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        load_nf4(folder)


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_nf4(tmp_path)
    shutil.copyfile(FOLDER / "plain" / "config.json", tmp_path / "config.json")
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        load_nf4(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no safetensors file")
    with pytest.raises(RuntimeError, match="not a readable safetensors file"):
        load_nf4(tmp_path)


def test_text_prompts_need_no_model():
    """Our own decoder reads the language model of the folder by itself, to the same bits."""
    own = LlamaTarget.from_pretrained(FOLDER / "double", 64)
    held = LlamaTarget(load_nf4(FOLDER / "double"), 64)
    for mine, other in zip(own.decoder.weights.layers, held.decoder.weights.layers, strict=True):
        assert torch.equal(mine.qkv.packed, other.qkv.packed)
        assert torch.equal(mine.qkv.dense, other.qkv.dense)
