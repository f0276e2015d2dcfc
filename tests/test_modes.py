"""Other ways to use two models as arms: their answers, what they promise, the cascade's chains."""

from __future__ import annotations

import json
import random

import pytest
import torch

from tiny import VOCAB, OracleDrafter, prompt, reference, tiny_llama
from xspec_runtime.drafters.base import DraftTree, Request
from xspec_runtime.drafters.cascade import CascadeDrafter, MiddleModel, best_path, skip_layers
from xspec_runtime.drafters.draft_model import ModelDrafter
from xspec_runtime.e2e import Options, run_e2e
from xspec_runtime.report import markdown_table, results_markdown, validate_results
from xspec_runtime.temperature import parse_temperatures
from xspec_runtime.workloads import MiniPair, Settings
from xspec_runtime.workloads.modes import MODES

NEW = 24


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("modes")
    arms = ",".join(("target", "draft", *MODES))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("xspec_runtime.plots.draw_all", lambda *_: [])
        return run_e2e(
            Options("", arms=arms, samples=2, warmup=0, max_new_tokens=32, output_dir=out)
        )


def test_every_mode_but_the_draft_alone_is_lossless(finished) -> None:
    validate_results(finished)
    found = {arm["name"]: arm for arm in finished["arms"]}
    alone = found.pop("draft_alone")
    assert all(arm["identical"] == arm["samples"] == 2 for arm in found.values())
    assert alone["identical"] is None and alone["tokens_per_verify"] is None
    assert 0 < alone["agreement"]["equal_tokens"] < 1
    assert found["parallel_prefill"]["tokens_per_verify"] == 1
    assert found["parallel_prefill"]["stages"]["hidden_tokens"] >= 0
    # The NF4 copy says nearly always what the target says, half of its layers often.
    assert found["self_nf4"]["acceptance_rate"] > 0.9 > found["self_skip"]["acceptance_rate"] > 0.4
    assert found["cascade"]["tokens_per_verify"] > found["self_nf4"]["tokens_per_verify"]


def test_what_promises_nothing_is_told_apart(finished) -> None:
    rows = markdown_table(finished).splitlines()
    (row,) = (r for r in rows if r.startswith("| draft_alone"))
    assert "no claim" in row
    page = results_markdown(finished)
    assert "## Not lossless" in page and "draft_alone is not lossless: 0 of 2 answers" in page


def test_modes_run_only_where_they_are_named() -> None:
    pair = MiniPair(Settings(max_new_tokens=4))
    work = pair.workload([])
    assert set(MODES) <= set(work.arms) and set(work.optional) == set(MODES)
    packed = MiniPair(Settings(max_new_tokens=4, weights="nf4")).workload([])
    assert {"self_nf4", "cascade"}.isdisjoint(packed.arms) and "self_skip" in packed.arms


def middle(seed: int, gamma: int = 3) -> MiddleModel:
    return MiddleModel(tiny_llama(seed), gamma, capacity=128)


def test_a_cascade_proposes_what_its_middle_model_says(seed) -> None:
    """Whatever the small draft says and the target rejected, the chain is the middle's greedy
    continuation of the context.
    """
    model, ids, draw = tiny_llama(seed), prompt(seed), random.Random(seed)
    request = Request(ids[0].tolist(), {"input_ids": ids}, {"input_ids": ids})
    for draft in (OracleDrafter(reference(model, ids, NEW), seed, 0.9),
                  ModelDrafter(tiny_llama(seed + 1), 4, capacity=128)):  # fmt: skip
        drafter = CascadeDrafter(draft, middle(seed), step=4)
        drafter.begin(request)
        context = [draw.randrange(3, VOCAB)]
        for _ in range(5):
            tree = drafter.propose(context, draw.randint(2, 8))
            wanted = reference(model, torch.cat([ids, torch.tensor([context])], 1), len(tree) - 1)
            assert tree.tokens[1:] == wanted
            assert tree.parent_idx == list(range(-1, len(tree) - 1))
            assert all(a >= b > 0 for a, b in zip(tree.scores, tree.scores[1:], strict=False))
            # The target takes some of them and says something else.
            context += [*wanted[: draw.randrange(len(tree))], draw.randrange(3, VOCAB)]


