"""Writes nf4_video_llava/ beside this file: a tiny Video-LLaVA of random weights as transformers
saves it after bitsandbytes has quantized it, with plain and with quantized scales.

Needs bitsandbytes; 0.50.2 on a CPU wrote what is here.
The metadata of each file holds the greedy answer of transformers' own modules with the weights that
bitsandbytes dequantizes, to the prompt that `inputs` makes.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import bitsandbytes
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import (
    BitsAndBytesConfig,
    CLIPVisionConfig,
    LlamaConfig,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
)

SEED, FRAMES, PATCH_TOKENS, VIDEO, NEW_TOKENS = 20261121, 8, 5, 4, 40
FOLDER = Path(__file__).with_name("nf4_video_llava")


def config() -> VideoLlavaConfig:
    """Large initial weights keep top-2 gaps wide."""
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        image_size=4, patch_size=2, projection_dim=64, initializer_factor=8.0,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, head_dim=32,
        num_key_value_heads=1, intermediate_size=128, max_position_embeddings=256,
        initializer_range=0.25, bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return VideoLlavaConfig(
        vision_config=vision, text_config=text, image_token_index=3, video_token_index=VIDEO,
        vision_feature_layer=-1, image_seq_length=PATCH_TOKENS - 1,
        video_seq_length=FRAMES * PATCH_TOKENS, tie_word_embeddings=False,
    )  # fmt: skip


def inputs() -> dict[str, torch.Tensor]:
    """A prompt with a video; numbers from a formula, so that no generator matters."""
    ids = torch.tensor([[1, 20, 30, *[VIDEO] * (FRAMES * PATCH_TOKENS), 5, 6, 7]])
    pixels = torch.sin(torch.arange(FRAMES * 3 * 16) * 0.37).view(1, FRAMES, 3, 4, 4)
    return {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values_videos": pixels,
    }  # fmt: skip


def main() -> None:
    torch.manual_seed(SEED)
    load = VideoLlavaForConditionalGeneration.from_pretrained
    with tempfile.TemporaryDirectory() as plain:
        model = VideoLlavaForConditionalGeneration(config())
        # Special tokens are never the best: as drafts they would stand for media.
        model.lm_head.weight.data[:5] = 0
        model.save_pretrained(plain)
        for name, double in (("plain", False), ("double", True)):
            settings = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double,
                bnb_4bit_compute_dtype=torch.float32,
            )  # fmt: skip
            shutil.rmtree(FOLDER / name, ignore_errors=True)
            load(plain, quantization_config=settings, device_map="cpu").save_pretrained(
                FOLDER / name
            )
            model = load(FOLDER / name, device_map="cpu").dequantize().eval()
            prompt = inputs()
            out = model.generate(**prompt, max_new_tokens=NEW_TOKENS, do_sample=False)
            answer = out[0, prompt["input_ids"].shape[1] :].tolist()
            facts = {"bitsandbytes": bitsandbytes.__version__, "answer": json.dumps(answer)}
            facts |= {"torch": torch.__version__, "transformers": transformers.__version__}
            file = FOLDER / name / "model.safetensors"
            save_file(load_file(file), file, {"format": "pt", **facts})
            file.chmod(0o644)


if __name__ == "__main__":
    main()
