"""Batches: every request gets the tokens it would get alone, whatever runs beside it."""

from __future__ import annotations

import random
from collections import defaultdict

import pytest
import torch
from transformers import (
    LlamaForCausalLM,
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)

from tiny import VOCAB, OracleDrafter, prompt, reference, tiny_llama
from xspec_runtime.batch import BatchDecoder, BatchPrompt
from xspec_runtime.batch_cache import BatchKVCache
from xspec_runtime.config import SpecConfig
from xspec_runtime.drafters.base import DraftTree, Request
from xspec_runtime.drafters.draft_model import ModelDrafter
from xspec_runtime.drafters.merge import MergedDrafter
from xspec_runtime.drafters.ngram import NgramDrafter
from xspec_runtime.engine import SpeculativeDecoder
from xspec_runtime.models import mini
from xspec_runtime.targets.batch import BatchTarget
from xspec_runtime.targets.transformers import TransformersTarget
from xspec_runtime.workloads import MiniPair, Settings

NEW = 40
LENGTHS = (5, 31, 12, 20, 1, 47, 9)


class KnowsAnswers(OracleDrafter):
    """An oracle that finds the right answer by the prompt."""

    def __init__(self, answers: dict[tuple[int, ...], list[int]], seed: int, hit: float) -> None:
        super().__init__([], seed, hit)
        self.answers = answers

    def begin(self, request: Request) -> None:
        self.answer = self.answers[tuple(request.prompt_ids)]


class Case:
    """A tiny model, ragged prompts, transformers' own answers, and drafters that know them."""

    def __init__(self, seed: int, kv_heads: int = 2, lengths: tuple[int, ...] = LENGTHS) -> None:
        self.model: LlamaForCausalLM = tiny_llama(seed, kv_heads)
        self.ids = [prompt(seed + i, length) for i, length in enumerate(lengths)]
        self.truth = [reference(self.model, ids, NEW) for ids in self.ids]
        self.target = TransformersTarget(self.model, 160)
        self.inputs = [{"input_ids": ids} for ids in self.ids]
        self.made = 0

    def decoder(self, config: SpecConfig, batch: int, hits: tuple[float, ...] = (0.8,)):
        known = {
            tuple(ids[0].tolist()): answer for ids, answer in zip(self.ids, self.truth, strict=True)
        }
        self.made = 0

        def make() -> KnowsAnswers:
            self.made += 1
            return KnowsAnswers(known, self.made, hits[self.made % len(hits)])

        return BatchDecoder(self.target, make if config.rows > 1 else None, config, batch)


@pytest.fixture(scope="module")
def case() -> Case:
    return Case(11)


@pytest.mark.parametrize("rows", [1, 6, 33])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_tokens_equal_generate(rows: int, kv_heads: int) -> None:
    case = Case(kv_heads, kv_heads)
    # Tokens that end some answers early, so that requests leave and join at different rounds.
    stops = (case.truth[0][7], case.truth[3][2])
    config = SpecConfig(rows, NEW, stops)
    decoder = case.decoder(config, batch=3)
    for _ in range(2):
        out = decoder.generate(case.inputs)
        assert [o.tokens for o in out] == [config.cut(answer, 0) for answer in case.truth]
        assert all(sum(r.emitted for r in o.rounds) == len(o.tokens) - 1 for o in out)
    assert len({len(o.tokens) for o in out}) > 2
    assert case.made == (0 if rows == 1 else 3)


@pytest.mark.parametrize("hits", [(0.0,), (1.0,), (0.0, 1.0)])
def test_none_all_and_mixed_acceptance(case: Case, hits: tuple[float, ...]) -> None:
    out = case.decoder(SpecConfig(16, NEW), 4, hits).generate(case.inputs)
    assert [o.tokens for o in out] == case.truth
    accepted = [r.accepted for o in out for r in o.rounds]
    assert max(accepted) > 4 if 1.0 in hits else max(accepted) < 3