def test_a_cascade_ends_with_the_answer_and_below_its_floor(seed) -> None:
    model, ids = tiny_llama(seed), prompt(seed)
    request = Request(ids[0].tolist(), {"input_ids": ids}, {"input_ids": ids})
    answer = reference(model, ids, NEW)
    end = answer[4]
    chain = CascadeDrafter(OracleDrafter(answer, seed, 1.0), middle(seed), 3, ends=(end,))
    chain.begin(request)
    assert chain.propose(answer[:1], 16).tokens == answer[: answer.index(end, 1) + 1]
    doubtful = CascadeDrafter(OracleDrafter(answer, seed, 0.0), middle(seed), 3, floor=1.0)
    doubtful.begin(request)
    assert len(doubtful.propose(answer[:1], 16)) == 2
    with pytest.raises(ValueError, match="step must be at least 1, got 0"):
        CascadeDrafter(doubtful, middle(seed), 0)


def test_best_path() -> None:
    tree = DraftTree.chain(1, [2, 3], [0.5, 0.2])
    tree.add(0, 4, 0.7)
    tree.add(3, 5, 0.1)
    assert best_path(tree) == [4, 5] and best_path(DraftTree.root(1)) == []


def test_layers_are_skipped_in_a_copy(seed) -> None:
    model, ids = tiny_llama(seed), prompt(seed)
    before = model(ids).logits
    less = skip_layers(model)
    assert [len(m.get_decoder().layers) for m in (model, less)] == [3, 2]
    assert (model.config.num_hidden_layers, less.config.num_hidden_layers) == (3, 2)
    assert less.lm_head.weight is model.lm_head.weight
    torch.testing.assert_close(model(ids).logits, before)
    assert len(reference(less, ids, 5)) == 5
    with pytest.raises(ValueError, match="2 decoder layers has none to skip"):
        skip_layers(less)


def test_temperatures(tmp_path, monkeypatch) -> None:
    values = {"samples": 1, "warmup": 0, "max_new_tokens": 14, "temperature": "0,3"}
    monkeypatch.setattr("xspec_runtime.plots.draw_speedups", lambda *_: False)
    monkeypatch.setattr("xspec_runtime.plots.draw_timeline", lambda *_: False)
    monkeypatch.setattr("xspec_runtime.plots.draw_histogram", lambda *_: False)
    first = run_e2e(Options("", output_dir=tmp_path / "a", **values))
    second = run_e2e(Options("", output_dir=tmp_path / "b", arms="target,draft", **values))
    rows = first["temperatures"]
    assert [r["temperature"] for r in rows] == [0.0] * 4 + [3.0] * 4
    assert [r["arm"] for r in rows[:4]] == ["target", "draft", "ngram_tree", "tree"]
    assert all(r["identical"] == r["samples"] == 1 for r in rows)

    def timeless(rows: list[dict]) -> list[dict]:
        kept = (r for r in rows if r["arm"] in ("target", "draft"))
        return [{k: v for k, v in r.items() if k != "speedup_total"} for r in kept]

    assert timeless(rows) == timeless(second["temperatures"])
    draft = [r for r in rows if r["arm"] == "draft"]
    assert draft[0]["as_first"] == 1 > draft[1]["as_first"]
    assert draft[0]["acceptance_rate"] > draft[1]["acceptance_rate"]
    assert (tmp_path / "a" / "temperature.png").stat().st_size > 0
    page = (tmp_path / "a" / "RESULTS.md").read_text()
    assert "## Temperature" in page and "| draft | 3 |" in page
    assert json.loads((tmp_path / "a" / "results.json").read_text())["complete"]


@pytest.mark.parametrize(
    ("text", "arms", "message"),
    [
        ("0,warm", "", "0 or numbers in 0.001..10, got 'warm'"),
        ("-1", "", "got '-1'"),
        ("nan", "", "got 'nan'"),
        ("0,0.0", "", "--temperature names 0.0 more than once"),
        ("1", "target,hf_generate", "the arm 'hf_generate' is greedy here"),
        ("1", "target,draft_alone", "the arm 'draft_alone' is greedy here"),
    ],
)
def test_bad_temperatures(text, arms, message, tmp_path) -> None:
    with pytest.raises(ValueError, match=message):
        run_e2e(Options("", temperature=text, arms=arms, output_dir=tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    assert parse_temperatures(" 0, 1e-2 ,") == [0.0, 0.01]
