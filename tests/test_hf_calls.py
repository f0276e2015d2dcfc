"""What users do with `generate` beside asking for an answer, and what it must survive."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections import Counter
from threading import Thread

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    MambaConfig,
    MambaForCausalLM,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
)
from transformers.generation import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
)

from test_hf import NEW, SIZES, Forwards, free_rows, llama, llava, prompts, qwen2_vl, ready
from xspec_runtime import hf
from xspec_runtime.hf.kept import kept_for
from xspec_runtime.hf.packed import PackedWeights
from xspec_runtime.packing import can_pack


def agree(model, inputs, calls: int = 2, **options) -> None:
    """The greedy answers are those of `generate`, also once the memory knows them."""
    free_rows(model, 8)
    theirs = {name: value for name, value in options.items() if not name.startswith("xspec_")}
    plain = model.generate(**inputs, do_sample=False, **theirs)
    for _ in range(calls):
        ours = model.generate(
            **inputs, do_sample=False, custom_generate=hf.generate, xspec_rows=8, **options
        )
        assert torch.equal(ours, plain), (ours.tolist(), plain.tolist())


class CutAt(StoppingCriteria):
    """Stops at a length of the padded text."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


@pytest.mark.parametrize(
    "options",
    [
        {"min_new_tokens": 15},
        {"repetition_penalty": 1.4},
        {"begin_suppress_tokens": list(range(20))},
    ],
    ids=lambda options: next(iter(options)),
)
def test_processors_see_the_padding_of_a_batch(options, seed):
    agree(ready(llama), prompts("llama", 4), max_new_tokens=NEW, **options)


def test_criteria_see_the_padding_of_a_batch(seed):
    inputs = prompts("llama", 4)
    criteria = StoppingCriteriaList([CutAt(inputs["input_ids"].shape[1] + 5)])
    agree(ready(llama), inputs, max_new_tokens=NEW, stopping_criteria=criteria)


def test_answers_cut_by_a_criterion_are_learned(seed):
    model, inputs = ready(llama), prompts("llama", 1)
    criteria = StoppingCriteriaList([CutAt(inputs["input_ids"].shape[1] + 5)])
    model.generate(
        **inputs, max_new_tokens=NEW, do_sample=False, custom_generate=hf.generate,
        stopping_criteria=criteria,
    )  # fmt: skip
    assert [len(answer) for answer in hf.memory_of(model).answers] == [5]


def test_one_prompt_has_all_images_and_the_other_none(seed):
    words = [1, 20, 21, 22, 23, 24]
    image = [3] * 4
    for make, first, pixels in (
        (llava, [1, *image, *image, 11, 12], {"pixel_values": torch.randn(2, 3, 28, 28)}),
        (
            qwen2_vl,
            [1, 5, *image, 6, 5, *image, 6, 11, 12],
            {"pixel_values": torch.randn(32, 96), "image_grid_thw": torch.tensor([[1, 4, 4]] * 2)},
        ),
    ):
        missing = len(first) - len(words)
        ids = torch.tensor([first, [0] * missing + words])
        mask = torch.tensor([[1] * len(first), [0] * missing + [1] * len(words)])
        inputs = {"input_ids": ids, "attention_mask": mask, **pixels}
        if make is qwen2_vl:
            inputs["mm_token_type_ids"] = (ids == 3).int()
        agree(ready(make), inputs, max_new_tokens=9)


def test_drafts_stay_within_the_positions_that_a_model_has(seed):
    inputs = prompts("llama", 1)
    length = inputs["input_ids"].shape[1] + NEW - 1  # the last token is never fed
    config = GPT2Config(vocab_size=48, n_embd=64, n_layer=2, n_head=4, n_positions=length)
    model = ready(lambda: GPT2LMHeadModel(config))
    agree(model, inputs, max_new_tokens=NEW, pad_token_id=0, eos_token_id=None)