@pytest.mark.parametrize("budget", [1, 2, 3])
def test_budget_inside_an_accepted_path(case: Case, budget: int) -> None:
    out = case.decoder(SpecConfig(16, budget), 3, (1.0,)).generate(case.inputs)
    assert [o.tokens for o in out] == [answer[:budget] for answer in case.truth]


def test_tokens_arrive_in_order_by_prompt(case: Case) -> None:
    heard: dict[int, list[int]] = defaultdict(list)
    decoder = case.decoder(SpecConfig(6, NEW), 2)
    out = decoder.generate(case.inputs, lambda index, tokens: heard[index].extend(tokens))
    assert [heard[i] for i in range(len(out))] == [o.tokens for o in out] == case.truth
    assert all(o.prefill_ms > 0 and o.decode_ms > 0 for o in out)
    assert decoder.generate([]) == []


def test_every_request_has_its_own_processors(case: Case) -> None:
    chosen = [
        None,
        LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.4)]),
        LogitsProcessorList([NoRepeatNGramLogitsProcessor(1)]),
        None,
    ]
    for rows in (1, 6, 33):
        config = SpecConfig(rows, NEW)
        alone = SpeculativeDecoder(case.target, None, SpecConfig(1, NEW))
        truth = [
            alone.generate(x, logits_processor=p).tokens
            for x, p in zip(case.inputs, chosen, strict=False)
        ]
        prompts = [
            BatchPrompt(x, logits_processor=p) for x, p in zip(case.inputs, chosen, strict=False)
        ]
        out = case.decoder(config, 4).generate(prompts)
        assert [o.tokens for o in out] == truth
    assert truth[0] == case.truth[0] and truth[1] != case.truth[1] and truth[2] != case.truth[2]


@pytest.mark.parametrize("rows", [1, 16])
def test_capacity_exactly_enough_and_one_too_few(case: Case, rows: int) -> None:
    longest = max(LENGTHS)
    target, config = case.target, SpecConfig(rows, NEW)
    exact = TransformersTarget(case.model, longest + NEW - 1)
    case.target = exact
    try:
        out = case.decoder(config, 3).generate(case.inputs)
        assert [o.tokens for o in out] == case.truth
        drafter = OracleDrafter(case.truth[5], 1) if rows > 1 else None
        alone = SpeculativeDecoder(exact, drafter, config)
        assert alone.generate(case.inputs[5]).tokens == case.truth[5]
        case.target = TransformersTarget(case.model, longest + NEW - 2)
        heard: list[int] = []
        with pytest.raises(ValueError, match=r"prompt 5: 47 rows .* capacity 85"):
            case.decoder(config, 3).generate(case.inputs, lambda index, _: heard.append(index))
        assert not heard
    finally:
        case.target = target


def test_malformed_prompts_are_named_before_work_starts(case: Case) -> None:
    decoder = case.decoder(SpecConfig(6, NEW), 2)
    twice = {"input_ids": case.ids[0].expand(2, -1)}
    with pytest.raises(ValueError, match=r"prompt 1: input_ids must be \[1, length\]"):
        decoder.generate([case.inputs[0], twice])
    with pytest.raises(ValueError, match="prompt 0: drafted ids must be"):
        decoder.generate([BatchPrompt(case.inputs[0], drafted=[3, VOCAB])])
    with pytest.raises(ValueError, match="batch must be at least 1, got 0"):
        BatchDecoder(case.target, batch=0)


