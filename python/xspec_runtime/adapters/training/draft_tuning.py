"""L6: the draft model itself, tuned to say what the target says.

Cross entropy of the target's own tokens behind the draft's prompt, by low-rank changes of its
attention (merged into the weights in the end) or of its language-model head alone; optionally the
divergence from the target's distribution, where its states were recorded. The row that predicts
token i is the draft's state i: the published runs trained the one after it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from .draft_answers import DraftAnswers
from .draft_folder import DRAFT_LEVELS, L6
from .loop import Progress, Training, fit, run_key, split_rows
from .states import States
from .text import Tally

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class Lora:
    """Sizes of the low-rank changes.

    Attributes:
        rank, alpha, dropout: as published; the change is scaled by ``alpha / rank``.
        modules: last names of the linear layers of the language model that are changed.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.05
    modules: tuple[str, ...] = ATTENTION

    def __post_init__(self) -> None:
        """Raises `ValueError` naming the first value out of range."""
        if type(self.rank) is not int or not 1 <= self.rank <= 1024:
            raise ValueError(f"rank must be an int in 1..1024, got {self.rank!r}")
        if not 0 < self.alpha < math.inf or not 0 <= self.dropout < 1:
            raise ValueError(
                "alpha must be above 0 and dropout from 0 to below 1, got "
                f"{self.alpha} and {self.dropout}"
            )


@dataclass(frozen=True)
class DraftTraining(Training):
    """How a draft is tuned; a hidden draft is one that sees zeros.

    Attributes:
        kl_weight: of the divergence from the target's distribution, beside the cross entropy.
    """

    kl_weight: float = 0.0

    def __post_init__(self) -> None:
        """Raises `ValueError` naming the first value out of range."""
        super().__post_init__()
        if not 0 <= self.kl_weight < math.inf:
            raise ValueError(f"kl_weight must be 0 or more, got {self.kl_weight}")


@dataclass(frozen=True)
class Teacher:
    """The target's states of the same answers, and its head ``[V, D]``."""

    states: States
    head: torch.Tensor

    def said(self, rows: torch.Tensor, width: int) -> torch.Tensor:
        """Log probabilities ``[B, width, V]``."""
        return (self.states.target[rows, :width].float() @ self.head.T).log_softmax(-1)


