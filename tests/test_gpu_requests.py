"""Phases that run prefills and whole requests: operations counted, what makes them fail, and the
page of their results.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, CLIPVisionModel, PreTrainedModel

from running import bench_script
from xspec_runtime import measure
from xspec_runtime.gpu import e2e, overlap, prefill
from xspec_runtime.gpu.parts import CheckFailed, Context, Options
from xspec_runtime.targets.llama import LlamaTarget
from xspec_runtime.targets.llama_weights import LlamaShape
from xspec_runtime.verify_cost.stage import find_config, random_model

DRY = Context(Options(dry_run=True), 0)


def counted(model: PreTrainedModel, *given, **options) -> float:
    model.set_attn_implementation("eager")
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(*given, **options)
    return counter.get_total_flops()


def test_operations_of_a_prompt() -> None:
    config, rows = find_config("tiny"), 37
    model, shape = random_model(config, "cpu", torch.float32, 0), LlamaShape.of(config)
    ids = torch.zeros(1, rows, dtype=torch.int64)
    # torch counts attention to all rows, those behind included.
    behind = shape.layers * 2 * 2 * shape.heads * shape.head_dim * rows * (rows - 1) / 2
    # Some versions of transformers multiply positions and frequencies as matrices.
    angles = shape.head_dim * rows
    found = counted(model, ids, logits_to_keep=1) - behind
    assert found - prefill.prompt_operations(shape, rows) in (0, angles)


def test_operations_of_frames() -> None:
    config = CLIPVisionConfig(**dict(prefill.TINY.vision))
    tower, side = CLIPVisionModel(config), config.image_size
    patches = (side // config.patch_size) ** 2
    embedding = 2 * 3 * patches * config.patch_size**2 * config.hidden_size * 3
    found = counted(tower, torch.zeros(3, 3, side, side))
    assert found - embedding == prefill.frame_operations(config, 3)


def test_wrong_answer_fails_the_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    real = measure.run_interleaved

    def wrong(*given, **options):
        samples = real(*given, **options)
        next(s for s in samples if s.arm == "ngram_tree").identical = False
        return samples

    monkeypatch.setattr(measure, "run_interleaved", wrong)
    with pytest.raises(CheckFailed, match="answers of ngram_tree differ"):
        list(e2e.pair("float32", DRY))


def test_wrong_token_beside_another_prefill_fails_the_phase(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real, calls = LlamaTarget.prefill, []

    def wrong(self, *given, **options):
        calls.append(self)
        verdict = real(self, *given, **options)
        # The first two are by themselves.
        verdict.tokens[0] ^= len(calls) > 2
        return verdict

    monkeypatch.setattr(LlamaTarget, "prefill", wrong)
    with pytest.raises(CheckFailed, match="another token"):
        list(overlap.prefills(DRY))


def suite_results() -> dict:
    """A small file of results as of a card."""

    def part(**data: object) -> dict:
        return {"status": "passed", "message": None, "seconds": 1.0, "data": data}

    rows = [
        {"weights": "bf16", "prompt_tokens": 2076, "rows": m, "shape": "chain", "backend": name,
         "mode": "graph", "ms": ms, "ratio": ratio, "floor_ratio": 1.2 * ratio}
        for name, m, ms, ratio in (
            ("xspec-triton", 1, 4.0, 1.0), ("xspec-triton", 22, 4.4, 1.1),
            ("cublas", 1, 5.0, 1.0), ("cublas", 22, 6.5, 1.3),
        )
    ]  # fmt: skip
    spread = {"count": 9, "median_ms": 0.07, "p95_ms": 0.1}
    ours = {
        "ttft_ms": 40.0, "decode_ms": 30.0, "total_ms": 70.0, "speedup_decode": 5.9,
        "speedup_total": 3.0, "speedup_gpu": 5.0, "tokens_per_verify": 6.5, "near_ties": 0.0,
        "peak_bytes": 16e9, "round_ms": 4.5, "propose_ms": 0.05,
        "round": {"launches_per_round": 1.0, "cuda_waits_per_round": 0.0,
                  "readbacks_per_round": 1.0, "gpu_rest": spread, "gap": spread},
    }  # fmt: skip
    arms = {"fused_exact": ours, "memory_tree": ours, "transformers_generate": {"total_ms": 280.0}}
    goal = {"of": "ratio", "rows": 22, "prompt_tokens": 2076, "value": 1.1, "goal": 1.05}
    phases = {
        "verify": part(goals=[goal]),
        "full_size": part(
            arms=arms, shape={"config": "llama-7b"}, oracles=[{"source": "recorded"}], notice="n"
        ),
    }
    environment = dict.fromkeys(("gpu", "driver", "torch", "triton", "commit", "sources", "cuda"))
    return {
        "schema": "xspec.gpu/1", "dry_run": False, "complete": True, "command": "gpu_suite.py",
        "environment": environment | {"gpu": "H200", "threads": 16}, "budget_s": 1.0,
        "elapsed_s": 1.0, "verify": rows,
        "phases": {
            name: {"status": "passed", "parts": {"nf4": one}} for name, one in phases.items()
        },
    }  # fmt: skip


def test_the_page_of_a_card(tmp_path: Path) -> None:
    publish = bench_script("publish")
    (tmp_path / "docs").mkdir()
    page, file = tmp_path / "docs" / "gpu.md", tmp_path / "gpu_card.json"
    publish.publish_gpu(page, [], check=False)
    assert not page.exists()
    file.write_text(json.dumps(suite_results()))
    with pytest.raises(ValueError, match="run it"):
        publish.publish_gpu(page, [file], check=True)
    publish.publish_gpu(page, [file], check=False)
    publish.publish_gpu(page, [file], check=True)
    text = page.read_text()
    for line in (
        "| v(22)/v(1), bf16, 2,076 tokens | 1.10 | at most 1.05 | missed |",
        "| memory_tree, nf4: decode speedup / tokens per verify | 0.91 | at least 0.9 | met |",
        "| memory_tree, nf4: against transformers' generate | 4.00 | at least 3 | met |",
        "| memory_tree, nf4: us that the GPU rests | 70.00 | at most 60 | missed |",
        "| cublas | graph | chain | 2,076 | 5.000 | 1.20 | - | 1.30 | - | - |",
        "| memory_tree | 4.50 | 0.05 | 1.0 | 0.0 | 1.0 | 70 | 70 | 14.9 |",
        "![v(M) of gpu_card](images/gpu_card_bf16.png)",
    ):
        assert line in text
    file.write_text(json.dumps(suite_results() | {"dry_run": True}))
    with pytest.raises(ValueError, match="a dry run measures nothing"):
        publish.publish_gpu(page, [file], check=False)
    assert page.read_text() == text
