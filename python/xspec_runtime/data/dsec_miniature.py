"""A small dataset in the layout of `dsec`, from procedural scenes: for tests and first steps."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ..files import replace_file, write_text
from .captions import QUESTIONS, Scene
from .dsec import DURATIONS, EVENT_IMAGES, SAMPLES
from .events import event_images, load_events
from .scene_video import HEIGHT, RATE, WIDTH, pictures, write_scene
from .scenes import event_stream, make_sample, render

FIRST_SCENE = 1_500_000  # none of training, none of the end-to-end tests
PUBLISHED_FRAMES = 8  # frames kept as pictures; a film holds all


def write_miniature(
    root: Path,
    durations: tuple[str, ...] = ("1s",),
    drives: int = 2,
    clips: int = 3,
    split: str = "seq",
    on_clip: Callable[[int, int], None] = lambda done, total: None,
) -> list[Path]:
    """Write one dataset a duration under `root`; files that are there already are kept.

    Args:
        drives, clips: drives, and clips of each.
        split: "seq" names the folders as the published test set does, "train" as its training set.

    Returns:
        the folders.

    Raises:
        ValueError: an argument is out of range.
        RuntimeError: PyAV is not installed.
    """
    if wrong := set(durations) - set(DURATIONS):
        raise ValueError(f"duration must be one of {', '.join(DURATIONS)}, got {min(wrong)!r}")
    if drives < 1 or clips < 1:
        raise ValueError(f"drives and clips must be at least 1, got {drives} and {clips}")
    if split not in ("seq", "train"):
        raise ValueError(f"split must be seq or train, got {split!r}")
    folders = [root / f"my_egpt_dsec_{split}_{duration}" for duration in durations]
    done, total = 0, len(folders) * drives * clips
    for part, (folder, duration) in enumerate(zip(folders, durations, strict=True)):
        samples = []
        for number in range(drives * clips):
            seed = FIRST_SCENE + 10_000 * (split == "train") + 1000 * part + number
            name = f"procedural_{number // clips:02}/{number % clips:06}"
            samples.append(_write_clip(folder, name, seed, _seconds(duration), split))
            done += 1
            on_clip(done, total)
        write_text(folder / SAMPLES, json.dumps(samples, indent=1) + "\n")
    return folders


def _seconds(duration: str) -> float:
    return float(duration[:-2]) / 1000 if duration.endswith("ms") else float(duration[:-1])


def _write_clip(folder: Path, name: str, seed: int, seconds: float, split: str) -> dict:
    from PIL import Image

    sample = make_sample(seed)
    events = folder / "event_npy" / f"{name}.npy"
    if not events.is_file():
        stream = _full_size(seed, round(seconds * 1e6))
        replace_file(events, lambda path: np.save(path, stream, allow_pickle=True))
    images = [f"{name}_{i}.png" for i in range(EVENT_IMAGES)]
    if not all((folder / "event_image" / image).is_file() for image in images):
        drawn = event_images(load_events(events), EVENT_IMAGES)
        for image, pixels in zip(images, drawn, strict=True):
            replace_file(folder / "event_image" / image, Image.fromarray(pixels).save)
    film = folder / "mp4" / f"{name}.mp4"
    if not film.is_file():
        replace_file(
            film, lambda path: write_scene(path, sample.video, max(2, round(seconds * RATE)))
        )
    frames = [folder / "video" / name / f"{i:06}.png" for i in range(PUBLISHED_FRAMES)]
    for path, pixels in zip(frames, pictures(sample.video, len(frames)), strict=True):
        if not path.is_file():
            replace_file(path, Image.fromarray(pixels).save)
    return {
        "id": str(uuid.uuid5(uuid.NAMESPACE_OID, f"{split}/{seed}")),
        "split": "train" if split == "train" else "test",
        "event_data": f"{name}.npy",
        "video_data": name,
        "mp4_data": f"{name}.mp4",
        "event_image": images,
        "conversations": [
            {"from": "human", "value": f"<event>\n{QUESTIONS[seed % len(QUESTIONS)]}"},
            {"from": "gpt", "value": ""},
        ],
    }


def _full_size(seed: int, duration_us: int) -> dict[str, np.ndarray]:
    """The events of a scene on a 640x480 sensor: each small pixel is a block of large ones."""
    rng = np.random.default_rng(seed)
    frames = render(Scene.draw(rng), rng)
    small = event_stream(frames, rng, duration_us)
    height, width = frames.shape[1:3]
    edges_x = np.arange(width + 1) * WIDTH // width
    edges_y = np.arange(height + 1) * HEIGHT // height
    wide, high = WIDTH // width, -(-HEIGHT // height)
    dx, dy = (grid.ravel() for grid in np.meshgrid(np.arange(wide), np.arange(high)))
    x = edges_x[small["x"]][:, None] + dx
    y = edges_y[small["y"]][:, None] + dy
    inside = y < edges_y[small["y"] + 1][:, None]
    repeat = inside.sum(1)
    return {
        "x": x[inside].astype(np.uint16),
        "y": y[inside].astype(np.uint16),
        "t": np.repeat(small["t"], repeat),
        "p": np.repeat(small["p"], repeat),
    }