def import_peft() -> ModuleType:
    """peft, which only low-rank changes need.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError(
            "tuning by low-rank changes needs peft: pip install 'peft>=0.18'"
        ) from error
    return peft


def with_lora(model: PreTrainedModel, lora: Lora) -> nn.Module:
    """`model` wrapped; only the low-rank changes of its language model are trained.

    Raises:
        ImportError: peft is not installed.
        ValueError: the language model has no such layers.
    """
    peft = import_peft()
    language = getattr(model.base_model, "language_model", model)
    inner = {id(module) for module in language.modules()}
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and id(module) in inner
        and name.rpartition(".")[2] in lora.modules
    ]
    if not names:
        raise ValueError(f"the draft's language model has no linear {', '.join(lora.modules)}")
    config = peft.LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=names
    )
    with warnings.catch_warnings():
        # It asks transformers by a name that is on its way out.
        warnings.simplefilter("ignore", FutureWarning)
        return peft.get_peft_model(model, config)


def with_own_head(model: PreTrainedModel) -> nn.Module:
    """`model`, of which only the language-model head is trained; embeddings that share its weights
    keep theirs.
    """
    model.requires_grad_(False)
    head = model.get_output_embeddings()
    if head.weight is model.get_input_embeddings().weight:
        head.weight = nn.Parameter(head.weight.detach().clone())
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False
    head.requires_grad_(True)
    return model


@dataclass(frozen=True)
class DraftLesson:
    """A draft model and the answers it is tuned on, see `loop.Lesson`."""

    module: nn.Module
    answers: DraftAnswers
    plan: DraftTraining
    device: torch.device
    teacher: Teacher | None = None

    @property
    def reads_draft(self) -> bool:
        """Whether the draft sees something that can be hidden."""
        return bool(self.answers.media)

    def loss(self, rows: torch.Tensor, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross entropy of the target's tokens, and the divergence where it has a weight."""
        logits, expected, there = self.logits(rows, hidden)
        weight = self.plan.position_weights(there.shape[1]).to(self.device).expand_as(there)[there]
        spoken = logits[there]
        loss = F.cross_entropy(spoken, expected[there], reduction="none")
        if self.plan.kl_weight:
            said = self.teacher.said(rows, there.shape[1]).to(self.device)[there]
            missed = F.kl_div(spoken.log_softmax(-1), said, reduction="none", log_target=True)
            loss = loss + self.plan.kl_weight * missed.sum(-1)
        return (weight * loss).sum(), weight.sum()

    def logits(
        self, rows: torch.Tensor, hidden: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits ``[B, T, V]`` of every token of the target's answers, the ids ``[B, T]``, and
        whether there is one.
        """
        inputs, first = self.answers.batch(rows, hidden)
        lengths = self.answers.lengths[rows]
        width, start = int(lengths.max()), int(first.min())
        kept = inputs["input_ids"].shape[1] - start
        inputs = {name: value.to(self.device) for name, value in inputs.items()}
        logits = self.module(**inputs, logits_to_keep=kept, use_cache=False).logits.float()
        # Row i of an answer stands i places behind the end of its own prompt.
        place = (first - start)[:, None] + torch.arange(width)
        place = place.clamp(max=kept - 1)[..., None].to(self.device)
        logits = logits.gather(1, place.expand(-1, -1, logits.shape[2]))
        there = torch.arange(width) < lengths[:, None]
        expected = self.answers.answers[rows, :width].to(self.device)
        return logits, expected, there.to(self.device)

    @torch.inference_mode()
    def figures(self, rows: torch.Tensor) -> dict[str, Any]:
        """Tokens foretold from the target's true prefix, see `score_texts`."""
        tally = Tally(len(rows))
        for part in rows.split(self.plan.batch):
            shown = torch.zeros(len(part), dtype=torch.bool)
            logits, expected, there = self.logits(part, shown)
            blind = self.logits(part, ~shown)[0] if self.answers.media else None
            tally.add(logits, blind, expected, there)
        return tally.figures()


def tune_draft(
    level: str,
    model: PreTrainedModel,
    answers: DraftAnswers,
    plan: DraftTraining | None = None,
    lora: Lora | None = None,
    teacher: Teacher | None = None,
    state: Path | None = None,
    progress: Progress = lambda step, steps, loss: None,
) -> tuple[PreTrainedModel, list[dict[str, Any]], int]:
    """The draft of the best validation loss, with all changes merged into its weights, what every
    epoch measured, and how many parameters were trained.

    Args:
        level: `L6` (low-rank changes) or `L6_HEAD`, of `DRAFT_LEVELS`.
        model: is changed.
        teacher: needed where the divergence has a weight.
        state, progress: see `fit`.

    Raises:
        ImportError: `L6` without peft.
        ValueError: no such level, no teacher where one is needed, or see `split_rows` and `fit`.
    """
    plan, lora = plan or DraftTraining(), lora or Lora()
    if level not in DRAFT_LEVELS:
        raise ValueError(f"level must be one of {', '.join(DRAFT_LEVELS)}, got {level!r}")
    if plan.kl_weight and (teacher is None or len(teacher.states) != len(answers)):
        raise ValueError("a KL weight needs the target's states of the same answers")
    rows = split_rows(len(answers), plan.held_out, answers.folds)
    origin = _fingerprint(model)
    torch.manual_seed(plan.seed)
    module = with_lora(model, lora) if level == L6 else with_own_head(model)
    lesson = DraftLesson(module, answers, plan, model.device, teacher)
    said = teacher.states.digest if teacher else ""
    key = run_key(plan, level, answers.digest, lora if level == L6 else None, origin, said)
    history = fit(lesson, rows, plan, key, state, progress)
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    merged = module.merge_and_unload() if level == L6 else module
    return merged.eval().requires_grad_(False), history, trained


def _fingerprint(model: PreTrainedModel) -> Sequence[float]:
    """Tells drafts apart that runs start from."""
    return [float(p.detach().float().sum()) for p in list(model.parameters())[:4]]
