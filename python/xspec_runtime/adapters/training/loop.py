"""The loop that every network here is trained by: resumable, shared over processes, stopped by
answers kept out of it. It opens no file but the one that keeps its own state.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn

from ...files import read_saved, replace_file

HIDDEN_SHARE = 0.3
Progress = Callable[[int, int, float], None]


@dataclass(frozen=True)
class Training:
    """How a network is trained.

    Attributes:
        epochs: passes over the training answers, at most.
        batch: answers a step, over all processes.
        rate: highest learning rate; it falls as a cosine over the real number of steps.
        patience: epochs without a better validation loss after which training stops.
        held_out: share of the answers that only stop it.
        hidden_share: of the answers, those whose draft (or what it saw) is hidden.
        decay: position i of an answer weighs ``decay ** i``.
        seed: of weights, batches and what is hidden.
        accumulation: parts of a batch computed one after the other; the loss is the batch's.
    """

    epochs: int = 30
    batch: int = 16
    rate: float = 1e-3
    patience: int = 5
    held_out: float = 0.1
    hidden_share: float = HIDDEN_SHARE
    decay: float = 1.0
    seed: int = 0
    accumulation: int = 1

    def __post_init__(self) -> None:
        """Raises `ValueError` naming the first value out of range."""
        for name, low, high in (
            ("epochs", 1, 10_000), ("batch", 1, 4096), ("patience", 1, 10_000),
            ("seed", 0, 1_000_000), ("accumulation", 1, 4096),
        ):  # fmt: skip
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= high:
                raise ValueError(f"{name} must be an int in {low}..{high}, got {value!r}")
        for name in ("rate", "decay"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be above 0 and at most 1, got {getattr(self, name)}")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out must be above 0 and below 1, got {self.held_out}")
        if not 0 <= self.hidden_share < 1:
            raise ValueError(f"hidden_share must be from 0 to below 1, got {self.hidden_share}")

    def position_weights(self, positions: int) -> torch.Tensor:
        """What each position of an answer weighs, ``[positions]``."""
        return self.decay ** torch.arange(positions)


class Lesson(Protocol):
    """What is trained, on what.

    Attributes:
        module: its parameters that require a gradient are trained.
        reads_draft: whether there is a draft to hide from it.
    """

    module: nn.Module
    reads_draft: bool

    def loss(self, rows: torch.Tensor, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss of some answers summed over positions, and the sum of their weights: their
        ratio is the loss, over however many parts of a batch both are summed.

        Args:
            hidden: bool, one a row: the draft is hidden from the network.
        """

    def figures(self, rows: torch.Tensor) -> Mapping[str, Any]:
        """What the network is worth on some answers."""


def run_key(plan: Training, *material: object) -> str:
    """Names a run: another plan or other material gives another key."""
    return sha256(repr((*material, asdict(plan))).encode()).hexdigest()


