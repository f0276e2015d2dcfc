"""Training of a TextHead on a target's answers: resumable, calibrated on answers kept out of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ...files import replace_file
from ..text_head import UNKNOWN, TextHead, TextHeadConfig
from .loop import unfinished

PAD = -1  # behind short answers
TEMPERATURES = np.geomspace(0.5, 2.0, 61)


@dataclass(frozen=True)
class HeadTraining:
    """How a head is trained.

    Attributes:
        epochs: passes over the training answers.
        batch: answers a step.
        rate: highest learning rate; it falls to nothing.
        dropout: of embeddings and hidden rows.
        unknown: share of the input tokens that are replaced by the unknown word.
        held_out: share of the answers, the last ones, that only calibrate.
        seed: of weights and batches.
    """

    epochs: int = 14
    batch: int = 16
    rate: float = 4e-3
    dropout: float = 0.3
    unknown: float = 0.05
    held_out: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low, high in (
            ("epochs", 1, 10_000), ("batch", 1, 4096), ("seed", 0, 1_000_000),
        ):  # fmt: skip
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= high:
                raise ValueError(f"{name} must be an int in {low}..{high}, got {value!r}")
        if not 0 < self.rate <= 1:
            raise ValueError(f"rate must be above 0 and at most 1, got {self.rate!r}")
        for name in ("dropout", "unknown", "held_out"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be from 0 to below 1, got {getattr(self, name)!r}")


@dataclass(frozen=True)
class HeadScore:
    """Of the answers kept out: nats a token at temperature 1 and at the calibrated one, share of
    tokens that were the likeliest; tokens that training never saw cost nothing and are counted.
    """

    tokens: int
    unseen: int
    nats: float
    calibrated_nats: float
    top_1: float


def train_text_head(
    answers: Sequence[Sequence[int]],
    vocab_size: int,
    width: int = TextHeadConfig.width,
    plan: HeadTraining | None = None,
    state: Path | None = None,
    progress: Callable[[int, int, float], None] = lambda step, steps, loss: None,
) -> tuple[TextHead, HeadScore | None]:
    """A head that continues answers like these, and its score; None where none was kept out.

    Args:
        answers: target ids, in order of time: the last ones calibrate.
        state: file that keeps an unfinished run, written after every epoch; a run of the same
            answers and plan goes on from there and ends with the same weights.
        progress: called after every step with its number, how many there are, and the loss.

    Raises:
        ValueError: there is no answer of two tokens, an id is outside the vocabulary, or `state`
            belongs to another run.
    """
    plan = plan or HeadTraining()
    answers = [list(answer) for answer in answers if len(answer) > 1]
    if not answers:
        raise ValueError("training a text head needs an answer of at least two tokens")
    seen = sorted({token for answer in answers for token in answer})
    if not 0 <= seen[0] <= seen[-1] < vocab_size:
        raise ValueError(
            f"answers must hold ids from 0 to {vocab_size - 1}, got {seen[0]} to {seen[-1]}"
        )
    kept = min(round(len(answers) * plan.held_out), len(answers) - 1)
    train, held = answers[: len(answers) - kept], answers[len(answers) - kept :]
    ids = torch.tensor(sorted({token for answer in train for token in answer}))
    torch.manual_seed(plan.seed)
    head = TextHead(TextHeadConfig(vocab_size, len(ids), width), ids, plan.dropout)
    key = sha256(repr((answers, vocab_size, width, asdict(plan))).encode()).hexdigest()
    _fit(head, _padded(head, train), plan, state, key, progress)
    return head, _calibrate(head.eval(), _padded(head, held)) if held else None


def _padded(head: TextHead, answers: Sequence[Sequence[int]]) -> torch.Tensor:
    """Rows of the table ``[answers, longest]``, `PAD` behind."""
    out = torch.full((len(answers), max(map(len, answers))), PAD)
    for i, answer in enumerate(answers):
        out[i, : len(answer)] = head.rows_of(torch.tensor(answer))
    return out


def _fit(
    head: TextHead,
    rows: torch.Tensor,
    plan: HeadTraining,
    state: Path | None,
    key: str,
    progress: Callable[[int, int, float], None],
) -> None:
    epoch_steps = -(-len(rows) // plan.batch)
    steps = plan.epochs * epoch_steps
    optimizer = torch.optim.AdamW(head.parameters(), plan.rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, plan.rate, total_steps=steps + 1)
    parts = {"head": head, "optimizer": optimizer, "schedule": schedule}
    start = 0
    if saved := unfinished(state, key):
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        start = saved["step"]
    head.train()
    for step in range(start, steps):
        # Seeded by its number, a step of a resumed run draws what it would have drawn.
        torch.manual_seed(plan.seed * 1_000_003 + step)
        batch = rows[torch.randint(0, len(rows), (plan.batch,))]
        inputs, wanted = batch[:, :-1], batch[:, 1:]
        hidden = (torch.rand(inputs.shape) < plan.unknown) | (inputs == PAD)
        logits = head(inputs.masked_fill(hidden, UNKNOWN))
        loss = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=PAD)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress(step + 1, steps, loss.item())
        if state and (step + 1) % epoch_steps == 0:
            saved = {name: part.state_dict() for name, part in parts.items()}
            saved |= {"step": step + 1, "key": key}
            replace_file(state, lambda path, saved=saved: torch.save(saved, path))


@torch.inference_mode()
def _calibrate(head: TextHead, rows: torch.Tensor) -> HeadScore:
    """Sets the temperature that gives the held-out tokens the highest probability."""
    logits = head(rows[:, :-1].clamp(min=UNKNOWN))
    wanted = rows[:, 1:]
    known = wanted > UNKNOWN
    logits, labels = logits[known], wanted[known]
    if not len(labels):
        return HeadScore(0, int((wanted == UNKNOWN).sum()), 0.0, 0.0, 0.0)

    def nats(temperature: float) -> float:
        return F.cross_entropy(logits / temperature, labels).item()

    best = min(TEMPERATURES.tolist(), key=nats)
    head.temperature.fill_(best)
    unseen = int((wanted == UNKNOWN).sum())
    top_1 = (logits.argmax(-1) == labels).float().mean().item()
    return HeadScore(len(labels), unseen, nats(1.0), nats(best), top_1)
