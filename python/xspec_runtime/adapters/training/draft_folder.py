"""Draft models as folders: configuration and safetensors, as transformers writes and reads them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from ...files import check_output, read_json
from ...models import mini
from ...models.eventgpt import EventGPTForConditionalGeneration

L6, L6_HEAD = "L6", "L6HEAD"
DRAFT_LEVELS = (L6, L6_HEAD)  # low-rank changes, the language-model head alone
OF_THE_PAIR = ("draft_raw", "draft")
TOKENIZER = ("tokenizer*", "special_tokens_map.json", "chat_template.jinja", "*.model")


def load_float(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """A causal language model in a local folder, for inference; an EventGPT where it is one.

    Raises:
        FileNotFoundError: the folder holds no model.
        ValueError: the checkpoint lacks weights.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no model: config.json is missing")
    values = read_json(folder / "config.json")
    events = isinstance(values, dict) and values.get("model_type") == "eventgpt"
    kind = EventGPTForConditionalGeneration if events else AutoModelForCausalLM
    options = {"output_loading_info": True, "use_safetensors": True}
    if not events:
        options["trust_remote_code"] = False
    model, found = kind.from_pretrained(folder, dtype=dtype, **options)
    # transformers fills what a checkpoint lacks with random weights.
    if found["missing_keys"]:
        missing = sorted(found["missing_keys"])
        raise ValueError(f"{folder} lacks {len(missing)} weights, {missing[0]} among them")
    return model.eval().requires_grad_(False)


def load_draft(
    name: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A draft model: `OF_THE_PAIR` (``mini`` is the first of these), or one in a folder.

    Raises:
        FileNotFoundError: there is no such folder, or no model in it.
        ValueError: the checkpoint lacks weights.
        RuntimeError: it is damaged.
    """
    name = OF_THE_PAIR[0] if name == "mini" else name
    if name in OF_THE_PAIR:
        return mini.load(name, device=device, dtype=dtype)
    try:
        return load_float(Path(name), dtype).to(device)
    except (FileNotFoundError, ValueError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise RuntimeError(f"the model in {name} cannot be used: {reason}") from error


def load_pair_draft(folder: str, device: str, dtype: torch.dtype) -> PreTrainedModel:
    """A draft of the embedded pair in a folder.

    Raises:
        ValueError: it is another model, or of another vocabulary; otherwise as `load_draft`.
    """
    model = load_draft(folder, device, dtype)
    size = model.config.get_text_config().vocab_size
    if not isinstance(model, EventGPTForConditionalGeneration) or size != mini.VOCAB:
        raise ValueError(
            f"a draft of the embedded pair is an EventGPT of {mini.VOCAB} tokens, {folder} holds a "
            f"{type(model).__name__} of {size}"
        )
    return model


def save_draft(model: PreTrainedModel, folder: Path, source: str = "") -> None:
    """Write `model` to `folder`, each file in one step, with the tokenizer of the folder `source`.

    Raises:
        OSError: it cannot be written.
    """
    check_output(folder / "config.json")
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".new-", dir=folder.parent) as work:
        model.save_pretrained(work)
        if source and Path(source).is_dir():
            for pattern in TOKENIZER:
                for file in Path(source).glob(pattern):
                    shutil.copyfile(file, Path(work) / file.name)
        # Weights first: a folder with a configuration is a whole one.
        for file in sorted(Path(work).iterdir(), key=lambda f: f.name == "config.json"):
            os.replace(file, folder / file.name)
