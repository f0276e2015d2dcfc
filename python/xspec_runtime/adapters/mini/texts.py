"""Pairs of the embedded pair on procedural scenes, as `xspec extract` writes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ...data.captions import QUESTIONS
from ...data.scenes import make_sample
from ...files import write_json
from ...models import mini
from .pair import greedy_drafts, greedy_targets
from .states import DRAFT, FIRST_SEED, check_seeds


def write_scene_pairs(path: Path, count: int, first: int = FIRST_SEED) -> None:
    """Write what `DRAFT` and the target say about `count` scenes; ``sample_idx`` is the seed.

    Raises:
        ValueError: no scenes, or some that are for tests.
    """
    check_seeds(count, first)
    samples = [make_sample(seed) for seed in range(first, first + count)]
    tokenizer = mini.load_tokenizer()
    events = np.stack([sample.event_image for sample in samples])
    video = np.stack([sample.video for sample in samples])
    drafts = greedy_drafts(mini.load(DRAFT), events, tokenizer)
    targets = greedy_targets(mini.load("target"), video, tokenizer)
    rows = [
        {
            "sample_idx": first + i,
            "query": QUESTIONS[0],
            "egpt_tokens": draft,
            "egpt_text": mini.decode_answer(draft, tokenizer),
            "vl_tokens": target,
            "vl_text": mini.decode_answer(target, tokenizer),
        }
        for i, (draft, target) in enumerate(zip(drafts, targets, strict=True))
    ]
    origin = {"draft": DRAFT, "target": "target", "scenes": count, "first_seed": first}
    write_json(path, {**origin, "total_samples": count, "results": rows})
