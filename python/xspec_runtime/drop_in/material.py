"""Models and prompts of the comparison."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from ..files import read_json
from ..workloads.text import chat_ids

EMBEDDED = "embedded"  # instead of a folder: the target of the pair that ships with the package


@dataclass(frozen=True, slots=True)
class Prompt:
    """One request, and the group that its figures belong to."""

    name: str
    group: str
    inputs: Mapping[str, torch.Tensor]


def material(
    target: str, prompts: Path | None, samples: int, new: int
) -> tuple[PreTrainedModel, int, list[Prompt]]:
    """The model in float32, the token that pads, and its prompts: those of the file, or scenes of
    the embedded pair.

    Raises:
        FileNotFoundError: a file or folder does not exist.
        ValueError: the file is not a list of questions with groups, or a prompt is too long.
    """
    if target == EMBEDDED:
        if prompts is not None:
            raise ValueError(f"--prompts goes with a model in a folder, not with {EMBEDDED}")
        return _embedded(samples)
    folder = Path(target)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no model: config.json is missing")
    if prompts is None:
        raise ValueError("a model in a folder needs --prompts FILE")
    questions = read_prompts(prompts)[:samples]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    limit = model.config.get_text_config().max_position_embeddings
    found = []
    for number, (group, question) in enumerate(questions):
        ids = chat_ids(tokenizer, question)
        if ids.shape[1] + new > limit:
            raise ValueError(
                f"prompt {number} has {ids.shape[1]} tokens; with {new} new ones that is more than "
                f"the model's {limit} positions"
            )
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        found.append(Prompt(f"prompt {number}", group, inputs))
    return model.eval().requires_grad_(False), tokenizer.pad_token_id or 0, found


def read_prompts(file: Path) -> list[tuple[str, str]]:
    """(group, question) of every entry.

    Raises:
        FileNotFoundError, ValueError: the file is missing or something else.
    """
    entries = read_json(file, "prompts file")
    wrong = f"{file} must be a list of objects with a group and a question"
    if not isinstance(entries, list) or not entries:
        raise ValueError(wrong)
    for entry in entries:
        if not isinstance(entry, dict):
            raise ValueError(wrong)
        if not all(isinstance(entry.get(key), str) for key in ("group", "question")):
            raise ValueError(wrong)
    return [(entry["group"], entry["question"]) for entry in entries]


def _embedded(samples: int) -> tuple[PreTrainedModel, int, list[Prompt]]:
    from ..models import mini
    from ..workloads import MiniPair, Settings

    tasks = MiniPair(Settings()).scene_tasks(samples)
    return mini.load("target"), mini.PAD, [Prompt(t.name, "scenes", t.inputs) for t in tasks]