@pytest.mark.parametrize("options", [{"min_p": 0.3}, {"top_k": 6, "typical_p": 0.7}], ids=str)
def test_any_warper_keeps_its_law(options, seed):
    model, inputs = ready(llama), prompts("llama", 1)
    call = {"do_sample": True, "max_new_tokens": 1, "temperature": 0.5, **options}
    scored = model.generate(**inputs, **call, return_dict_in_generate=True, output_scores=True)
    law = scored.scores[0][0].softmax(-1)
    count = 100
    many = {name: value.repeat(count, 1) for name, value in inputs.items()}
    found = Counter(
        model.generate(**many, **call, custom_generate=hf.generate, xspec_seed=3)[:, -1].tolist()
    )
    assert all(law[token] > 0 for token in found)
    # Rare tokens together, so that every cell expects some.
    rare = [i for i, p in enumerate(law.tolist()) if p * count < 5]
    cells = [(float(p), found[i]) for i, p in enumerate(law) if i not in rare]
    cells.append((sum(float(law[i]) for i in rare), sum(found[i] for i in rare)))
    cells = [(p, seen) for p, seen in cells if p > 1e-6]
    chi = sum((seen - count * p) ** 2 / (count * p) for p, seen in cells)
    free = len(cells) - 1
    assert chi < free + 4 * (2 * free) ** 0.5 + 8, (chi, free)


def test_draws_follow_torch_unless_seeded(seed):
    model, inputs = ready(llama), prompts("llama", 1)
    call = {"do_sample": True, "max_new_tokens": NEW, "custom_generate": hf.generate}
    torch.manual_seed(3)
    first, second = model.generate(**inputs, **call), model.generate(**inputs, **call)
    torch.manual_seed(3)
    assert torch.equal(model.generate(**inputs, **call), first)
    assert first.shape != second.shape or not torch.equal(first, second)


def test_scores_of_a_sampled_answer(seed):
    model, inputs = ready(llama), prompts("llama", 1)
    out = model.generate(
        **inputs, max_new_tokens=6, do_sample=True, temperature=0.7, top_k=5,
        repetition_penalty=1.3, return_dict_in_generate=True, output_scores=True,
        custom_generate=hf.generate,
    )  # fmt: skip
    law = LogitsProcessorList(
        [RepetitionPenaltyLogitsProcessor(1.3), TemperatureLogitsWarper(0.7), TopKLogitsWarper(5)]
    )
    length = inputs["input_ids"].shape[1]
    logits = model(out.sequences).logits[0]
    assert len(out.scores) == out.sequences.shape[1] - length
    for i, scores in enumerate(out.scores):
        expected = law(out.sequences[:, : length + i], logits[length - 1 + i][None].clone())
        torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-4)


def test_a_warper_without_sampling_is_greedy(seed):
    warpers = LogitsProcessorList([TemperatureLogitsWarper(0.7)])
    agree(ready(llama), prompts("llama", 1), max_new_tokens=9, logits_processor=warpers)


@pytest.mark.parametrize("skip", [False, True])
def test_text_streamers_print_what_they_print_elsewhere(skip, seed):
    class Digits:
        def decode(self, ids, **kwargs):
            return "".join(f"{i} " for i in ids)

    class Printed(TextStreamer):
        def __init__(self) -> None:
            super().__init__(Digits(), skip_prompt=skip)
            self.text = ""

        def on_finalized_text(self, text, stream_end=False):
            self.text += text

    model, inputs = ready(llama), prompts("llama", 1)
    plain, ours = Printed(), Printed()
    model.generate(**inputs, max_new_tokens=9, do_sample=False, streamer=plain)
    model.generate(
        **inputs, max_new_tokens=9, do_sample=False, custom_generate=hf.generate,
        xspec_streamer=ours,
    )  # fmt: skip
    assert ours.text == plain.text != ""


def test_a_static_cache_holds_the_answer(seed):
    model, inputs = ready(llama), prompts("llama", 1)
    call = {
        "max_new_tokens": 9, "do_sample": False, "return_dict_in_generate": True,
        "cache_implementation": "static",
    }  # fmt: skip
    cache = model.generate(**inputs, **call).past_key_values
    length = int(cache.get_seq_length())
    plain = [layer.keys[:, :, :length].clone() for layer in cache.layers]
    cache = model.generate(**inputs, **call, custom_generate=hf.generate).past_key_values
    assert int(cache.get_seq_length()) == length
    for layer, keys in zip(cache.layers, plain, strict=True):
        torch.testing.assert_close(layer.keys[:, :, :length], keys, atol=1e-4, rtol=1e-4)


