"""An evaluation on live models: the embedded pair answers, drafted by each source in turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..arms import Task
from ..config import SpecConfig
from ..data.captions import QUESTIONS
from ..data.pairs import Pair, contiguous_folds
from ..data.scenes import make_sample
from ..drafters.base import Drafter, Request
from ..engine import SpeculativeDecoder
from ..models import mini
from ..replay.arms import Training
from ..replay.tally import ReplayRound
from ..workloads import MiniPair, Settings
from .plan import EvaluateOptions

NO_EVENTS = 255  # the white canvas


@dataclass(slots=True)
class Scene:
    """An unseen scene: its task, the request without its events, and the target's plain answer."""

    task: Task
    hidden: Request
    answer: list[int]


class LiveScenes:
    """Unseen scenes through the embedded pair. Memories start from the target's answers to training
    scenes; every decoded answer must be the plain one.
    """

    def __init__(self, options: EvaluateOptions) -> None:
        self._options = o = options
        self._pair = pair = MiniPair(Settings(o.gamma, max(o.rows), backend=o.backend))
        self._known = [Pair(i, i, "", (), tuple(a)) for i, a in enumerate(pair.answers)]
        o.check_sizes(len(self._known))
        self._scenes: dict[int, Scene] = {}
        parts = contiguous_folds(o.scenes, o.folds) if o.folds > 1 else [range(o.scenes)]
        self._folds = parts
        self._trainings = {f: Training(f, self._known, models=pair) for f in range(len(parts))}
        self._plain = SpeculativeDecoder(pair.target, None, self._config(1))

    def folds(self) -> int:
        """Groups of scenes; each starts from the same memory."""
        return len(self._folds)

    def items(self, fold: int) -> Sequence[Scene]:
        """Scenes and their plain answers, decoded when first asked for."""
        return [self._scene(i) for i in self._folds[fold]]

    def training(self, fold: int, size: int | None = None) -> Training:
        """The target's answers to training scenes, all or the first `size`."""
        if size is not None:
            return Training(fold, self._known[:size], models=self._pair)
        return self._trainings[fold]

    def request(self, item: Scene, hide_draft: bool) -> Request:
        """With the event image, or with one that shows no events."""
        return item.hidden if hide_draft else item.task.request

    def answer(self, item: Scene) -> Sequence[int]:
        """Of plain decoding."""
        return item.answer

    def decode(
        self, drafter: Drafter, item: Scene, rows: int, hide_draft: bool
    ) -> Sequence[ReplayRound]:
        """Generate with the drafter.

        Raises:
            RuntimeError: the answer is not the plain one.
        """
        seen: list[tuple] = []
        decoder = SpeculativeDecoder(self._pair.target, drafter, self._config(rows))
        out = decoder.generate(
            item.task.inputs,
            self.request(item, hide_draft),
            on_round=lambda tree, verdict, known: seen.append((len(known), tree)),
        )
        if out.tokens != item.answer and not out.near_ties:
            raise RuntimeError(
                f"drafter {drafter.name!r} changed the answer to {item.task.name}: "
                f"{out.tokens} in place of {item.answer}"
            )
        return [
            ReplayRound(known, tree, r.accepted, r.emitted, r.propose_ms / 1e3)
            for (known, tree), r in zip(seen, out.rounds, strict=True)
        ]

    def facts(self) -> dict[str, object]:
        """Numbers of answers."""
        return {
            "kind": "live",
            "answers": self._options.scenes,
            "training_answers": [len(self._known)],
        }

    def _scene(self, number: int) -> Scene:
        if number not in self._scenes:
            seed = mini.TEST_SEED + 100_000 * self._options.seed + number
            sample, name = make_sample(seed), f"scene {number}"
            blank = np.full_like(sample.event_image, NO_EVENTS)
            task = self._pair.task(name, QUESTIONS[0], sample.video, sample.event_image)
            hidden = self._pair.task(name, QUESTIONS[0], sample.video, blank).request
            answer = self._plain.generate(task.inputs, task.request).tokens
            self._scenes[number] = Scene(task, hidden, answer)
        return self._scenes[number]

    def _config(self, rows: int) -> SpecConfig:
        return SpecConfig(rows, mini.MAX_NEW_TOKENS, (mini.EOS,))
