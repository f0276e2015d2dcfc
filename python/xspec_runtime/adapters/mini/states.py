"""States of the embedded pair on procedural scenes, as `xspec extract --states` writes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from ...data.captions import QUESTIONS
from ...data.scenes import make_sample
from ...extract import StateFolder
from ...files import read_json
from ...models import mini
from .pair import BATCH, greedy_drafts, greedy_targets

# Scenes from these seeds on are in no other training, and below those of the end-to-end runs.
FIRST_SEED = 500_000
SCORE_SEED = 800_000
DRAFT = "draft_raw"


def write_scene_states(folder: Path, count: int, first: int = FIRST_SEED) -> None:
    """Write the states of both models' answers to `count` scenes, `DRAFT` the draft.

    Raises:
        ValueError: no scenes, or some that are for tests.
    """
    check_seeds(count, first)
    tokenizer = mini.load_tokenizer()
    draft, target = mini.load(DRAFT), mini.load("target")
    store, keys = StateFolder(folder), []
    for start in range(0, count, BATCH):
        part = range(first + start, first + min(start + BATCH, count))
        samples = [make_sample(seed) for seed in part]
        events = np.stack([sample.event_image for sample in samples])
        video = np.stack([sample.video for sample in samples])
        drafts = greedy_drafts(draft, events, tokenizer)
        targets = greedy_targets(target, video, tokenizer)
        draft_ids = mini.draft_inputs(QUESTIONS[0], events[0], tokenizer)["input_ids"]
        target_ids = mini.target_inputs(QUESTIONS[0], video[0], tokenizer)["input_ids"]
        states = zip(
            _states(draft, draft_ids, drafts, event_pixel_values=mini.pixels(events)[:, None]),
            _states(target, target_ids, targets, pixel_values_videos=mini.pixels(video)),
            strict=True,
        )
        for seed, (of_draft, of_target) in zip(part, states, strict=True):
            keys.append(str(seed))
            store.add(keys[-1], {"draft": of_draft, "target": of_target})
    config = {"draft": DRAFT, "target": "target", "scenes": count, "first_seed": first}
    store.pack(keys, BATCH, config)


def scenes_missing(file: Path, count: int, first: int = FIRST_SEED) -> bool:
    """Whether answers to `count` scenes are asked for and not there yet; 0 asks for none.

    Args:
        file: of pairs, or the ``index.json`` of a folder of states.

    Raises:
        ValueError: `count` is negative, or the file holds other scenes.
    """
    if count < 0:
        raise ValueError(f"--scenes must be 0 or more, got {count}")
    if not count or not file.exists():
        return count > 0
    found = read_json(file, "answers to scenes")
    origin = found.get("config", found) if isinstance(found, dict) else {}
    have = origin.get("scenes"), origin.get("first_seed")
    if have != (count, first):
        raise ValueError(
            f"{file} holds answers to {have[0] or 'no'} scenes from seed {have[1]} on, expected "
            f"the {count} from {first} on that --scenes asks for: leave it out, or name a new place"
        )
    return False


def check_seeds(count: int, first: int) -> None:
    """Raises `ValueError` unless there are scenes and none of them is for tests."""
    if count < 1 or first < 0 or first + count > mini.TEST_SEED:
        raise ValueError(
            f"scenes for training have seeds from 0 to {mini.TEST_SEED - 1}, got {count} from "
            f"{first} on"
        )


@torch.inference_mode()
def _states(
    model: PreTrainedModel, prompt: torch.Tensor, answers: list[list[int]], **media: torch.Tensor
) -> list[torch.Tensor]:
    """States of each answer ``[length, D]`` in half precision, in one pass over all of them."""
    longest = max(map(len, answers))
    ids = torch.full((len(answers), longest), mini.PAD)
    for row, answer in zip(ids, answers, strict=True):
        row[: len(answer)] = torch.tensor(answer)
    ids = torch.cat([prompt.expand(len(answers), -1), ids[:, :-1]], 1)
    seen: list[torch.Tensor] = []
    hook = model.get_output_embeddings().register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0])
    )
    try:
        # Nothing looks ahead: what stands behind a short answer changes no state of it.
        model(input_ids=ids, logits_to_keep=longest, use_cache=False, **media)
    finally:
        hook.remove()
    rows = zip(seen[0], answers, strict=True)
    return [states[: len(answer)].half().contiguous() for states, answer in rows]