def test_threads_share_a_model(seed):
    model = ready(llama)
    asked = [prompts("llama", 1) for _ in range(4)]
    call = {"max_new_tokens": NEW, "do_sample": False}
    plain = [model.generate(**inputs, **call) for inputs in asked]
    free_rows(model, 8)
    found = [[] for _ in asked]

    def ask(i: int) -> None:
        for _ in range(3):
            found[i].append(
                model.generate(**asked[i], **call, custom_generate=hf.generate, xspec_rows=8)
            )

    threads = [Thread(target=ask, args=(i,)) for i in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for expected, ours in zip(plain, found, strict=True):
        assert len(ours) == 3 and all(torch.equal(one, expected) for one in ours)
    assert model.config._attn_implementation == "sdpa"


def test_an_error_leaves_the_model_as_it_was(seed):
    class Broken(LogitsProcessor):
        def __call__(self, input_ids, scores):
            raise RuntimeError("broken")

    model, inputs = ready(llama), prompts("llama", 1)
    model.set_attn_implementation("eager")
    with pytest.raises(RuntimeError, match="broken"):
        model.generate(
            **inputs, max_new_tokens=5, custom_generate=hf.generate,
            logits_processor=LogitsProcessorList([Broken()]),
        )  # fmt: skip
    assert model.config._attn_implementation == "eager"
    agree(model, inputs, max_new_tokens=7)


def test_a_model_can_go_be_copied_and_be_saved(seed):
    model, inputs = ready(llama), prompts("llama", 1)
    model.generate(**inputs, max_new_tokens=5, custom_generate=hf.generate)
    torch.save(model, io.BytesIO())
    agree(copy.deepcopy(model), inputs, max_new_tokens=9)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def wide_llama() -> LlamaForCausalLM:
    """One whose layers are large enough to be packed."""
    sizes = SIZES | {"hidden_size": 384, "intermediate_size": 384}
    return LlamaForCausalLM(LlamaConfig(**sizes))


@pytest.mark.skipif(not can_pack(), reason="torch is built without oneDNN's packing")
def test_packed_weights_follow_the_model(seed):
    model, inputs = ready(wide_llama), prompts("llama", 1)
    layer = model.model.layers[0].mlp.up_proj
    keys = set(model.state_dict())
    agree(model, inputs, max_new_tokens=9, xspec_pack=True)
    packed = kept_for(model)._packed
    assert len(packed) >= 8 and set(model.state_dict()) == keys and "forward" not in vars(layer)
    layer.weight.data.mul_(-1)
    agree(model, inputs, max_new_tokens=9)
    model.requires_grad_(True)
    model(inputs["input_ids"]).logits.sum().backward()
    assert layer.weight.grad is not None
    with torch.no_grad():
        layer.weight += layer.weight.grad
    agree(model, inputs, max_new_tokens=9)
    agree(model.to(torch.bfloat16), inputs, max_new_tokens=9)
    assert len(packed) == 0


@pytest.mark.skipif(not can_pack(), reason="torch is built without oneDNN's packing")
def test_packed_layers_compute_the_same_and_pass_gradients(seed):
    layer = torch.nn.Linear(256, 640)
    watched = torch.nn.Linear(256, 640)
    watched.register_forward_hook(lambda *_: None)
    packed = PackedWeights(torch.nn.ModuleList([layer, watched, torch.nn.Linear(8, 8)]))
    assert len(packed) == 1
    x = torch.randn(2, 3, 256)
    plain = layer(x)
    packed.install()
    torch.testing.assert_close(layer(x), plain)
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), plain)
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    packed.remove()
    assert "forward" not in vars(layer)


def test_drafters_keep_what_they_learned_of_themselves(seed):
    model, inputs = ready(llama), prompts("llama", 1)
    free_rows(model, 8)
    forwards = Forwards(model)
    for _ in range(2):
        model.generate(
            **inputs, max_new_tokens=NEW, do_sample=False, custom_generate=hf.generate,
            xspec_rows=8,
        )  # fmt: skip
    forwards.hook.remove()
    (idle,) = [found for found in kept_for(model).drafters.values() if found]
    assert len(idle) == 1 and idle[0]._answers == 2


def test_models_without_trees_are_refused(seed):
    model = ready(
        lambda: MambaForCausalLM(MambaConfig(vocab_size=48, hidden_size=32, num_hidden_layers=1))
    )
    with pytest.raises(ValueError, match="MambaForCausalLM: it keeps a state"):
        model.generate(torch.tensor([[1, 5]]), max_new_tokens=3, custom_generate=hf.generate)
