"""The drop-in for transformers' `generate`: families, batches, sampling, and what it refuses."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    StoppingCriteria,
    StoppingCriteriaList,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
)
from transformers.generation.streamers import BaseStreamer

from xspec_runtime import NgramDrafter, NgramMemory, hf
from xspec_runtime.hf.kept import kept_for

VOCAB, EOS, NEW = 48, 2, 20
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "bos_token_id": 1, "eos_token_id": EOS, "pad_token_id": 0,
}  # fmt: skip


def clip() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        image_size=28, patch_size=14,
    )  # fmt: skip


def llama():
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def qwen2():
    return Qwen2ForCausalLM(Qwen2Config(**SIZES))


def mistral():
    return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=8))


def gemma():
    kinds = ["sliding_attention", "full_attention"]
    config = Gemma3TextConfig(**SIZES, head_dim=16, sliding_window=6, layer_types=kinds)
    return Gemma3ForCausalLM(config)


def phi():
    return PhiForCausalLM(PhiConfig(**(SIZES | {"num_key_value_heads": 4})))


def llava():
    config = LlavaConfig(
        vision_config=clip(), text_config=LlamaConfig(**SIZES), image_token_index=3,
        vision_feature_layer=-2,
    )  # fmt: skip
    return LlavaForConditionalGeneration(config)


def video_llava():
    config = VideoLlavaConfig(
        vision_config=clip(), text_config=LlamaConfig(**SIZES), image_token_index=3,
        video_token_index=4, vision_feature_layer=-2,
    )  # fmt: skip
    return VideoLlavaForConditionalGeneration(config)


def qwen2_vl():
    text = SIZES | {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3],
                                        "rope_theta": 10000.0}}  # fmt: skip
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "patch_size": 4,
              "spatial_merge_size": 2, "temporal_patch_size": 2}  # fmt: skip
    config = Qwen2VLConfig(
        text_config=text, vision_config=vision, image_token_id=3, video_token_id=4,
        vision_start_token_id=5, vision_end_token_id=6,
    )  # fmt: skip
    return Qwen2VLForConditionalGeneration(config)


FAMILIES = {
    f.__name__: f for f in (llama, qwen2, mistral, gemma, phi, llava, video_llava, qwen2_vl)
}


def ready(make):
    model = make().eval().requires_grad_(False)
    # Without a preference for what came before, random weights repeat nothing.
    model.generation_config.pad_token_id = 0
    return model


def prompts(name: str, batch: int) -> dict[str, torch.Tensor]:
    """Left-padded prompts of different lengths with the media of the family."""
    media: list[int] = []
    extra: dict[str, torch.Tensor] = {}
    if name == "llava":
        media, extra = [3] * 4, {"pixel_values": torch.randn(batch, 3, 28, 28)}
    elif name == "video_llava":
        media, extra = [4] * 10, {"pixel_values_videos": torch.randn(batch, 2, 3, 28, 28)}
    elif name == "qwen2_vl":
        media = [5, *[3] * 4, 6]
        extra = {
            "pixel_values": torch.randn(batch * 16, 3 * 2 * 4 * 4),
            "image_grid_thw": torch.tensor([[1, 4, 4]] * batch),
        }
    rows = []
    for i in range(batch):
        words = torch.randint(10, VOCAB, (6 + 2 * i,)).tolist()
        rows.append([1, *media, *words, *words[:3]])
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    if name == "qwen2_vl":
        extra["mm_token_type_ids"] = (ids == 3).int()
    return {"input_ids": ids, "attention_mask": mask, **extra}


def free_rows(model, rows: int) -> None:
    """Let verifies of `model` cost next to nothing, so that all rows are worth verifying."""
    costs = [1.0 + 0.001 * i for i in range(rows)]
    kept_for(model).costs = {(rows, packed): costs for packed in (False, True)}


class Forwards:
    """Counts forward passes of a model."""

    def __init__(self, model) -> None:
        self.count = 0
        self.hook = model.register_forward_pre_hook(self._one)

    def _one(self, *_: object) -> None:
        self.count += 1


class Kept(BaseStreamer):
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.tokens, self.ended = [], 0

    def put(self, value):
        self.tokens += value.reshape(-1).tolist()

    def end(self):
        self.ended += 1


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_answers_are_those_of_generate(name, batch, seed):
    model = ready(FAMILIES[name])
    inputs = prompts(name, batch)
    plain = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    # Rows cost nothing here, so that all are worth verifying; the second call drafts from what the
    # first one said.
    free_rows(model, 8)
    counts = []
    for drafted in (False, True):
        forwards = Forwards(model)
        ours = model.generate(
            **inputs, max_new_tokens=NEW, do_sample=False, custom_generate=hf.generate,
            xspec_rows=8,
        )  # fmt: skip
        forwards.hook.remove()
        counts.append(forwards.count)
        assert torch.equal(ours, plain), drafted
    assert counts[1] < counts[0]


def test_the_second_call_takes_fewer_passes(seed):
    model = ready(llama)
    inputs = prompts("llama", 1)
    counts = []
    # Rows cost nothing here, so that all are worth verifying.
    free_rows(model, 16)
    for _ in range(2):
        forwards = Forwards(model)
        model.generate(**inputs, max_new_tokens=NEW, do_sample=False, custom_generate=hf.generate)
        forwards.hook.remove()
        counts.append(forwards.count)
    assert counts[1] < counts[0] <= NEW
    assert hf.memory_of(model).statistics().answers == 2
    hf.forget(model)
    assert hf.memory_of(model).statistics().answers == 0


def test_nothing_is_kept_where_not_wanted(tmp_path, seed):
    model = ready(llama)
    own = NgramMemory(recency=0)
    call = {"max_new_tokens": 6, "do_sample": False, "custom_generate": hf.generate}
    model.generate(**prompts("llama", 1), **call, xspec_memory=False)
    assert hf.memory_of(model).statistics().answers == 0
    model.generate(**prompts("llama", 1), **call, xspec_memory=own)
    assert len(own) == 1 and hf.memory_of(model).statistics().answers == 0
    own.save(tmp_path / "memory.safetensors")
    hf.set_memory(model, tmp_path / "memory.safetensors")
    assert len(hf.memory_of(model)) == 1


def test_processors_criteria_and_streamer(seed):
    model = ready(llama)
    inputs = prompts("llama", 1)

    class AfterSeven(StoppingCriteria):
        def __call__(self, ids, scores, **kwargs):
            return torch.tensor([ids.shape[1] >= inputs["input_ids"].shape[1] + 7])

    common = {
        "max_new_tokens": NEW, "do_sample": False, "repetition_penalty": 1.3,
        "no_repeat_ngram_size": 3,
    }  # fmt: skip
    plain = model.generate(
        **inputs, **common, stopping_criteria=StoppingCriteriaList([AfterSeven()])
    )
    for _ in range(2):
        kept = Kept()
        ours = model.generate(
            **inputs, **common, stopping_criteria=StoppingCriteriaList([AfterSeven()]),
            custom_generate=hf.generate, xspec_streamer=kept,
        )  # fmt: skip
        assert torch.equal(ours, plain)
        assert kept.tokens == ours[0].tolist() and kept.ended == 1


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_output_fields(cache, seed):
    model = ready(llama)
    inputs = prompts("llama", 1)
    options = {
        "max_new_tokens": 9, "do_sample": False, "return_dict_in_generate": True,
        "output_scores": True, "output_logits": True, "repetition_penalty": 1.2,
    }  # fmt: skip
    if cache == "static":
        options["cache_implementation"] = "static"
    plain = model.generate(**inputs, **options)
    for _ in range(2):
        ours = model.generate(**inputs, **options, custom_generate=hf.generate)
        assert torch.equal(ours.sequences, plain.sequences)
        for name in ("scores", "logits"):
            assert len(ours[name]) == len(plain[name])
            for a, b in zip(ours[name], plain[name], strict=True):
                torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    if cache == "dynamic":
        assert ours.past_key_values.get_seq_length() == plain.past_key_values.get_seq_length()
        for a, b in zip(ours.past_key_values.layers, plain.past_key_values.layers, strict=True):
            torch.testing.assert_close(a.keys, b.keys, atol=1e-4, rtol=1e-4)


def test_sampling_follows_the_law_and_repeats(seed):
    model = ready(llama)
    inputs = prompts("llama", 1)
    options = {"do_sample": True, "temperature": 0.8, "top_k": 6, "custom_generate": hf.generate}
    first = [
        int(model.generate(**inputs, **options, max_new_tokens=1, xspec_seed=i)[0, -1])
        for i in range(300)
    ]
    logits = model(**inputs).logits[0, -1] / 0.8
    logits[logits < logits.topk(6).values[-1]] = -float("inf")
    law = logits.softmax(-1)
    counts = Counter(first)
    assert all(law[token] > 0 for token in counts)
    chi = sum(
        (counts[i] - 300 * float(p)) ** 2 / (300 * float(p)) for i, p in enumerate(law) if p > 0
    )
    assert chi < 25.7, chi  # 5 degrees of freedom, p = 1e-4
    calls = [
        model.generate(**inputs, **options, max_new_tokens=NEW, xspec_seed=5, xspec_rows=rows)
        for rows in (1, 8, 8)
    ]
    assert torch.equal(calls[0], calls[1]) and torch.equal(calls[0], calls[2])


def test_a_drafter_of_your_own(seed):
    model = ready(qwen2)
    inputs = prompts("qwen2", 1)
    plain = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    drafter = NgramDrafter(NgramMemory(recency=0), online=True)
    ours = model.generate(
        **inputs, max_new_tokens=NEW, do_sample=False, custom_generate=hf.generate,
        xspec_drafter=drafter,
    )  # fmt: skip
    assert torch.equal(ours, plain)


def test_attention_is_given_back(seed):
    model = ready(llama)
    model.set_attn_implementation("eager")
    model.generate(**prompts("llama", 1), max_new_tokens=3, custom_generate=hf.generate)
    assert model.config._attn_implementation == "eager"


def test_refusals(seed):
    model = ready(llama)
    inputs = prompts("llama", 1)

    def refuses(words: str, batch: int = 1, **options) -> None:
        given = inputs if batch == 1 else prompts("llama", batch)
        with pytest.raises(ValueError, match=words):
            model.generate(**given, max_new_tokens=4, custom_generate=hf.generate, **options)

    refuses("xspec_rows must be in 1..64, got 65", xspec_rows=65)
    refuses("xspec_memory must be True, False or an NgramMemory, got str", xspec_memory="x")
    refuses("does not support output_hidden_states", output_hidden_states=True,
            return_dict_in_generate=True)  # fmt: skip
    refuses("does not support scores or logits of several prompts", 2, output_scores=True,
            return_dict_in_generate=True)  # fmt: skip
    refuses("does not support xspec_drafter with several", 2,
            xspec_drafter=NgramDrafter(NgramMemory(), online=True))  # fmt: skip
    refuses("does not support xspec_streamer with several", 2, xspec_streamer=Kept())
    refuses("does not support prefix_allowed_tokens_fn with several", 2,
            prefix_allowed_tokens_fn=lambda row, ids: [row])  # fmt: skip
    cache = DynamicCache()
    model(**inputs, past_key_values=cache)
    longer = torch.cat([inputs["input_ids"], torch.tensor([[9]])], 1)
    with pytest.raises(ValueError, match="past_key_values that hold tokens"):
        model.generate(longer, past_key_values=cache, max_new_tokens=4, custom_generate=hf.generate)
