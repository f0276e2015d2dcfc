"""Training of hidden-state adapters and EAGLE fusion on recorded states: resumable, stopped by
answers kept out of it. Files for a test are opened by scoring alone.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from ..files import replace_file
from . import alignment
from .eagle import EagleConfig, EagleFusion
from .hidden import READS_DRAFT, HiddenAdapter, HiddenAdapterConfig
from .score_states import StateAdapter, level_of, predict, score, wanted
from .states import Batch, States
from .train import HIDDEN_SHARE

TERMS = ("mse", "cos", "kl", "ce")
# Published weights of the terms; EAGLE's cross entropy smooths its labels.
PUBLISHED = dict.fromkeys(alignment.STATE_LEVELS, (1.0, 0.5, 0.0, 0.0))
PUBLISHED[alignment.EAGLE] = (0.1, 0.0, 0.5, 1.0)
SMOOTHING = {alignment.EAGLE: 0.1}


@dataclass(frozen=True)
class HiddenTraining:
    """How an adapter is trained.

    Attributes:
        epochs: passes over the training answers, at most.
        batch: answers a step, over all processes.
        rate: highest learning rate; it falls as a cosine over the real number of steps.
        patience: epochs without a better validation loss after which training stops.
        held_out: share of the answers that only stop it.
        hidden_share: of the answers, those whose draft is replaced by zeros.
        decay: position i of an answer weighs ``decay ** i``.
        weights: of `TERMS`, in place of the published ones.
        seed: of weights, batches and what is hidden.
    """

    epochs: int = 30
    batch: int = 16
    rate: float = 1e-3
    patience: int = 5
    held_out: float = 0.1
    hidden_share: float = HIDDEN_SHARE
    decay: float = 1.0
    weights: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises `ValueError` naming the first value out of range."""
        for name, low, high in (
            ("epochs", 1, 10_000), ("batch", 1, 4096), ("patience", 1, 10_000),
            ("seed", 0, 1_000_000),
        ):  # fmt: skip
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= high:
                raise ValueError(f"{name} must be an int in {low}..{high}, got {value!r}")
        if not 0 < self.rate <= 1 or not 0 < self.decay <= 1:
            raise ValueError(
                f"rate and decay must be above 0 and at most 1, got {self.rate} and {self.decay}"
            )
        if not 0 < self.held_out < 1 or not 0 <= self.hidden_share < 1:
            raise ValueError(
                "held_out and hidden_share must be shares below 1, held_out above 0, got "
                f"{self.held_out} and {self.hidden_share}"
            )
        for name, value in self.weights.items():
            if name not in TERMS or not 0 <= value < math.inf:
                raise ValueError(
                    f"weights are of {', '.join(TERMS)}, 0 or more, got {name}={value}"
                )

    def terms(self, level: str) -> dict[str, float]:
        """The weight of every term for a level."""
        return dict(zip(TERMS, PUBLISHED[level], strict=True)) | dict(self.weights)


def build(level: str, states: States, vocab_size: int, sizes: Mapping[str, int]) -> StateAdapter:
    """An untrained adapter of `level` for these states.

    Raises:
        ValueError: no such level, or a size out of range.
    """
    alignment.state_position(level, 0)
    width, draft_width = states.target.shape[2], states.draft.shape[2]
    try:
        if level == alignment.EAGLE:
            return EagleFusion(
                EagleConfig(vocab_size, token_width=width, draft_width=draft_width, **sizes)
            )
        config = HiddenAdapterConfig(level, width, draft_width, **sizes)
    except TypeError as error:
        raise ValueError(f"{level} has no such size: {error}") from None
    return HiddenAdapter(config)


