"""The round: lossless against transformers' generate, whatever is drafted."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)

from tiny import SIZES, VOCAB, OracleDrafter, prompt, reference, tiny_llama, tiny_video_llava
from xspec_runtime.config import SpecConfig
from xspec_runtime.drafters.base import DraftTree, Request
from xspec_runtime.drafters.draft_model import ModelDrafter
from xspec_runtime.drafters.llama_steps import LlamaSteps
from xspec_runtime.engine import SpeculativeDecoder
from xspec_runtime.targets.transformers import TransformersTarget, row_flags

NEW = 60


@pytest.mark.parametrize("rows", [1, 2, 6, 16, 33, 64])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_tokens_equal_generate(rows: int, kv_heads: int) -> None:
    model, ids = tiny_llama(kv_heads, kv_heads), prompt(kv_heads)
    truth = reference(model, ids, NEW)
    drafter = OracleDrafter(truth, seed=rows)
    decoder = SpeculativeDecoder(TransformersTarget(model, 256), drafter, SpecConfig(rows, NEW))
    for _ in range(2):
        out = decoder.generate({"input_ids": ids})
        assert out.tokens == truth
        assert drafter.ended == truth
        assert sum(r.emitted for r in out.rounds) == NEW - 1
    if rows > 2:
        assert out.tokens_per_verify > 1.5


@pytest.mark.parametrize("hit", [0.0, 1.0])
def test_none_and_all_accepted(hit: float) -> None:
    model, ids = tiny_llama(3), prompt(3)
    truth = reference(model, ids, NEW)
    decoder = SpeculativeDecoder(
        TransformersTarget(model, 256), OracleDrafter(truth, 0, hit), SpecConfig(16, NEW)
    )
    out = decoder.generate({"input_ids": ids})
    assert out.tokens == truth


@pytest.mark.parametrize(
    "options",
    [{"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 2}, {"min_new_tokens": 20}],
    ids=lambda options: next(iter(options)),
)
@pytest.mark.parametrize("rows", [1, 6, 33])
def test_logits_processors_see_their_own_prefix(options: dict, rows: int) -> None:
    model, ids = tiny_llama(1), prompt(1)
    stop = reference(model, ids, NEW)[5]
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=stop,
        pad_token_id=0,
        **options,
    )
    truth = out[0, ids.shape[1] :].tolist()
    processors = {
        "repetition_penalty": RepetitionPenaltyLogitsProcessor,
        "no_repeat_ngram_size": NoRepeatNGramLogitsProcessor,
        "min_new_tokens": lambda n: MinNewTokensLengthLogitsProcessor(ids.shape[1], n, stop),
    }
    name, value = next(iter(options.items()))
    decoder = SpeculativeDecoder(
        TransformersTarget(model, 256), OracleDrafter(truth, 3), SpecConfig(rows, NEW, (stop,))
    )
    chosen = LogitsProcessorList([processors[name](value)])
    result = decoder.generate({"input_ids": ids}, logits_processor=chosen)
    assert result.tokens == truth
    # A request without processors is not touched by the one before.
    assert decoder.generate({"input_ids": ids}).tokens[-1] == stop


def test_end_of_sequence_inside_an_accepted_path() -> None:
    model, ids = tiny_llama(5), prompt(5)
    truth = reference(model, ids, NEW)
    stop = truth[17]
    expected = truth[: truth.index(stop) + 1]
    decoder = SpeculativeDecoder(
        TransformersTarget(model, 256), OracleDrafter(truth, 1, 1.0), SpecConfig(33, NEW, (stop,))
    )
    seen: list[int] = []
    out = decoder.generate({"input_ids": ids}, on_tokens=seen.extend)
    assert out.tokens == expected == seen


@pytest.mark.parametrize("budget", [1, 2, 3, 7])
def test_budget_inside_an_accepted_path(budget: int) -> None:
    model, ids = tiny_llama(6), prompt(6)
    truth = reference(model, ids, NEW)
    decoder = SpeculativeDecoder(
        TransformersTarget(model, 256), OracleDrafter(truth, 1, 1.0), SpecConfig(16, budget)
    )
    assert decoder.generate({"input_ids": ids}).tokens == truth[:budget]


@pytest.mark.parametrize("same", [True, False])
def test_draft_model_rewinds_to_the_verified_prefix(same: bool) -> None:
    model, ids = tiny_llama(7), prompt(7)
    truth = reference(model, ids, NEW)
    draft = ModelDrafter(tiny_llama(7 if same else 8), gamma=5)
    config = SpecConfig.chain(5, max_new_tokens=NEW)
    decoder = SpeculativeDecoder(TransformersTarget(model, 256), draft, config)
    request = Request(draft_inputs={"input_ids": ids})
    for _ in range(2):
        out = decoder.generate({"input_ids": ids}, request)
        assert out.tokens == truth
        # The same weights predict the target: every round but the last accepts everything.
        assert not same or all(r.accepted == 5 for r in out.rounds[:-1])


def test_draft_siblings_stay_within_rows() -> None:
    draft = ModelDrafter(tiny_llama(9), gamma=5, siblings=3)
    draft.begin(Request(draft_inputs={"input_ids": prompt(9)}))
    tree = draft.propose([4, 9, 2], rows=8)
    assert len(tree) <= 8
    assert all(tree.scores[i] <= tree.scores[p] for i, p in enumerate(tree.parent_idx) if p >= 0)


def test_video_llava_equals_generate() -> None:
    model, inputs, truth = tiny_video_llava(40)
    decoder = SpeculativeDecoder(
        TransformersTarget(model, 256), OracleDrafter(truth, 2), SpecConfig(16, 40)
    )
    assert decoder.generate(inputs).tokens == truth


def test_rounds_report_rows_and_times() -> None:
    model, ids = tiny_llama(1), prompt(1)
    truth = reference(model, ids, NEW)
    trees: list[DraftTree] = []
    decoder = SpeculativeDecoder(
        TransformersTarget(model, 256), OracleDrafter(truth, 1), SpecConfig(6, NEW)
    )
    out = decoder.generate({"input_ids": ids}, on_round=lambda tree, *_: trees.append(tree))
    assert [len(t) for t in trees] == [r.rows for r in out.rounds]
    parts = sum(r.propose_ms + r.verify_ms for r in out.rounds)
    assert 0 < parts <= out.decode_ms


def test_near_ties_counts_gaps_below_two_ulp() -> None:
    ulp = torch.finfo(torch.float32).eps * 4
    rows = [[4.0, 4.0 + ulp, 0.0], [4.0, 4.0 + 2 * ulp, 0.0], [4.0, 4.0, 4.0]]
    logits = torch.tensor([*rows, [1.0, float("nan"), 0.0]])
    assert row_flags(logits).tolist() == [1, 0, 1, 2]


def test_nan_weights_are_an_error() -> None:
    model = tiny_llama(2)
    model.lm_head.weight[5] = float("nan")
    decoder = SpeculativeDecoder(TransformersTarget(model, 256), None, SpecConfig(1, NEW))
    with pytest.raises(RuntimeError, match="logits are NaN"):
        decoder.generate({"input_ids": prompt(2)})


def test_full_cache_is_one_clear_error() -> None:
    model, ids = tiny_llama(2), prompt(2)
    decoder = SpeculativeDecoder(TransformersTarget(model, 30), None, SpecConfig(1, NEW))
    with pytest.raises(RuntimeError, match="capacity 30"):
        decoder.generate({"input_ids": ids})


def tiny_mistral(sliding_window: int | None) -> MistralForCausalLM:
    config = MistralConfig(**SIZES, num_hidden_layers=1, sliding_window=sliding_window)
    return MistralForCausalLM(config)


@pytest.mark.parametrize("window", [2, 8, 33])
def test_trees_within_a_sliding_window(window: int) -> None:
    torch.manual_seed(window)
    model = tiny_mistral(window).eval().requires_grad_(False)
    model.generation_config.eos_token_id = None
    ids = prompt(3)
    truth = reference(model, ids, NEW)
    target = TransformersTarget(model, 256)
    out = SpeculativeDecoder(target, OracleDrafter(truth, 5), SpecConfig(16, NEW)).generate(
        {"input_ids": ids}
    )
    assert out.tokens == truth and out.tokens_per_verify > 2


def test_capped_attention_is_refused() -> None:
    config = Gemma2Config(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    )  # fmt: skip
    with pytest.raises(ValueError, match="caps its attention logits"):
        TransformersTarget(Gemma2ForCausalLM(config))


@pytest.mark.parametrize("batch", [2, 3])
def test_batches_are_refused(batch: int) -> None:
    target = TransformersTarget(tiny_llama(0), 64)
    with pytest.raises(ValueError, match="input_ids must be"):
        target.prefill({"input_ids": prompt(0).expand(batch, -1)})


@pytest.mark.parametrize("values", [{"rows": 0}, {"rows": 65}, {"max_new_tokens": 0}])
def test_settings_out_of_range(values: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=str(next(iter(values)))):
        SpecConfig(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rows": 1.5}, r"rows must be an integer, got 1\.5"),
        ({"seed": "7"}, "seed must be an integer, got '7'"),
        ({"eos_token_ids": 2}, r"eos_token_ids must be token ids as in \(2,\), got 2"),
        ({"eos_token_ids": (None,)}, r"eos_token_ids must be token ids .*, got \(None,\)"),
    ],
)
def test_settings_of_another_type(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SpecConfig(**values)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, 'a tensor under "input_ids", got dict'),
        ("hello", "a mapping with a tensor .* got str"),
        ({"input_ids": [[1, 2]]}, "got list"),
        ({"input_ids": torch.ones(1, 0, dtype=torch.int64)}, r"\[1, length\], got shape \(1, 0\)"),
        ({"input_ids": torch.ones(1, 2)}, "input_ids must be int64 or int32, got torch.float32"),
    ],
)
def test_malformed_prompts(inputs, message: str) -> None:
    decoder = SpeculativeDecoder(TransformersTarget(tiny_llama(0), 32), None, SpecConfig(4, 4))
    with pytest.raises(ValueError, match=message):
        decoder.generate(inputs)


@pytest.mark.parametrize("gamma", [0, 64])
def test_gamma_out_of_range(gamma: int) -> None:
    with pytest.raises(ValueError, match="gamma"):
        SpecConfig.chain(gamma)


def test_fast_steps_equal_the_model() -> None:
    model = tiny_llama(4, kv_heads=2)
    ids = prompt(4)
    drafters = [ModelDrafter(model, gamma=4, siblings=2) for _ in range(2)]
    assert isinstance(drafters[0]._steps, LlamaSteps)
    drafters[1]._steps = drafters[1]._step
    for drafter in drafters:
        drafter.begin(Request(draft_inputs={"input_ids": ids}))
    context = [5]
    for more in ([9, 7], [3], [8, 8, 8, 1]):
        fast, slow = (d.propose(context, 64) for d in drafters)
        assert fast.tokens == slow.tokens and fast.parent_idx == slow.parent_idx
        assert fast.scores == pytest.approx(slow.scores, rel=1e-3)
        context = [*context, *fast.tokens[1:2], *more]


def test_fast_steps_leave_other_models_alone() -> None:
    assert not LlamaSteps.fits(tiny_mistral(sliding_window=None))
