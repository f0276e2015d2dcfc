"""`bench/e2e.py --weights nf4`: the embedded pair, and folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from xspec_kernels import nf4
from xspec_runtime.e2e import Options, build_workload, run_e2e
from xspec_runtime.models import mini
from xspec_runtime.nf4_model import NF4Linear
from xspec_runtime.workloads import MiniPair, Settings

COMMAND = "python bench/e2e.py"
ARMS = "target,hf_generate,hf_prompt_lookup,hf_assisted,draft,adapter_prefix,tree"


def agreed(results: dict, samples: int) -> dict[str, dict]:
    """The arms by name, once all gave the target's answers."""
    arms = {arm["name"]: arm for arm in results["arms"]}
    ties = results["near_ties"]["below_2_ulp"]
    assert all(arm["identical"] == arm["samples"] == samples for arm in arms.values()), ties
    assert results["config"]["weights"] == "nf4"
    return arms


@pytest.mark.parametrize("engine", ["transformers", "llama"])
def test_every_kind_of_arm_on_the_pair(engine, tmp_path):
    options = {"arms": ARMS, "samples": 1, "warmup": 0, "engine": engine, "weights": "nf4"}
    options |= {"max_new_tokens": 20}
    arms = agreed(run_e2e(Options(COMMAND, output_dir=tmp_path, **options)), 1)
    assert arms["draft"]["tokens_per_verify"] > 3, "a quantized draft still drafts"


def test_every_model_of_the_pair_is_quantized():
    pair = MiniPair(Settings(weights="nf4"))
    for model in (pair.target_model, pair.draft_model, pair._load("assistant")):
        layers = [m for m in model.modules() if type(m) in (torch.nn.Linear, NF4Linear)]
        plain = [m for m in layers if type(m) is torch.nn.Linear]
        assert plain == [model.get_output_embeddings()]
        assert all(m.weight.dense is not None for m in layers if m not in plain)


def stored_in_nf4(folder: Path) -> None:
    """Rewrite a folder as bitsandbytes stores it."""
    tensors = load_file(folder / "model.safetensors")
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        w = nf4.quantize(tensors[name])
        state = {
            "quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": list(w.shape),
            "nested_blocksize": 256, "nested_dtype": "float32",
            "nested_offset": w.nested.levels[1, 0].item(),
        }  # fmt: skip
        tensors |= {
            name: w.packed.reshape(-1, 1),
            f"{name}.absmax": w.scales.flatten(),
            f"{name}.quant_map": nf4.codebook(w.device).clone(),
            f"{name}.nested_absmax": w.nested.levels[0].clone(),
            f"{name}.nested_quant_map": w.nested.code.clone(),
            f"{name}.quant_state.bitsandbytes__nf4": torch.tensor(
                list(json.dumps(state).encode()), dtype=torch.uint8
            ),
        }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


def stored(folder: Path, given: dict) -> Options:
    stored_in_nf4(folder)
    return Options(COMMAND, **given)


def answers(options: Options) -> list[list[int]]:
    workload = build_workload(options, options.settings())
    target = workload.arms["target"]()
    return [target.run(task).tokens for task in workload.tasks]


def test_a_folder_quantized_at_load_and_one_stored_so_answer_alike(tmp_path):
    folder, prompts = tmp_path / "lm", tmp_path / "prompts.txt"
    mini.load("assistant").save_pretrained(folder)
    mini.load_tokenizer().save_pretrained(folder)
    prompts.write_text("The key elements in this scene\nThe driver can\n")
    given = {"target": str(folder), "prompts": prompts, "warmup": 0, "max_new_tokens": 12}
    given |= {"draft": str(folder), "weights": "nf4"}
    assert answers(Options(COMMAND, **given)) == answers(stored(folder, given)), "the same weights"
    for engine in ("transformers", "llama"):
        options = Options(COMMAND, engine=engine, output_dir=tmp_path / engine, **given)
        assert agreed(run_e2e(options), 2)["draft"]["tokens_per_verify"] > 3
    with pytest.raises(ValueError, match="in NF4 already: add --weights nf4"):
        run_e2e(Options(COMMAND, output_dir=tmp_path / "no", **given | {"weights": "float"}))


def test_weights_of_another_kind(tmp_path):
    with pytest.raises(ValueError, match="--weights must be one of float, nf4, got 'int4'"):
        run_e2e(Options(COMMAND, weights="int4", output_dir=tmp_path / "out"))
    assert not (tmp_path / "out").exists()
