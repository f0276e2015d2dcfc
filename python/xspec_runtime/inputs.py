"""What a user brings to the embedded pair, checked before work: device, questions, recordings."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from threading import Event

import numpy as np
import torch

from .arms import Task
from .data.events import Events, load_events, rasterize, split_by_count
from .data.images import resize
from .data.video import resized_video
from .models.mini import FRAMES, IMAGE_SIZE, SPECIAL_TOKENS
from .workloads import MiniPair


def check_device(device: str, name: str = "--device") -> None:
    """Raise `ValueError` unless `device`, which the option `name` gave, is the CPU or a GPU that is
    there.
    """
    match = re.fullmatch(r"cpu|cuda(?::(\d+))?", device)
    if not match:
        raise ValueError(f"{name} must be cpu, cuda or cuda:N, got {device!r}")
    if device != "cpu":
        if not torch.cuda.is_available():
            raise ValueError(f"{name} {device}: there is no CUDA device; use {name} cpu")
        count = torch.cuda.device_count()
        if int(match[1] or 0) >= count:
            raise ValueError(f"{name} {device}: CUDA devices here are cuda:0 to cuda:{count - 1}")


def check_questions(questions: Sequence[str]) -> None:
    """Raise `ValueError` unless every question is text without the pair's special tokens."""
    for question in questions:
        if not question.strip():
            raise ValueError("the question is empty")
        try:
            question.encode()
        except UnicodeEncodeError:
            raise ValueError(f"the question is not valid text: {question[:40]!a}") from None
        if found := [token for token in SPECIAL_TOKENS if token in question]:
            raise ValueError(f"{found[0]} in a question has a meaning of its own; leave it out")


def check_lengths(pair: MiniPair, tasks: Sequence[Task]) -> None:
    """Raise `ValueError` unless prompt, answer and one tree fit the pair's positions."""
    s = pair.settings
    most = pair.target_model.config.get_text_config().max_position_embeddings
    room = most - s.max_new_tokens - max(s.rows, s.gamma + 1)
    for task in tasks:
        length = task.inputs["input_ids"].shape[1]
        if length > room:
            raise ValueError(
                f"{task.name}: the prompt takes {length} of {most} tokens and leaves too few for "
                "the answer; ask a shorter question or lower --max-new-tokens"
            )


def read_recording(events: Path, video: Path | None) -> tuple[np.ndarray, np.ndarray]:
    """A recorded event stream, and its video or, without one, the stream itself cut into 8 slices.

    Returns:
        frames uint8 ``[8, 64, 64, 3]`` and the event image uint8 ``[64, 64, 3]``.
    """
    stream = load_events(events)
    if video is None and len(stream) < FRAMES:
        raise ValueError(
            f"{events}: {len(stream)} events are too few for {FRAMES} frames; give a video too"
        )
    image = _event_image(stream)
    if video is not None:
        return read_video(video), image
    frames = np.stack([rasterize(part) for part in split_by_count(stream, FRAMES)])
    return resize(frames, IMAGE_SIZE, "squash"), image


def read_events(events: Path) -> np.ndarray:
    """The image of a recorded event stream, uint8 ``[64, 64, 3]``."""
    return _event_image(load_events(events))


def read_video(video: Path, stop: Event | None = None) -> np.ndarray:
    """The target's frames of a video, uint8 ``[8, 64, 64, 3]``; ends early once `stop` is set."""
    return resized_video(video, FRAMES, size=IMAGE_SIZE, fit="squash", stop=stop)


def blank_video(video: Path) -> np.ndarray:
    """Frames that stand for those of `video` until it is read, uint8 ``[8, 64, 64, 3]``.

    Raises:
        FileNotFoundError: no such video.
    """
    if not video.exists():
        raise FileNotFoundError(f"video not found: {video}")
    return np.zeros((FRAMES, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)


def _event_image(stream: Events) -> np.ndarray:
    return resize(rasterize(stream)[None], IMAGE_SIZE, "squash")[0]
