"""Phases that run prefills and whole requests: operations counted, and what makes them fail."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, CLIPVisionModel, PreTrainedModel

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
    found = counted(model, ids, logits_to_keep=1)
    assert found == prefill.prompt_operations(shape, rows) + behind


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