def split_rows(
    count: int, share: float, folds: list[list[int]] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows to train on and rows to stop by: the last drives, where `folds` has the rows of each
    drive, else the last answers; clips of one drive overlap, so rows drawn at random would be seen
    twice.

    Raises:
        ValueError: fewer than two answers, or a share that leaves nothing to one side.
    """
    if count < 2 or not 0 < share < 1:
        raise ValueError(
            f"a split needs two answers and a share between 0 and 1, got {count} and {share}"
        )
    wanted = max(1, min(count - 1, round(count * share)))
    if folds is None:
        kept = list(range(count - wanted, count))
    else:
        kept = []
        for fold in reversed(folds[1:]):
            if len(kept) >= wanted:
                break
            kept += fold
    rest = sorted(set(range(count)) - set(kept))
    return torch.tensor(rest), torch.tensor(sorted(kept))


def fit(
    lesson: Lesson,
    rows: tuple[torch.Tensor, torch.Tensor],
    plan: Training,
    key: str,
    state: Path | None = None,
    progress: Progress = lambda step, steps, loss: None,
) -> list[dict[str, Any]]:
    """Train; leaves the weights of the best validation loss and returns what every epoch measured.

    Under an initialized process group each process takes its share of every batch; the loss is
    that of one process.

    Args:
        rows: of `split_rows`.
        key: see `run_key`.
        state: file that keeps an unfinished run, written after every epoch; a run of the same key
            goes on from there and ends with the same weights.
        progress: called after every step with its number, how many there are, and the loss.

    Raises:
        ValueError: `state` is damaged or of another run, another split or network among that; or
            none of the answers kept out has a token to predict.
        RuntimeError: the loss is no finite number any more.
    """
    train, held = rows
    module = lesson.module
    shapes = [tuple(parameter.shape) for parameter in module.parameters()]
    key = run_key(plan, key, train.tolist(), held.tolist(), shapes)
    epoch_steps = -(-len(train) // plan.batch)
    steps = plan.epochs * epoch_steps
    optimizer = torch.optim.AdamW(_trained(module), plan.rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    history, best = [], {}
    if saved := unfinished(state, key):
        module.load_state_dict(saved["adapter"], strict=False)
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        history, best = saved["history"], saved["best"]
    for epoch in range(len(history), plan.epochs):
        if _stalled(history, plan.patience):
            break
        total = count = 0.0
        generator = torch.Generator().manual_seed(plan.seed * 1_000_003 + epoch)
        order = train[torch.randperm(len(train), generator=generator)]
        module.train()
        for number, part in enumerate(order.split(plan.batch)):
            step = epoch * epoch_steps + number
            # Seeded by its number, a step of a resumed run draws what it would have drawn.
            torch.manual_seed(plan.seed * 1_000_003 + step)
            loss = _step(lesson, part, plan, optimizer)
            schedule.step()
            total, count = total + loss, count + 1
            progress(step + 1, steps, loss)
        module.eval()
        row = {"epoch": epoch + 1, "train_loss": total / count}
        row["val_loss"] = validation_loss(lesson, held, plan)
        if not math.isfinite(row["train_loss"] + row["val_loss"]):
            raise RuntimeError(
                f"training diverged in epoch {epoch + 1}, its loss is {row['train_loss']}: lower "
                f"the learning rate, {plan.rate}"
            )
        row |= lesson.figures(held)
        history.append(row)
        # Of equal losses the first: the one that `write_run` calls the best epoch.
        if row["val_loss"] < min((r["val_loss"] for r in history[:-1]), default=math.inf):
            best = {name: value.clone() for name, value in _weights(module).items()}
        if state and process()[0] == 0:
            saved = {"key": key, "history": history, "best": best, "adapter": _weights(module)}
            saved |= {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
            replace_file(state, lambda path, saved=saved: torch.save(saved, path))
    module.load_state_dict(best, strict=False)
    module.eval()
    return history


def unfinished(state: Path | None, key: str) -> dict[str, Any] | None:
    """What the run of this key kept in `state`; None where it kept nothing.

    Raises:
        ValueError: the file is damaged, or another run's.
    """
    if not state or not state.exists():
        return None
    saved = read_saved(state)
    if not isinstance(saved, dict) or saved.get("key") != key:
        raise ValueError(f"{state} belongs to a run of other answers or options; remove it")
    return saved


@torch.inference_mode()
def validation_loss(lesson: Lesson, rows: torch.Tensor, plan: Training) -> float:
    """The training loss on `rows`, with no draft hidden and without dropout.

    Raises:
        ValueError: nothing in them is to be predicted.
    """
    size = -(-plan.batch // plan.accumulation)
    shown = (torch.zeros(len(part), dtype=torch.bool) for part in rows.split(size))
    parts = [lesson.loss(*part) for part in zip(rows.split(size), shown, strict=True)]
    total, weight = (float(sum(column)) for column in zip(*parts, strict=True))
    if not weight:
        raise ValueError(
            f"none of the {len(rows)} answers that stop training has a token to predict"
        )
    return total / weight


@contextmanager
def processes() -> Iterator[int]:
    """This process's rank; under torchrun with the group that `fit` uses."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield 0
        return
    dist.init_process_group("gloo")
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()


def process() -> tuple[int, int]:
    """This process and how many there are."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _step(
    lesson: Lesson, rows: torch.Tensor, plan: Training, optimizer: torch.optim.Optimizer
) -> float:
    rank, world = process()
    hidden = torch.zeros(len(rows), dtype=torch.bool)
    if lesson.reads_draft:
        hidden = torch.rand(len(rows)) < plan.hidden_share
    optimizer.zero_grad()
    rows, hidden = rows[rank::world], hidden[rank::world]
    sums = torch.zeros(2)
    size = max(1, -(-len(rows) // plan.accumulation))
    for part, blind in zip(rows.split(size), hidden.split(size), strict=True):
        if len(part):
            total, weight = lesson.loss(part, blind)
            total.backward()
            sums += torch.stack([total.detach(), weight]).float().cpu()
    if world > 1:
        dist.all_reduce(sums)
    # Answers of one token, which is given, leave nothing to predict.
    weight = float(sums[1]) or 1.0
    for parameter in _trained(lesson.module):
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if world > 1:
            dist.all_reduce(parameter.grad)
        parameter.grad /= weight
    nn.utils.clip_grad_norm_(_trained(lesson.module), 1.0)
    optimizer.step()
    return float(sums[0]) / weight


def _trained(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _weights(module: nn.Module) -> dict[str, torch.Tensor]:
    """What training changes: parameters that require a gradient, and buffers."""
    return {
        name: value.detach()
        for name, value in module.state_dict(keep_vars=True).items()
        if value.requires_grad or not isinstance(value, nn.Parameter)
    }


def _stalled(history: list[dict[str, Any]], patience: int) -> bool:
    losses = [row["val_loss"] for row in history]
    return bool(losses) and len(losses) - 1 - losses.index(min(losses)) >= patience
