"""The embedded pair from file to last token: reading the video is part of every request."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event
from typing import TYPE_CHECKING

import numpy as np

from ..arms import Arm, Task
from ..data.captions import QUESTIONS
from ..data.dsec import Clip
from ..data.scene_video import write_scene
from ..data.scenes import make_sample
from ..errors import out_of_memory
from ..inputs import read_events, read_video
from ..models.mini import TEST_SEED
from ..overlap import check_mode
from .base import Workload
from .modes import OWN_CLOCK
from .overlap_arms import OVERLAPPING, OverlapArm, PreparedArm
from .pair import MiniPair

if TYPE_CHECKING:
    from .vlm import FolderRun


def overlap_modes(text: str, video: Path | None, events: Path | None, target: str) -> list[str]:
    """The modes that a command line asks for; none where no video is read.

    Args:
        text: names separated by commas; empty: ``window`` where a video is read.

    Raises:
        ValueError: an unknown mode, one named twice, or nothing whose preparation could be hidden.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        check_mode(name, "--overlap")
    if len(set(names)) < len(names):
        raise ValueError(f"--overlap names a mode more than once: {text}")
    if names and target != "mini" and not video:
        raise ValueError(
            "--overlap goes with the embedded pair or --dataset-dir, not a text model in --target"
        )
    if names and events and not video:
        raise ValueError("--overlap needs a video beside --events: add --video FILE")
    return names or (["window"] if video else [])


def reader(video: Path) -> Callable[[Event], np.ndarray]:
    """What makes the target's frames of a request; raises as `read_video` does."""
    return lambda stop: read_video(video, stop)


def readable(
    clips: Sequence[Clip], make: Callable[[int, Clip], Task]
) -> tuple[list[Task], list[str]]:
    """A task for each clip that can be read, and a line for each that cannot.

    Raises:
        ValueError: none can.
    """
    tasks, faults = [], []
    for i, clip in enumerate(clips):
        try:
            tasks.append(make(i, clip))
        except (ValueError, OSError, RuntimeError) as error:
            if out_of_memory(error):
                raise
            faults.append(f"{clip.drive} {clip.events.stem}: {' '.join(str(error).split())}")
    if not tasks:
        raise ValueError(f"none of {len(clips)} clips could be read: {faults[0]}")
    return tasks, faults


def clip_tasks(
    pair: MiniPair, clips: Sequence[Clip], questions: Sequence[str] | None = None
) -> tuple[list[Task], list[str]]:
    """Recorded clips, each with its own question or with `questions` in turn; see `readable`."""

    def task(i: int, clip: Clip) -> Task:
        question = questions[i % len(questions)] if questions else clip.question or QUESTIONS[0]
        name = f"{clip.drive} {clip.events.stem}"
        image, read = read_events(clip.events), reader(clip.video)
        return pair.task(name, question, read_video(clip.video), image, read)

    return readable(clips, task)


def scene_videos(
    pair: MiniPair,
    files: ExitStack,
    count: int,
    seed: int = 0,
    questions: Sequence[str] = QUESTIONS,
) -> list[Task]:
    """`MiniPair.scene_tasks` with each scene in a video file; `files` removes those."""
    folder = Path(files.enter_context(TemporaryDirectory(prefix="xspec-scenes-")))
    tasks = []
    for i in range(count):
        sample, file = make_sample(TEST_SEED + 100_000 * seed + i), folder / f"{i}.mp4"
        write_scene(file, sample.video)
        question = questions[i % len(questions)]
        frames = read_video(file)
        tasks.append(pair.task(f"scene {i}", question, frames, sample.event_image, reader(file)))
    return tasks


def from_file(pair: MiniPair | FolderRun, workload: Workload, modes: Sequence[str]) -> Workload:
    """The arms of `workload` behind the preparation of their tasks, where the draft says nothing;
    and beside each that has a draft model, one that overlaps in each of `modes`.
    """

    def behind(make: Callable[[], Arm]) -> Callable[[], Arm]:
        return lambda: PreparedArm(make())

    def beside(name: str, mode: str) -> Callable[[], Arm]:
        return lambda: OverlapArm(f"{name}_{mode}", pair.overlap_decoder(name, mode), mode)

    arms: dict[str, Callable[[], Arm]] = {}
    for name, make in workload.arms.items():
        arms[name] = make if name in OWN_CLOCK else behind(make)
        if name in OVERLAPPING:
            arms |= {f"{name}_{mode}": beside(name, mode) for mode in modes}
    workload.arms = arms
    workload.facts |= {"overlap": ",".join(modes), "measured_from": "video file"}
    return workload
