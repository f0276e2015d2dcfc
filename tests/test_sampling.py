"""Decoders that sample: the tokens of plain sampling by the same seed, which follow the law."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)

from sampling_cases import LEVEL, p_value, warped
from tiny import VOCAB, OracleDrafter, prompt, reference, tiny_llama
from xspec_runtime.batch import BatchDecoder, BatchPrompt
from xspec_runtime.config import SpecConfig
from xspec_runtime.engine import SpeculativeDecoder
from xspec_runtime.targets.llama import LlamaTarget
from xspec_runtime.targets.sampling import Sampling
from xspec_runtime.targets.transformers import TransformersTarget
from xspec_runtime.workloads import MiniPair, Settings

NEW = 24
LAWS = {
    "all": {"temperature": 1.0},
    "top_k": {"temperature": 1.5, "top_k": 20},
    "top_p": {"temperature": 0.9, "top_p": 0.9},
}
TARGETS = {
    "transformers": lambda model: TransformersTarget(model, 160),
    "llama": lambda model: LlamaTarget(model, 160, graphs=True),
}


@pytest.fixture(scope="module")
def model():
    return tiny_llama(3)


@pytest.fixture(params=TARGETS)
def target(model, request):
    return TARGETS[request.param](model)


def plain(target, inputs, seed: int, processors=None, **law) -> list[int]:
    decoder = SpeculativeDecoder(target, None, SpecConfig(1, NEW, **law))
    return decoder.generate(inputs, logits_processor=processors, seed=seed).tokens


@pytest.mark.parametrize(("law", "rows"), [("all", 2), ("top_k", 16), ("top_p", 33)])
def test_drafts_change_no_token(target, law, rows):
    inputs = {"input_ids": prompt(3)}
    truth = plain(target, inputs, 11, **LAWS[law])
    config = SpecConfig(rows, NEW, seed=11, **LAWS[law])
    for hit in (0.3, 1.0):
        decoder = SpeculativeDecoder(target, OracleDrafter(truth, rows, hit), config)
        out = decoder.generate(inputs)
        assert out.tokens == truth and out.near_ties == 0
        assert hit < 1 or out.tokens_per_verify > 1.5


def test_one_answer_a_seed(target):
    inputs = {"input_ids": prompt(3)}
    answers = [plain(target, inputs, seed, temperature=1.0) for seed in (-1, 0, 1, 0)]
    assert answers[1] == answers[3]
    assert len(set(map(tuple, answers))) == 3


def test_backends_and_targets_agree(model):
    inputs = {"input_ids": prompt(3)}
    law = {"temperature": 1.0, "top_k": 30, "top_p": 0.95}
    answers = [
        plain(make(model, 160, backend), inputs, 5, **law)
        for make in (TransformersTarget, LlamaTarget)
        for backend in ("auto", "torch")
    ]
    assert all(answer == answers[0] for answer in answers)


def test_temperature_zero_is_greedy(target, model):
    ids = prompt(3)
    config = SpecConfig(1, NEW, temperature=0, top_k=3, top_p=0.5, seed=9)
    truth = reference(model, ids, NEW)
    decoder = SpeculativeDecoder(target, None, config)
    assert decoder.generate({"input_ids": ids}).tokens == truth
    # A request that samples leaves nothing to the next one.
    plain(target, {"input_ids": ids}, 1, temperature=2.0)
    assert decoder.generate({"input_ids": ids}).tokens == truth


def test_processors_come_before_the_law(target):
    inputs = {"input_ids": prompt(3)}
    chosen = LogitsProcessorList(
        [RepetitionPenaltyLogitsProcessor(1.5), NoRepeatNGramLogitsProcessor(1)]
    )
    law = {"temperature": 1.2, "top_p": 0.9}
    truth = plain(target, inputs, 4, chosen, **law)
    assert len(set(truth)) == NEW
    decoder = SpeculativeDecoder(target, OracleDrafter(truth, 2), SpecConfig(16, NEW, **law))
    assert decoder.generate(inputs, logits_processor=chosen, seed=4).tokens == truth


@pytest.mark.parametrize("fused", ["exact", "fast"])
def test_drafts_that_ride_in_the_prefill(target, fused):
    inputs, law = {"input_ids": prompt(3)}, {"temperature": 1.0}
    truth = plain(target, inputs, 6, **law)
    config = SpecConfig(16, NEW, prefill_fused=fused, seed=6, **law)
    drafted = [*truth[:9], (truth[9] + 1) % VOCAB, *truth[10:14]]
    out = SpeculativeDecoder(target, None, config).generate(inputs, drafted=drafted)
    assert out.tokens == truth
    assert out.prefill_accepted == (9 if fused == "fast" else 0)


@pytest.mark.parametrize("rows", [1, 16])
def test_a_batch_gives_every_request_its_own_numbers(target, rows):
    law = {"temperature": 1.0, "top_p": 0.97}
    inputs = [{"input_ids": prompt(i % 2, 9 + i % 2)} for i in range(6)]
    penalty = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.3)])
    processors = [None, None, penalty, None, None, None]
    seeds = [7, 8, 7, 7, 8, 7]
    truth = [
        plain(target, one, seed, processor, **law)
        for one, seed, processor in zip(inputs, seeds, processors, strict=True)
    ]
    assert truth[0] != truth[2] and truth[1] != truth[3] and truth[3] == truth[5]
    prompts = [
        BatchPrompt(one, seed=seed, logits_processor=processor)
        for one, seed, processor in zip(inputs, seeds, processors, strict=True)
    ]
    known = iter(truth)
    decoder = BatchDecoder(
        target,
        (lambda: OracleDrafter(next(known), rows)) if rows > 1 else None,
        SpecConfig(rows, NEW, **law),
        4,
    )
    assert [out.tokens for out in decoder.generate(prompts)] == truth


def test_prompts_without_a_seed_differ_by_place(model):
    inputs = {"input_ids": prompt(3)}
    target = TransformersTarget(model, 160)
    config = SpecConfig(1, NEW, temperature=1.0, seed=5)
    first = BatchDecoder(target, None, config, 2).generate([inputs] * 4)
    again = BatchDecoder(target, None, config, 4).generate([inputs] * 4)
    assert [a.tokens for a in first] == [a.tokens for a in again]
    assert len({tuple(a.tokens) for a in first}) == 4
    assert first[0].tokens == plain(target, inputs, 5, temperature=1.0)


def test_answers_follow_transformers_law(model):
    """Two tokens in a row over many seeds against the products of transformers' probabilities."""
    ids, law = prompt(3), {"temperature": 0.8, "top_k": 5, "top_p": 0.95}
    follows = warped(model(ids).logits[:, -1], **law)[0]
    first = follows.nonzero()[:, 0]
    pairs = torch.cat([ids.expand(len(first), -1), first[:, None]], 1)
    joint = torch.zeros(VOCAB, VOCAB, dtype=torch.float64)
    joint[first] = follows[first, None] * warped(model(pairs).logits[:, -1], **law)
    config = SpecConfig(8, 3, **law)
    drafter = OracleDrafter([int(follows.argmax()), *range(9)], 1)
    decoder = SpeculativeDecoder(TransformersTarget(model, 64), drafter, config)
    counts = torch.zeros(VOCAB, VOCAB, dtype=torch.int64)
    for seed in range(250):
        tokens = decoder.generate({"input_ids": ids}, seed=seed).tokens
        counts[tokens[0], tokens[1]] += 1
    assert p_value(counts.flatten(), joint.flatten()) > LEVEL
    # The same counts do not fit independent tokens.
    apart = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    assert p_value(counts.flatten(), apart.flatten()) < LEVEL**2


