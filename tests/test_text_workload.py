"""What makes a text target fast on a CPU: packed weights, and trees no taller than pays."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from torch import nn

from xspec_runtime import policy
from xspec_runtime.drafters.base import DraftTree, Request
from xspec_runtime.drafters.ngram import NgramDrafter, NgramMemory
from xspec_runtime.models import mini
from xspec_runtime.packing import PackedLinear, can_pack, pack_linears
from xspec_runtime.policy import CREDIT, RETRY, PricedDrafter, row_costs, worthwhile
from xspec_runtime.targets.transformers import TransformersTarget
from xspec_runtime.text_workload import text_workload
from xspec_runtime.workloads import PLAIN, Settings

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


def random_tree(rng: random.Random, rows: int) -> DraftTree:
    tree = DraftTree.root(0)
    for token in range(1, rows):
        parent = rng.randrange(len(tree))
        tree.add(parent, token, tree.scores[parent] * rng.uniform(0.05, 1.0))
    return tree


def test_the_rows_kept_are_the_best_by_brute_force(rng: random.Random) -> None:
    for _ in range(200):
        rows = rng.randint(1, 20)
        tree = random_tree(rng, rows)
        costs = [1.0, *(rng.uniform(0.8, 3.0) for _ in range(rng.randint(0, 24)))]
        kept = worthwhile(tree, costs)
        # The same tokens stand for the same nodes here.
        assert all(
            tree.tokens[tree.parent_idx[token]] == kept.tokens[kept.parent_idx[i]]
            for i, token in enumerate(kept.tokens[1:], 1)
        )
        rates = [
            sum(tree.best(m).scores) / costs[m - 1] for m in range(1, min(rows, len(costs)) + 1)
        ]
        assert sum(kept.scores) / costs[len(kept) - 1] == pytest.approx(max(rates))


def test_nothing_is_drafted_where_it_cannot_pay() -> None:
    tree = DraftTree.chain(7, [1, 2, 3], [0.3, 0.2, 0.1])
    assert worthwhile(tree, [1.0, 1.4, 1.7, 2.0]).tokens == [7]
    assert worthwhile(tree, [1.0, 1.2, 1.6, 2.0]).tokens == [7, 1]
    assert worthwhile(tree, [1.0, 1.5, 1.5, 1.0]).tokens == [7, 1, 2, 3]


class Sure:
    """Always certain; the test decides whether it is right."""

    name = "sure"

    def begin(self, request: Request) -> None:
        pass

    def propose(self, context, rows: int) -> DraftTree:
        return DraftTree.chain(context[-1], [1] * (rows - 1))

    def end(self, answer) -> None:
        pass


@pytest.mark.parametrize("surplus", [0.05, 0.5, 2.0])
def test_regret_is_bounded_on_any_text(rng: random.Random, surplus: float) -> None:
    """Blocks of text on which every or no draft is accepted, in adversarial order."""
    costs = [1.0] + [1.0 + surplus] * 7
    drafter = PricedDrafter(Sure(), costs)
    worst = spent = tokens = drafted = 0.0
    for _ in range(40):
        right = rng.random() < 0.3
        drafter.begin(Request())
        context = [1]
        while len(context) < 60:
            tree = drafter.propose(context, 8)
            spent += costs[len(tree) - 1]
            emitted = len(tree) if right else 1
            tokens += emitted
            drafted += len(tree) > 1
            context += [1] * emitted
            # Against the best moment to have switched to plain decoding for good.
            worst = min(worst, spent - (1 + RETRY) * tokens)
            assert spent - (1 + RETRY) * tokens - worst <= CREDIT + surplus + 1e-9
        drafter.end(context)
    assert drafted > 40


def test_a_failed_draft_is_followed_by_another_try() -> None:
    drafter = PricedDrafter(Sure(), [1.0, 1.5, 1.5, 1.5])
    drafter.begin(Request())
    heights = [len(drafter.propose([1] * known, 4)) for known in range(1, 80)]
    assert heights[:2] == [4, 1]
    assert heights.count(4) >= 2
    assert sum(1.5 if height > 1 else 1.0 for height in heights) <= 79 * (1 + RETRY) + 0.5


@pytest.mark.parametrize("costs", [[], [1.0, 0.0], [-1.0]])
def test_costs_must_be_positive(costs: list[float]) -> None:
    with pytest.raises(ValueError, match="costs must be positive"):
        PricedDrafter(Sure(), costs)


class Timed:
    """A target whose verify of n rows takes ``1 + n / 10``; every other one is disturbed."""

    device = "cpu"

    def __init__(self) -> None:
        self.clock, self.calls = 0.0, 0

    def prefill(self, inputs) -> None:
        self.clock += 100.0

    def forward(self, tree: DraftTree) -> int:
        self.calls += 1
        self.clock += 1 + len(tree) / 10 + (5.0 if self.calls % 2 else 0.0)
        return len(tree)

    def accept(self, tree: DraftTree, logits: int, context) -> None:
        assert logits == len(tree)


def test_row_costs_are_relative_to_one_row(monkeypatch) -> None:
    target = Timed()
    monkeypatch.setattr(policy, "perf_counter", lambda: target.clock)
    assert row_costs(target, 20) == pytest.approx([(1 + m / 10) / 1.1 for m in range(1, 21)])
    assert row_costs(target, 1) == [1.0]
    with pytest.raises(ValueError, match=r"rows must be in 1\.\.64"):
        row_costs(target, 65)


def test_row_costs_of_a_real_target() -> None:
    target = TransformersTarget(mini.load("assistant"), 128)
    costs = row_costs(target, 6)
    assert len(costs) == 6 and costs[0] == 1.0 and min(costs) > 0


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
