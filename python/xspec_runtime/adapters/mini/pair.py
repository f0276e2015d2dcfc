"""Adapters of the embedded pair: their files, drafters and measure; `train` trains them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from ...data.captions import QUESTIONS
from ...data.pairs import Pair
from ...data.scenes import make_sample
from ...drafters.adapter import AdapterDrafter, DraftText
from ...drafters.base import Drafter, Request
from ...drafters.graph_adapter import GraphAdapterDrafter
from ...drafters.ngram import NgramDrafter, NgramMemory
from ...metrics import acceptance_rate, tokens_per_verify
from ...models import mini
from ...replay.arms import RECORDED_DRAFT, replay_arms
from ...replay.run import replay
from ...targets.llama import LlamaTarget
from ..checkpoint import load_adapter

# The position-wise map of the published structure, and the one that sees the verified prefix.
ADAPTERS = ("adapter", "adapter_prefix")
HIDDEN = "_hidden"
ARMS = tuple(name + suffix for name in ADAPTERS for suffix in ("", HIDDEN))
# A TokenAdapter whose drafts stay on the target's device; the end of its arm's name.
TAIL = "_tail"
TAIL_ARMS = tuple(ADAPTERS[0] + TAIL + suffix for suffix in ("", HIDDEN))
BATCH = 100


def greedy_drafts(model, events: np.ndarray, tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    """Answers of a draft model to event images uint8 ``[N, 64, 64, 3]``, in batches."""
    rows = []
    for start in range(0, len(events), BATCH):
        batch = events[start : start + BATCH]
        ids = mini.draft_inputs(QUESTIONS[0], batch[0], tokenizer)["input_ids"]
        rows += _greedy(model, ids, event_pixel_values=mini.pixels(batch)[:, None])
    return rows


def greedy_targets(model, video: np.ndarray, tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    """Answers of the target to videos uint8 ``[N, 8, 64, 64, 3]``, in batches."""
    rows = []
    for start in range(0, len(video), BATCH):
        batch = video[start : start + BATCH]
        ids = mini.target_inputs(QUESTIONS[0], batch[0], tokenizer)["input_ids"]
        rows += _greedy(model, ids, pixel_values_videos=mini.pixels(batch))
    return rows


def unseen_pairs(draft, target, count: int, seed: int = 0) -> list[Pair]:
    """What both models say about `count` scenes that no training saw.

    Args:
        draft, target: the raw draft and the target, see `mini.load`.
        seed: which scenes; different seeds share none below 100,000 scenes.
    """
    first = mini.TEST_SEED + 100_000 * seed
    samples = [make_sample(first + i) for i in range(count)]
    tokenizer = mini.load_tokenizer()
    drafts = greedy_drafts(draft, np.stack([s.event_image for s in samples]), tokenizer)
    answers = greedy_targets(target, np.stack([s.video for s in samples]), tokenizer)
    return [
        Pair(i, i, QUESTIONS[0], tuple(d), tuple(t))
        for i, (d, t) in enumerate(zip(drafts, answers, strict=True))
    ]


def adapter_drafter(
    arm: str,
    gamma: int,
    draft_model=None,
    directory: Path | None = None,
    target: LlamaTarget | None = None,
) -> AdapterDrafter:
    """A fresh drafter of one of `ARMS` or `TAIL_ARMS`.

    Args:
        draft_model: the raw draft, for the arms that are not hidden; without one the request
            brings a recorded text.
        directory: of the checkpoints.
        target: of `TAIL_ARMS`, see `text_reader`.

    Raises:
        ValueError: there is no such arm, or it does not fit the target.
    """
    if arm not in (*ARMS, *TAIL_ARMS):
        known = ", ".join((*ARMS, *TAIL_ARMS))
        raise ValueError(f"unknown adapter arm {arm!r}; there are {known}")
    text = recorded_text
    if draft_model is not None and not arm.endswith(HIDDEN):
        text = DraftText(draft_model, (mini.EOS,), mini.MAX_NEW_TOKENS)
    folder = Path(directory or mini.CHECKPOINTS) / arm.removesuffix(HIDDEN).removesuffix(TAIL)
    return text_reader(folder, arm, gamma, text, target)


def text_reader(
    folder: Path,
    arm: str,
    gamma: int,
    text: Callable[[Request], Sequence[int]] | None,
    target: LlamaTarget | None = None,
) -> AdapterDrafter:
    """A fresh drafter of the adapter in `folder`. It runs on the host, where a step is a few small
    products and no launch; that of a `TAIL` arm, on the target's device.

    Args:
        text: the draft's; not asked in a `HIDDEN` arm.
        target: which a `TAIL` arm drafts for, see `GraphAdapterDrafter`.

    Raises:
        ValueError, RuntimeError, FileNotFoundError: see `load_adapter`, and `GraphAdapterDrafter`.
    """
    hidden = arm.endswith(HIDDEN)
    if not arm.removesuffix(HIDDEN).endswith(TAIL):
        adapter = load_adapter(folder, mini.VOCAB)
        return AdapterDrafter(adapter, gamma, text, hide_draft=hidden, name=arm)
    if target is None:
        raise ValueError(f"arm {arm!r} needs a target with graphs")
    adapter = load_adapter(folder, mini.VOCAB, target.device, target.dtype)
    return GraphAdapterDrafter(adapter, gamma, target, text, hidden, name=arm)


def recorded_text(request: Request) -> Sequence[int]:
    """The draft's text that came with a recorded pair."""
    return request.draft_inputs[RECORDED_DRAFT]


