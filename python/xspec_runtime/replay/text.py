"""Sources on tokens alone for replays and evaluations: the draft's own text, and a text head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..data.pairs import VOCAB_SIZE
from ..drafters.base import Drafter, Request
from ..drafters.draft_text import DraftTextDrafter
from .drafters import RECORDED_DRAFT

if TYPE_CHECKING:
    from ..adapters.text_head import TextHead
    from .arms import Training, Variant


def draft_text(training: Training, variant: Variant) -> Drafter:
    """The draft's text, recorded or decoded by the embedded pair's raw draft."""
    if variant.hide_draft:
        return DraftTextDrafter(lambda request: ())
    if training.models is None:
        return DraftTextDrafter(_recorded)
    from ..drafters.adapter import DraftText
    from ..models import mini

    raw = training.shared("raw draft", lambda: mini.load("draft_raw"))
    return DraftTextDrafter(DraftText(raw, (mini.EOS,), mini.MAX_NEW_TOKENS))


def text_head(training: Training, variant: Variant) -> Drafter:
    """A head trained on the fold's training answers; kept in the training's folder."""
    from ..drafters.text_head import TextHeadDrafter

    return TextHeadDrafter(training.shared("text head", lambda: _trained(training)))


def _recorded(request: Request) -> Sequence[int]:
    return request.draft_inputs[RECORDED_DRAFT]


def _trained(training: Training) -> TextHead:
    from ..adapters.text_head import load_text_head, save_text_head
    from ..adapters.training.head import train_text_head

    vocab_size = VOCAB_SIZE
    if training.models is not None:
        from ..models import mini

        vocab_size = mini.VOCAB
    path = training.folder / "text_head.safetensors" if training.folder else None
    if path and path.exists():
        return load_text_head(path, vocab_size)
    state = path.with_suffix(".state.pt") if path else None
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
    answers = [pair.target for pair in training.pairs]
    head, _ = train_text_head(answers, vocab_size, state=state)
    if path:
        save_text_head(head, path)
        state.unlink(missing_ok=True)
    return head
