"""What makes a text target fast on a CPU: packed weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from xspec_runtime.drafters.base import Request
from xspec_runtime.drafters.ngram import NgramDrafter, NgramMemory
from xspec_runtime.models import mini
from xspec_runtime.packing import PackedLinear, can_pack, pack_linears
from xspec_runtime.workloads import PLAIN, Settings
from xspec_runtime.workloads.text import text_workload

PROMPTS = Path(__file__).resolve().parent.parent / "bench" / "prompts" / "grounded.json"
needs_packing = pytest.mark.skipif(not can_pack(), reason="torch without oneDNN's packed layers")


@needs_packing
@pytest.mark.parametrize("bias", [False, True])
def test_packed_linear_equals_linear(seed: int, bias: bool) -> None:
    torch.manual_seed(seed)
    linear = nn.Linear(96, 200, bias=bias).requires_grad_(False)
    packed = PackedLinear(linear)
    for rows in (1, 2, 3, 4, 7, 16, 33, 130):
        x = torch.randn(1, rows, 96)
        torch.testing.assert_close(packed(x), linear(x), rtol=1e-5, atol=1e-5)


@needs_packing
def test_only_float32_linear_layers_are_packed() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)), nn.LayerNorm(4))
    model.append(nn.Linear(4, 4, dtype=torch.float64)).append(nn.Embedding(4, 4))
    tied = nn.Linear(4, 4, bias=False)
    tied.weight = model[4].weight
    model.append(tied)
    assert pack_linears(model) == 3
    kinds = [type(layer) for layer in (model[0], model[1][0], model[3], model[5])]
    assert kinds == [PackedLinear, PackedLinear, nn.Linear, PackedLinear]
    assert model[4](torch.tensor([1])).shape == (1, 4)
    assert pack_linears(model) == 0


def test_without_onednn_nothing_is_packed(monkeypatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    model = nn.Sequential(nn.Linear(4, 4))
    assert pack_linears(model) == 0
    assert type(model[0]) is nn.Linear


def test_arms_agree_and_report_what_they_rest_on(tmp_path: Path) -> None:
    mini.load("assistant").save_pretrained(tmp_path)
    mini.load_tokenizer().save_pretrained(tmp_path)
    prompts = ["The key elements in this scene", "The driver can"]
    work = text_workload(Settings(gamma=4, rows=12, max_new_tokens=20), tmp_path, prompts)
    assert len(work.facts["row_costs"]) == 12
    assert (work.facts["packed_linears"] > 0) == can_pack() == ("hf_lookup_packed" in work.arms)
    assert [task.name for task in work.tasks] == ["prompt 0", "prompt 1"]
    for task in work.tasks:
        answers = {name: make().run(task).tokens for name, make in work.arms.items()}
        assert all(tokens == answers[PLAIN] for tokens in answers.values()), answers


def test_what_a_request_shows_changes_the_trust_in_copies() -> None:
    """A token that is always followed by something new loses trust, a steady one gains it."""
    drafter = NgramDrafter(NgramMemory(), online=False)

    def trust(text: list[int]) -> float:
        drafter.begin(Request())
        return drafter.propose([*text, 5], 2).scores[1]

    new = [token for i in range(30) for token in (5, 100 + i)]
    steady = [token for i in range(30) for token in (5, 100, 200 + i)]
    assert trust(new) < trust([5, 100]) < trust(steady)


def test_prompts_of_the_table() -> None:
    prompts = json.loads(PROMPTS.read_text(encoding="utf-8"))
    groups = [prompt["group"] for prompt in prompts]
    assert groups.count("edit") + groups.count("quote") >= 20
    assert set(groups) == {"edit", "quote", "open"}
    assert len({prompt["question"] for prompt in prompts}) == len(prompts)