def evaluate(
    pairs: Sequence[Pair],
    answers: Sequence[Sequence[int]],
    gamma: int = 5,
    directory: Path | None = None,
) -> dict[str, dict[str, float | None]]:
    """Every arm on recorded pairs, beside the raw draft, a constant string and a memory's chain.

    Args:
        pairs: see `unseen_pairs`.
        answers: the target's on training scenes, for the constant string and the memory.

    Returns:
        Per arm `tokens_per_verify` and `acceptance_rate`, at `gamma` draft tokens a round.
    """
    memory = NgramMemory(recency=0)
    memory.extend(answers)
    known = [Pair(i, i, "", (), tuple(answer)) for i, answer in enumerate(answers)]
    drafters: dict[str, Drafter] = {
        arm.drafter: arm.make(0, known)
        for arm in replay_arms(gamma, (gamma + 1,))
        if arm.drafter in ("raw draft", "constant string")
    }
    drafters["memory chain"] = NgramDrafter(memory, online=False, chain=True)
    for arm in ARMS:
        drafters[arm] = adapter_drafter(arm, gamma, directory=directory)
    return {name: replay_figures(drafter, pairs, gamma) for name, drafter in drafters.items()}


def replay_figures(drafter: Drafter, pairs: Sequence[Pair], gamma: int) -> dict[str, float | None]:
    """`tokens_per_verify` and `acceptance_rate` of the rounds of greedy decoding, replayed."""
    rounds = []
    for pair in pairs:
        request = Request(draft_inputs={RECORDED_DRAFT: pair.draft})
        rounds += replay(drafter, pair.target, gamma + 1, request)
    drafted = sum(len(r.tree) - 1 for r in rounds)
    return {
        "tokens_per_verify": tokens_per_verify(sum(r.emitted for r in rounds), len(rounds)),
        "acceptance_rate": acceptance_rate(sum(r.accepted for r in rounds), drafted),
    }


@torch.inference_mode()
def _greedy(model, ids: torch.Tensor, **media: torch.Tensor) -> list[list[int]]:
    """Greedy answers to one prompt ``[1, L]`` with a batch of media, end-of-sequence included."""
    size = len(next(iter(media.values())))
    prompts = ids.expand(size, -1)
    out = model.generate(
        input_ids=prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=False,
        max_new_tokens=mini.MAX_NEW_TOKENS,
        **media,
    )
    rows = out[:, ids.shape[1] :].tolist()
    return [row[: row.index(mini.EOS) + 1] if mini.EOS in row else row for row in rows]