def test_numbers_are_uniform_and_apart():
    """Over seeds, streams and positions, alone and in pairs."""
    for step in ("seed", "stream"):
        law = (1.0, 0, 1.0)
        made = [
            Sampling(*law, i, 0) if step == "seed" else Sampling(*law, 3, i) for i in range(400)
        ]
        numbers = torch.stack([torch.from_numpy(one.uniforms(2, 50)) for one in made])
        assert numbers.min() >= 0 and numbers.max() < 1
        assert len(numbers.unique()) == numbers.numel()
        cells = (numbers * 8).long()
        pairs = [
            cells.flatten(),
            (8 * cells[:, 1:] + cells[:, :-1]).flatten(),
            (8 * cells[1:] + cells[:-1]).flatten(),
        ]
        for values, kinds in zip(pairs, (8, 64, 64), strict=True):
            counts = torch.bincount(values, minlength=kinds)
            assert p_value(counts, torch.full((kinds,), 1 / kinds)) > LEVEL
        assert torch.equal(numbers[7, 10:20], torch.from_numpy(made[7].uniforms(12, 10)))


def test_embedded_pair_samples_alike_with_and_without_drafts():
    """At a temperature at which no two answers are the same."""
    pair = MiniPair(Settings())
    law = {"temperature": 2.5, "top_k": 8}
    answers, accepted = [], 0
    for task in pair.scene_tasks(2):
        for seed in (0, 1):
            answers.append(plain(pair.target, task.inputs, seed, **law))
            decoder = SpeculativeDecoder(
                pair.target, pair.drafter("ngram_tree"), SpecConfig(16, NEW, **law)
            )
            out = decoder.generate(task.inputs, task.request, seed=seed)
            assert out.tokens == answers[-1]
            accepted += sum(r.accepted for r in out.rounds)
    assert len(set(map(tuple, answers))) == 4 and accepted > 20


def test_one_law_a_batch(model):
    target = TransformersTarget(model, 160).batched(2)
    target.prefill({"input_ids": prompt(1)}, sampling=Sampling(1.0, 0, 1.0, 1))
    for other in (Sampling(0.5, 0, 1.0, 1), None):
        with pytest.raises(ValueError, match="by one law"):
            target.prefill({"input_ids": prompt(1)}, sampling=other)
    target.prefill({"input_ids": prompt(1)}, sampling=Sampling(1.0, 0, 1.0, 2))


def test_nan_logits_are_an_error(model):
    broken = tiny_llama(3)
    broken.lm_head.weight[5] = float("nan")
    decoder = SpeculativeDecoder(
        TransformersTarget(broken, 160), None, SpecConfig(1, NEW, temperature=1.0)
    )
    with pytest.raises(RuntimeError, match="logits are NaN"):
        decoder.generate({"input_ids": prompt(3)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": -0.1}, "temperature must be 0 or in 1e-6..1e6, got -0.1"),
        ({"temperature": float("nan")}, "temperature must be 0 or in"),
        ({"top_k": -2}, "top_k must be 0"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"top_p": 1.01}, "top_p must be above 0"),
    ],
)
def test_bad_configuration(changes, message):
    with pytest.raises(ValueError, match=message):
        SpecConfig(**changes)
