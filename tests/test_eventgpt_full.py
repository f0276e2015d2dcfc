"""Published EventGPT checkpoints: conversion, prompt, and the adaptor applied twice.

The real weights cannot be had here; small ones of the same layout stand in.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, LlamaConfig

from xspec_runtime import cli
from xspec_runtime.models import mini
from xspec_runtime.models.eventgpt import EventGPTConfig, EventGPTForConditionalGeneration
from xspec_runtime.models.eventgpt_convert import PLACEHOLDER, convert_eventgpt, rename
from xspec_runtime.models.eventgpt_prompt import CONTEXT, eventgpt_inputs, prompt_ids


def build(**options) -> EventGPTForConditionalGeneration:
    vision = CLIPVisionConfig(
        hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=2,
        image_size=28, patch_size=14,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=mini.VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=512,
    )  # fmt: skip
    config = EventGPTConfig(vision, text, event_token_id=PLACEHOLDER, num_frames=2, **options)
    return EventGPTForConditionalGeneration(config).eval()


def published_name(name: str) -> str:
    for ours, theirs in (
        ("model.visual_tower.vision_model.", "model.visual_tower.visual_tower.vision_model."),
        ("model.visual_tower.", "model.visual_tower.visual_tower.vision_model."),
        ("model.language_model.", "model."),
    ):
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def published(model: EventGPTForConditionalGeneration, folder: Path, pickled: bool) -> Path:
    """`model` in two shards of the published layout, buffers of old transformers included."""
    folder.mkdir()
    state = {published_name(k): v.clone() for k, v in model.state_dict().items()}
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(16)
    names = sorted(state)
    stem, end = ("pytorch_model", "bin") if pickled else ("model", "safetensors")
    places = {}
    for i, part in enumerate((names[::2], names[1::2]), 1):
        file = f"{stem}-{i:05}-of-00002.{end}"
        tensors = {name: state[name] for name in part}
        (torch.save if pickled else save_file)(tensors, folder / file)
        places |= dict.fromkeys(part, file)
    (folder / f"{stem}.{end}.index.json").write_text(json.dumps({"weight_map": places}))
    text = model.config.text_config.to_dict()
    config = {
        **{k: text[k] for k in text if k not in ("model_type", "dtype", "rope_parameters")},
        "model_type": "EventChat_llama",
        "architectures": ["EventChatModel"],
        "mm_visual_tower": "openai/clip-vit-large-patch14-336",
        "event_feature_adaptor": True,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.model").write_bytes(b"a tokenizer")
    return folder


def edit_config(folder: Path, **values) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def logits(model, frames: int = 2) -> torch.Tensor:
    rows = frames + 5
    ids = torch.tensor([[1, *[PLACEHOLDER] * rows, 9, 10]])
    images = torch.linspace(-1, 1, frames * 3 * 28 * 28).view(1, frames, 3, 28, 28)
    with torch.inference_mode():
        return model(ids, event_pixel_values=images, attention_mask=torch.ones_like(ids)).logits


@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "bin"])
def test_round_trip(pickled, tmp_path, seed):
    model = build()
    source = published(model, tmp_path / "published", pickled)
    told = []
    done = convert_eventgpt(
        source, tmp_path / "ours", frames=2, on_shard=lambda *at: told.append(at)
    )
    assert told == [(1, 2), (2, 2)]
    assert done.unused == ["model.layers.0.self_attn.rotary_emb.inv_freq"]
    assert (tmp_path / "ours" / "tokenizer.model").read_bytes() == b"a tokenizer"
    again = EventGPTForConditionalGeneration.from_pretrained(tmp_path / "ours").eval()
    assert again.config.num_frames == 2 and again.config.event_markers == "text"
    assert torch.equal(logits(again), logits(model))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ours", "published"]


def test_tower_from_a_clip_folder(tmp_path, seed):
    model = build()
    source = published(model, tmp_path / "published", pickled=False)
    clip = tmp_path / "clip"
    clip.mkdir()
    tower = {}
    for file in source.glob("*.safetensors"):
        state = load_file(file)
        kept = {k: v for k, v in state.items() if "visual_tower" not in k}
        tower |= {k.split(".", 3)[3]: v for k, v in state.items() if k not in kept}
        save_file(kept, file)
    save_file(tower | {"logit_scale": torch.ones(1)}, clip / "model.safetensors")
    (clip / "config.json").write_text(
        json.dumps({"vision_config": model.config.vision_config.to_dict()})
    )
    with pytest.raises(ValueError, match="no vision tower; name the folder of its CLIP"):
        convert_eventgpt(source, tmp_path / "ours", frames=2)
    convert_eventgpt(source, tmp_path / "ours", clip=clip, frames=2)
    again = EventGPTForConditionalGeneration.from_pretrained(tmp_path / "ours").eval()
    assert torch.equal(logits(again), logits(model))


def test_two_passes_of_the_adaptor_are_what_the_recordings_had(seed):
    once, twice = build(), build(adaptor_passes=2)
    twice.load_state_dict(once.state_dict())
    images = torch.randn(1, 5, 3, 28, 28)
    with torch.inference_mode():
        right = once.model.get_event_features(images)
        wrong = twice.model.get_event_features(images)
        assert right.shape == (1, 5 + 5, 64)
        assert torch.equal(wrong, once.model.feature_adaptor(right))
        assert not torch.allclose(wrong, right)


def test_refusals(tmp_path, seed):
    source = published(build(), tmp_path / "published", pickled=False)
    target = tmp_path / "ours"

    def refuses(kind, words, **options):
        with pytest.raises(kind, match=words):
            convert_eventgpt(source, target, **options)
        assert not target.exists()

    with pytest.raises(FileNotFoundError, match="folder not found"):
        convert_eventgpt(tmp_path / "absent", target)
    edit_config(source, intermediate_size=256)
    refuses(ValueError, r"mlp.down_proj.weight is \[64, 128\], expected \[64, 256\]")
    edit_config(source, intermediate_size=128, use_event_qformer=True)
    refuses(ValueError, "expected a model without QFormer")
    edit_config(source, use_event_qformer=False, model_type="llava_llama")
    refuses(ValueError, "'llava_llama', expected EventChat_llama")
    edit_config(source, model_type="EventChat_llama")
    shard = next(source.glob("*00001*.safetensors"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    refuses(RuntimeError, "no readable file of weights")
    shard.unlink()
    refuses(FileNotFoundError, "00001-of-00002")
    shard.write_bytes(whole)
    target.mkdir()
    with pytest.raises(FileExistsError, match="name a new folder"):
        convert_eventgpt(source, target)
    assert not any(target.iterdir())


def test_a_pickle_that_runs_code_is_refused(tmp_path, seed):
    source = published(build(), tmp_path / "published", pickled=True)

    class Evil:
        def __reduce__(self):
            return (print, ("executed",))

    torch.save({"a": Evil()}, next(source.glob("*00001*.bin")))
    with pytest.raises(RuntimeError, match="no readable file of weights"):
        convert_eventgpt(source, tmp_path / "ours")


def test_unknown_tensors_are_named():
    with pytest.raises(ValueError, match=r"query_embedder\.weight is no tensor"):
        rename("model.query_embedder.weight")


def test_prompt(seed):
    tokenizer, model = mini.load_tokenizer(), build()
    config = model.config
    ids = prompt_ids("What moves?", tokenizer, config)
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(PLACEHOLDER) == config.event_tokens == 2 + 5
    first = ids.index(PLACEHOLDER)
    assert tokenizer.decode(ids[1:first]).endswith("USER: <ev_start>")
    assert tokenizer.decode(ids[first + 7 :]) == "<ev_end>\nWhat moves? ASSISTANT:"
    images = np.zeros((5, 40, 60, 3), np.uint8)
    inputs = eventgpt_inputs("What moves?", images, tokenizer, config)
    assert inputs["event_pixel_values"].shape == (1, 5, 3, 28, 28)
    assert int((inputs["input_ids"] == PLACEHOLDER).sum()) == 5 + 5
    with torch.inference_mode():
        assert model(**inputs).logits.shape[1] == inputs["input_ids"].shape[1]


def test_prompt_refusals(seed):
    tokenizer = mini.load_tokenizer()
    with pytest.raises(ValueError, match="question is empty"):
        prompt_ids(" ", tokenizer, build().config)
    with pytest.raises(ValueError, match="lacks <ev_start> and <ev_end>"):
        prompt_ids("What?", tokenizer, build(event_markers="special").config)
    with pytest.raises(ValueError, match="spells the event placeholder"):
        prompt_ids("What is <pad>?", tokenizer, build().config)
    with pytest.raises(ValueError, match=f"reads {CONTEXT} at most"):
        prompt_ids("What? " * CONTEXT, tokenizer, build().config)
    with pytest.raises(ValueError, match="adaptor_passes must be 1 or 2"):
        build(adaptor_passes=3)


def test_command(tmp_path, monkeypatch, capsys, seed):
    source = published(build(), tmp_path / "published", pickled=True)
    arguments = ["xspec", "convert", str(source), str(tmp_path / "ours"), "--frames", "2"]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit) as first:
        cli.main()
    assert first.value.code == 0 and "tensors in" in capsys.readouterr().err
    with pytest.raises(SystemExit) as second:
        cli.main()
    assert second.value.code == 2 and "name a new folder" in capsys.readouterr().err