def test_heights_of_the_forward_pass(case: Case) -> None:
    seen: set[tuple[int, ...]] = set()
    hook = case.model.register_forward_pre_hook(
        lambda _, __, kwargs: seen.add(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    try:
        config = SpecConfig(20, NEW, pad_rows=(8, 32))
        out = case.decoder(config, 7).generate(case.inputs)
        assert [o.tokens for o in out] == case.truth
        alone = SpeculativeDecoder(case.target, None, config)
        drafted = case.truth[0][:6]
        assert alone.generate(case.inputs[0], drafted=drafted).tokens == case.truth[0]
    finally:
        hook.remove()
    prefills = {(1, length) for length in LENGTHS}
    assert {height for _, height in seen - prefills} <= {1, 8, 32}
    assert {(1, 8), (7, 32)} <= seen


def test_rows_of_a_batch_equal_rows_alone(case: Case, rng: random.Random) -> None:
    batch = BatchTarget(case.target, 4)
    trees = []
    for inputs, rows in zip(case.inputs[:4], (1, 9, 20, 4), strict=True):
        batch.prefill(inputs)
        parents = [-1, *(rng.randrange(i) for i in range(1, rows))]
        tokens = [rng.randrange(VOCAB) for _ in range(rows)]
        trees.append(DraftTree(tokens, parents, [1.0] * rows))
    with pytest.raises(RuntimeError, match="4 requests are running"):
        batch.prefill(case.inputs[4])
    logits = batch.forward(trees, height=24)
    assert logits.shape == (4, 24, VOCAB)
    for i, tree in enumerate(trees):
        case.target.prefill(case.inputs[i])
        torch.testing.assert_close(
            logits[i, : len(tree)], case.target.forward(tree), rtol=1e-4, atol=1e-4
        )


def test_released_slot_takes_the_last_request() -> None:
    cache = BatchKVCache(num_layers=2, capacity=8, batch=3)
    rows = [torch.randn(1, 2, length, 4) for length in (3, 5, 2)]
    for slot, kv in zip(cache.slots, rows, strict=True):
        for layer in slot.layers:
            layer.update(kv, -kv)
        slot.advance(kv.shape[2])
        cache.active += 1
    pointers = [layer.keys.data_ptr() for layer in cache.layers]
    cache.release(0)
    assert [slot.length for slot in cache.slots] == [2, 5, 0] and cache.longest == 5
    for layer in cache.layers:
        assert torch.equal(layer.keys[0, :, :2], rows[2][0])
        assert torch.equal(layer.values[1, :, :5], -rows[1][0])
    cache.release(1)
    assert cache.active == 1 and cache.longest == 2
    assert pointers == [layer.keys.data_ptr() for layer in cache.layers]


def test_what_a_failed_run_left_does_no_harm(case: Case) -> None:
    decoder = case.decoder(SpecConfig(6, NEW), 3)
    embedding = case.model.get_input_embeddings().weight
    # Only the second prompt holds the damaged token, only when the first one runs already.
    token = next(t for t in case.ids[1][0].tolist() if t not in case.ids[0][0].tolist())
    kept = embedding[token].clone()
    embedding[token] = float("nan")
    with pytest.raises(RuntimeError, match="logits are NaN"):
        decoder.generate(case.inputs)
    embedding[token] = kept
    short = [4, 0, 6]
    out = decoder.generate([case.inputs[i] for i in short])
    assert [o.tokens for o in out] == [case.truth[i] for i in short]


def test_embedded_pair_with_shared_memory_and_drafts() -> None:
    pair = MiniPair(Settings())
    tasks = pair.scene_tasks(7)
    config = SpecConfig(16, pair.settings.max_new_tokens, (mini.EOS,))
    plain = SpeculativeDecoder(pair.target, None, SpecConfig(1, 128, (mini.EOS,)))
    truth = [plain.generate(task.inputs).tokens for task in tasks]
    memory = pair.memory()
    known = len(memory)

    def make() -> MergedDrafter:
        return MergedDrafter(
            [NgramDrafter(memory, online=True), ModelDrafter(pair.draft_model, 5, siblings=1)],
            enough=2.5,
        )

    decoder = BatchDecoder(pair.target, make, config, 3)
    out = decoder.generate([BatchPrompt(task.inputs, task.request) for task in tasks])
    assert [o.tokens for o in out] == truth
    assert len(memory) == known + len(tasks)
    assert all(o.tokens_per_verify > 1.5 for o in out)