def weighted_loss(
    adapter: StateAdapter, batch: Batch, head: torch.Tensor, plan: HiddenTraining
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss summed over positions, and the sum of their weights: their ratio is the loss, over
    however many parts of a batch both are summed.
    """
    level = level_of(adapter)
    terms = plan.terms(level)
    predicted, logits = predict(adapter, batch, head)
    states, ids, there = wanted(adapter, batch, predicted.shape[1])
    weight = (plan.decay ** torch.arange(predicted.shape[1])).expand_as(there)[there]
    predicted, states, logits, ids = predicted[there], states[there], logits[there], ids[there]
    loss = torch.zeros_like(weight)
    if terms["mse"]:
        loss = loss + terms["mse"] * (predicted - states).square().mean(-1)
    if terms["cos"]:
        loss = loss + terms["cos"] * (1 - F.cosine_similarity(predicted, states, dim=-1))
    if terms["kl"]:
        said = (states @ head.T).log_softmax(-1)
        missed = F.kl_div(logits.log_softmax(-1), said, reduction="none", log_target=True)
        loss = loss + terms["kl"] * missed.sum(-1)
    if terms["ce"]:
        smooth = SMOOTHING.get(level, 0.0)
        loss = loss + terms["ce"] * F.cross_entropy(
            logits, ids, reduction="none", label_smoothing=smooth
        )
    return (weight * loss).sum(), weight.sum()


def train_hidden(
    level: str,
    states: States,
    head: torch.Tensor,
    plan: HiddenTraining | None = None,
    sizes: Mapping[str, int] | None = None,
    state: Path | None = None,
    progress: Callable[[int, int, float], None] = lambda step, steps, loss: None,
) -> tuple[StateAdapter, list[dict[str, Any]]]:
    """The adapter of the best validation loss, and what every epoch measured.

    Under an initialized process group each process takes its share of every batch; the loss is
    that of one process.

    Args:
        head: the target's language-model head ``[V, D]``, frozen.
        sizes: of the configuration, beside the states' widths.
        state: file that keeps an unfinished run, written after every epoch; a run of the same
            states and plan goes on from there and ends with the same weights.
        progress: called after every step with its number, how many there are, and the loss.

    Raises:
        ValueError: see `HiddenTraining`, `build`, `States.split`; or `state` is of another run.
    """
    plan, sizes = plan or HiddenTraining(), dict(sizes or {})
    train, held = states.split(plan.held_out)
    torch.manual_seed(plan.seed)
    adapter = build(level, states, head.shape[0], sizes)
    key = sha256(repr((level, states.digest, len(states), asdict(plan), sizes)).encode())
    epoch_steps = -(-len(train) // plan.batch)
    steps = plan.epochs * epoch_steps
    optimizer = torch.optim.AdamW(adapter.parameters(), plan.rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    parts = {"adapter": adapter, "optimizer": optimizer, "schedule": schedule}
    history, best = _resume(state, key.hexdigest(), parts)
    for epoch in range(len(history), plan.epochs):
        if _stalled(history, plan.patience):
            break
        total = count = 0.0
        generator = torch.Generator().manual_seed(plan.seed * 1_000_003 + epoch)
        order = train[torch.randperm(len(train), generator=generator)]
        adapter.train()
        for number, rows in enumerate(order.split(plan.batch)):
            step = epoch * epoch_steps + number
            # Seeded by its number, a step of a resumed run draws what it would have drawn.
            torch.manual_seed(plan.seed * 1_000_003 + step)
            loss = _step(adapter, states, rows, head, plan, optimizer)
            schedule.step()
            total, count = total + loss, count + 1
            progress(step + 1, steps, loss)
        row = {"epoch": epoch + 1, "train_loss": total / count}
        row["val_loss"] = validation_loss(adapter, states, held, head, plan)
        row |= score(adapter, states, held, head)
        history.append(row)
        if row["val_loss"] <= min(r["val_loss"] for r in history):
            best = {name: value.clone() for name, value in adapter.state_dict().items()}
        if state and _rank()[0] == 0:
            saved = {name: part.state_dict() for name, part in parts.items()}
            saved |= {"key": key.hexdigest(), "history": history, "best": best}
            replace_file(state, lambda path, saved=saved: torch.save(saved, path))
    adapter.load_state_dict(best)
    return adapter.eval().requires_grad_(False), history


@torch.inference_mode()
def validation_loss(
    adapter: StateAdapter,
    states: States,
    rows: torch.Tensor,
    head: torch.Tensor,
    plan: HiddenTraining,
) -> float:
    """The training loss on `rows`, with no draft hidden and without dropout."""
    adapter.eval()
    parts = [weighted_loss(adapter, states.rows(r), head, plan) for r in rows.split(plan.batch)]
    total, weight = (float(sum(column)) for column in zip(*parts, strict=True))
    return total / weight


def _step(
    adapter: nn.Module,
    states: States,
    rows: torch.Tensor,
    head: torch.Tensor,
    plan: HiddenTraining,
    optimizer: torch.optim.Optimizer,
) -> float:
    rank, world = _rank()
    hidden = torch.zeros(len(rows), dtype=torch.bool)
    if level_of(adapter) in (*READS_DRAFT, alignment.EAGLE):
        hidden = torch.rand(len(rows)) < plan.hidden_share
    optimizer.zero_grad()
    own = slice(rank, None, world)
    total, weight = torch.zeros(()), torch.zeros(())
    if len(rows[own]):
        total, weight = weighted_loss(adapter, states.rows(rows[own]).hide(hidden[own]), head, plan)
    sums = torch.stack([total.detach(), weight])
    if world > 1:
        dist.all_reduce(sums)
    if total.requires_grad:
        (total / sums[1]).backward()
    if world > 1:
        for parameter in adapter.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)
    nn.utils.clip_grad_norm_(adapter.parameters(), 1.0)
    optimizer.step()
    return float(sums[0] / sums[1])


@contextmanager
def processes() -> Iterator[int]:
    """This process's rank; under torchrun with the group that `train_hidden` uses."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield 0
        return
    dist.init_process_group("gloo")
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()


def _rank() -> tuple[int, int]:
    """This process and how many there are."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _stalled(history: list[dict[str, Any]], patience: int) -> bool:
    losses = [row["val_loss"] for row in history]
    return bool(losses) and len(losses) - 1 - losses.index(min(losses)) >= patience


def _resume(
    state: Path | None, key: str, parts: Mapping[str, Any]
) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """Epochs of the run kept in `state`, whose parts are loaded, and its best weights."""
    if not state or not state.exists():
        return [], {}
    try:
        saved = torch.load(state, weights_only=True)
        known, history, best = saved["key"], saved["history"], saved["best"]
    except Exception as error:
        raise ValueError(f"{state} is damaged ({type(error).__name__}); remove it") from error
    if known != key:
        raise ValueError(f"{state} belongs to a run of other states or options; remove it")
    for name, part in parts.items():
        part.load_state_dict(saved[name])
    return history, best
