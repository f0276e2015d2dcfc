"""Drafts that exist before the prefill: verified inside it, or seeding the rounds after it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
)

from tiny import VOCAB, OracleDrafter, prompt, reference, tiny_llama, tiny_video_llava
from xspec_runtime.batch import BatchDecoder, BatchPrompt
from xspec_runtime.config import SpecConfig
from xspec_runtime.drafters.base import DraftTree, Request
from xspec_runtime.engine import Generation, SpeculativeDecoder
from xspec_runtime.models import mini
from xspec_runtime.prefill import (
    DraftedText,
    Mismatches,
    count_mismatches,
    extend_inputs,
    placeholder_ids,
)
from xspec_runtime.targets.transformers import TransformersTarget
from xspec_runtime.workloads import MiniPair, Settings

NEW = 40
SEED = 21


class Run:
    """One answer, the rows of its forward passes, and its trees."""

    def __init__(self, target: TransformersTarget, config: SpecConfig, drafter=None) -> None:
        self.decoder = SpeculativeDecoder(target, drafter, config)
        self.heights: list[int] = []
        self.trees: list[DraftTree] = []

    def __call__(self, inputs, **options) -> Generation:
        model = self.decoder.target.model
        hook = model.register_forward_pre_hook(
            lambda _, __, kwargs: self.heights.append(kwargs["input_ids"].shape[1]),
            with_kwargs=True,
        )
        try:
            return self.decoder.generate(
                inputs, on_round=lambda tree, *_: self.trees.append(tree), **options
            )
        finally:
            hook.remove()


@pytest.fixture(scope="module")
def target() -> TransformersTarget:
    return TransformersTarget(tiny_llama(SEED), 128)


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return prompt(SEED)


@pytest.fixture(scope="module")
def truth(target: TransformersTarget, ids: torch.Tensor) -> list[int]:
    return reference(target.model, ids, NEW)


def wrong(token: int) -> int:
    return (token + 1) % VOCAB


DRAFTS: dict[str, tuple[Callable[[list[int]], list[int]], int]] = {
    "all right": (lambda truth: truth[:9], 9),
    "more than ride": (lambda truth: truth[:30], 15),
    "first wrong": (lambda truth: [wrong(truth[0]), *truth[1:9]], 0),
    "fifth wrong": (lambda truth: [*truth[:4], wrong(truth[4]), *truth[5:9]], 4),
    "one": (lambda truth: truth[:1], 1),
    "none": (lambda truth: [], 0),
}


@pytest.mark.parametrize("name", DRAFTS)
@pytest.mark.parametrize("mode", ["off", "exact", "fast"])
@pytest.mark.parametrize("drafter", [True, False])
def test_tokens_equal_generate(target, ids, truth, name: str, mode: str, drafter: bool) -> None:
    draft, right = DRAFTS[name]
    drafted = draft(truth)
    oracle = OracleDrafter(truth, 1, 0.5) if drafter else None
    run = Run(target, SpecConfig(16, NEW, prefill_fused=mode), oracle)
    out = run({"input_ids": ids}, drafted=drafted)
    assert out.tokens == truth
    riding = min(len(drafted), 15) if mode == "fast" else 0
    assert run.heights[0] == ids.shape[1] + riding
    assert out.prefill_drafted == riding
    assert out.prefill_accepted == (right if mode == "fast" else 0)
    assert sum(r.emitted for r in out.rounds) == NEW - 1 - out.prefill_accepted
    first = run.trees[0]
    if mode == "exact" and right > 1:
        known = [0]
        while (child := first.child(known[-1], truth[len(known)])) is not None:
            known.append(child)
        assert len(known) >= min(right, 16)
        assert out.rounds[0].accepted >= right - 1
    elif mode != "fast" and not drafter:
        assert len(first) == 1


def test_text_past_the_prefill_seeds_the_rounds_after_it(target, ids, truth) -> None:
    run = Run(target, SpecConfig(16, NEW, prefill_fused="fast"))
    out = run({"input_ids": ids}, drafted=truth[:30])
    # 15 ride, the bonus token is the 16th, and 14 are left for the first round.
    assert out.tokens == truth
    assert out.rounds[0].accepted == 14
    assert all(r.rows == 1 for r in out.rounds[1:])


@pytest.mark.parametrize("mode", ["exact", "fast"])
@pytest.mark.parametrize("budget", [1, 2, 5, 9])
def test_budget_and_end_of_sequence_inside_the_drafts(target, ids, truth, mode, budget) -> None:
    config = SpecConfig(16, budget, prefill_fused=mode)
    run = Run(target, config)
    assert run({"input_ids": ids}, drafted=truth[:9]).tokens == truth[:budget]
    assert run.heights[0] - ids.shape[1] == (min(9, budget - 1) if mode == "fast" else 0)
    stop = truth[4]
    config = SpecConfig(16, NEW, (stop,), mode)
    heard: list[int] = []
    out = Run(target, config)({"input_ids": ids}, drafted=truth[:9], on_tokens=heard.extend)
    assert out.tokens == heard == truth[: truth.index(stop) + 1]


def test_logits_processors_see_their_own_prefix(target, ids, truth) -> None:
    penalty = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.4)])
    plain = SpeculativeDecoder(target, None, SpecConfig(1, NEW))
    expected = plain.generate({"input_ids": ids}, logits_processor=penalty).tokens
    assert expected != truth
    for mode in ("exact", "fast"):
        run = Run(target, SpecConfig(16, NEW, prefill_fused=mode))
        out = run({"input_ids": ids}, drafted=expected[:12], logits_processor=penalty)
        assert out.tokens == expected
        assert out.prefill_accepted == (12 if mode == "fast" else 0)


class Opener(OracleDrafter):
    """An oracle that also says how the answer begins; notes the order of its calls."""

    def begin(self, request: Request) -> None:
        self.calls = ["begin"]

    def opening(self, rows: int) -> list[int]:
        self.calls.append("opening")
        return [*self.answer[: min(rows, 4)], wrong(self.answer[4])]

    def propose(self, context, rows: int) -> DraftTree:
        self.calls.append("propose")
        return super().propose(context, rows)


@pytest.mark.parametrize("mode", ["off", "exact", "fast"])
def test_a_drafter_opens_only_what_rides(target, ids, truth, mode: str) -> None:
    drafter = Opener(truth, 3)
    out = Run(target, SpecConfig(16, NEW, prefill_fused=mode), drafter)({"input_ids": ids})
    assert out.tokens == truth and out.begin_ms > 0
    assert out.prefill_accepted == (4 if mode == "fast" else 0)
    assert drafter.calls[: 3 if mode == "fast" else 2] == (
        ["begin", "opening", "propose"] if mode == "fast" else ["begin", "propose"]
    )


def test_drafts_that_do_not_fit_the_cache_stay_behind(target, ids, truth) -> None:
    tight = TransformersTarget(target.model, ids.shape[1] + 5)
    run = Run(tight, SpecConfig(16, 6, prefill_fused="fast"))
    out = run({"input_ids": ids}, drafted=truth[:9])
    assert out.tokens == truth[:6]
    tight = TransformersTarget(target.model, ids.shape[1] + 2)
    run = Run(tight, SpecConfig(16, 3, prefill_fused="fast"))
    assert run({"input_ids": ids}, drafted=truth[:9]).tokens == truth[:3]
    assert run.heights == [ids.shape[1] + 2]


def test_no_placeholder_rides_with_a_video() -> None:
    model, inputs, truth = tiny_video_llava(NEW)
    assert placeholder_ids(model.config) == {126, 127}
    target = TransformersTarget(model, 128)
    for drafted, riding in ((truth[:9], 9), ([*truth[:3], 127, *truth[4:9]], 3), ([126], 0)):
        run = Run(target, SpecConfig(16, NEW, prefill_fused="fast"))
        out = run(inputs, drafted=drafted)
        assert out.tokens == truth
        assert run.heights[0] == inputs["input_ids"].shape[1] + riding
        assert out.prefill_accepted == riding


def test_inputs_grow_with_the_prompt() -> None:
    ids = torch.tensor([[7, 8, 9]])
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "position_ids": torch.tensor([[2, 3, 4]]),
        "token_type_ids": torch.ones_like(ids),
        "pixel_values": torch.zeros(1, 2, 3, 5),
    }
    grown = extend_inputs(inputs, [5, 6])
    assert grown["input_ids"].tolist() == [[7, 8, 9, 5, 6]]
    assert grown["attention_mask"].tolist() == [[1] * 5]
    assert grown["position_ids"].tolist() == [[2, 3, 4, 5, 6]]
    assert grown["token_type_ids"].tolist() == [[1, 1, 1, 0, 0]]
    assert grown["pixel_values"] is inputs["pixel_values"]
    with pytest.raises(ValueError, match=r'cannot extend row_kinds .* use "exact"'):
        extend_inputs({**inputs, "row_kinds": ids}, [5])


def test_bad_input(target, ids) -> None:
    decoder = SpeculativeDecoder(target)
    with pytest.raises(ValueError, match=f"drafted ids must be in 0..{VOCAB - 1}, got 3..{VOCAB}"):
        decoder.generate({"input_ids": ids}, drafted=[3, VOCAB])
    with pytest.raises(ValueError, match="prefill_fused must be one of off, exact, fast"):
        SpecConfig(prefill_fused="quick")
    for heights in ((1,), (65,), (32, 16), (16, 16)):
        with pytest.raises(ValueError, match="pad_rows must ascend"):
            SpecConfig(pad_rows=heights)


def test_text_is_followed_until_it_differs() -> None:
    text = DraftedText([5, 6, 7, 8, 9])
    assert text.chain([5], 3).tokens == [5, 6, 7]
    assert text.chain([5, 6, 7], 16).tokens == [7, 8, 9]
    assert text.chain([5, 6, 7, 1], 16) is None
    assert text.chain([5, 6, 7, 1, 9], 16) is None
    assert DraftedText([5, 6]).chain([5, 6], 16) is None


def test_mismatches_are_counted() -> None:
    pairs = [([1, 2, 3], [1, 2, 3]), ([1, 2, 3], [1, 9]), ([4], [4, 5])]
    assert count_mismatches(pairs) == Mismatches(3, 2, 7, 3)
    assert count_mismatches([]) == Mismatches(0, 0, 0, 0)


def test_fast_against_exact_on_the_embedded_pair() -> None:
    pair = MiniPair(Settings())
    tasks = pair.scene_tasks(6)
    plain = SpeculativeDecoder(pair.target, None, SpecConfig(1, 128, (mini.EOS,)))
    truth = [plain.generate(task.inputs).tokens for task in tasks]
    # Answers to other scenes: right at first, then wrong.
    drafts = pair.answers[:6]
    answers = {}
    for mode in ("exact", "fast"):
        config = SpecConfig(16, 128, (mini.EOS,), mode)
        decoder = BatchDecoder(pair.target, None, config, 2)
        prompts = [
            BatchPrompt(task.inputs, task.request, drafted=drafted)
            for task, drafted in zip(tasks, drafts, strict=True)
        ]
        out = decoder.generate(prompts)
        answers[mode] = [o.tokens for o in out]
        if mode == "fast":
            assert sum(o.prefill_accepted for o in out) > 0
    found = count_mismatches(zip(answers["exact"], answers["fast"], strict=True))
    print(found)
    assert answers["exact"] == truth
    assert (found.different_answers, found.different_tokens) == (0, 0)
