"""Event and video clips in the layout of the published DSEC subset, read without trusting it.

One folder a duration, named ``my_egpt_dsec_seq_1s`` (test) or ``my_egpt_dsec_train_1s``:

    EventGPT_Instruction_Subset.json   a list of samples
    event_npy/DRIVE/000000.npy         event stream {x, y, t, p}
    event_image/DRIVE/000000_0.png     five event images a clip
    video/DRIVE/000000/*.png           the frames
    mp4/DRIVE/000000.mp4               the same frames as a film

Clips of one drive overlap in time: a split must not cut through a drive.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..files import read_json
from .events import load_events
from .video import IMAGE_SUFFIXES, load_video

__all__ = [
    "DURATIONS",
    "Clip",
    "Dataset",
    "check",
    "dataset_folder",
    "open_dataset",
    "present_durations",
]

SAMPLES = "EventGPT_Instruction_Subset.json"
DURATIONS = ("500ms", "1s", "2s", "4s", "5s", "8s", "10s", "16s", "20s")
EVENT_IMAGES = 5  # of a clip, as EventGPT was trained
_PREFIXES = ("my_egpt_dsec_seq_", "my_egpt_dsec_train_")


@dataclass(frozen=True, slots=True)
class Clip:
    """One clip. Paths are inside the dataset's folder; whether they exist `check` tells.

    Attributes:
        id: as the file of samples gives it.
        drive: the recording that it was cut from.
        events: event stream.
        images: event images, in order; empty where the sample names none.
        frames: folder of the video's frames.
        film: the same as a file, or None.
        question: the first question of its conversation, or "".
    """

    index: int
    id: str
    drive: str
    events: Path
    images: tuple[Path, ...]
    frames: Path
    film: Path | None
    question: str

    @property
    def video(self) -> Path:
        """The film where there is one, else the folder of frames."""
        return self.film if self.film and self.film.is_file() else self.frames


@dataclass(frozen=True, slots=True)
class Dataset:
    """The clips of one folder; `duration` is "" where its name does not tell."""

    folder: Path
    duration: str
    clips: list[Clip]

    @property
    def drives(self) -> list[str]:
        """Names of the drives in order of first appearance."""
        return list(dict.fromkeys(clip.drive for clip in self.clips))

    def by_drive(self, folds: int) -> list[list[Clip]]:
        """Whole drives dealt to `folds` parts of about equal size.

        Raises:
            ValueError: there are fewer drives than folds.
        """
        if not 1 <= folds <= len(self.drives):
            raise ValueError(
                f"{self.folder} has {len(self.drives)} drives, which do not make {folds} folds"
            )
        size = {name: sum(clip.drive == name for clip in self.clips) for name in self.drives}
        parts: list[list[str]] = [[] for _ in range(folds)]
        for name in sorted(size, key=lambda name: (-size[name], name)):
            min(parts, key=lambda part: sum(map(size.get, part))).append(name)
        return [[clip for clip in self.clips if clip.drive in part] for part in parts]


def open_dataset(folder: Path, duration: str = "") -> Dataset:
    """The dataset in `folder`, or in the subfolder for `duration`.

    Raises:
        FileNotFoundError: there is no such folder, or it has no file of samples.
        ValueError: `duration` is unknown, or missing in a folder above several datasets, or the
            file of samples is damaged; names the sample.
    """
    folder = dataset_folder(Path(folder), duration)
    values = read_json(folder / SAMPLES, "file of samples")
    if not isinstance(values, list) or not values:
        raise ValueError(f"{folder / SAMPLES} must hold a list of samples")
    clips = [_clip(folder, index, value) for index, value in enumerate(values)]
    return Dataset(folder, _duration(folder), clips)


def dataset_folder(folder: Path, duration: str = "") -> Path:
    """`folder`, or the one in it that holds clips of `duration`."""
    if not folder.is_dir():
        raise FileNotFoundError(f"dataset folder not found: {folder}")
    if not duration and not (folder / SAMPLES).exists() and (found := present_durations(folder)):
        raise ValueError(f"{folder} holds datasets of {', '.join(found)}: --duration names one")
    if not duration or _duration(folder) == duration:
        return folder
    if duration not in DURATIONS:
        raise ValueError(f"duration must be one of {', '.join(DURATIONS)}, got {duration!r}")
    for prefix in _PREFIXES:
        if (folder / f"{prefix}{duration}").is_dir():
            return folder / f"{prefix}{duration}"
    names = " nor ".join(f"{prefix}{duration}" for prefix in _PREFIXES)
    raise FileNotFoundError(f"{folder} has neither {names}")


def present_durations(folder: Path) -> list[str]:
    """Durations that `folder` has a dataset for, shortest first."""
    found = {_duration(path) for path in folder.iterdir() if (path / SAMPLES).is_file()}
    return [duration for duration in DURATIONS if duration in found]


def check(dataset: Dataset, read: bool = False) -> list[str]:
    """What is wrong with the files of `dataset`, a line each.

    Args:
        read: read every stream and decode every video too, instead of looking for the files only.
    """
    faults = []
    for clip in dataset.clips:
        for path in (clip.events, *clip.images):
            if not path.is_file():
                faults.append(f"{path}: missing")
            elif not path.stat().st_size:
                faults.append(f"{path}: empty")
        pictures = clip.frames.is_dir() and any(
            path.suffix.lower() in IMAGE_SUFFIXES for path in clip.frames.iterdir()
        )
        film = clip.film is not None and clip.film.is_file()
        if not pictures and not film:
            faults.append(f"{clip.frames}: neither frames nor a film")
        if read:
            faults += _unreadable(clip)
    ids = [clip.id for clip in dataset.clips]
    faults += [f"{dataset.folder / SAMPLES}: id {i} twice" for i in _repeated(ids)]
    return faults


def _unreadable(clip: Clip) -> list[str]:
    faults = []
    for path, attempt in ((clip.events, load_events), (clip.video, load_video)):
        try:
            if path.exists():
                attempt(path)
        except (ValueError, OSError, RuntimeError) as error:
            faults.append(str(error))
    return faults


def _repeated(names: Sequence[str]) -> list[str]:
    seen: set[str] = set()
    return sorted({name for name in names if name in seen or seen.add(name)})


def _duration(folder: Path) -> str:
    for prefix in _PREFIXES:
        if folder.name.startswith(prefix) and folder.name.removeprefix(prefix) in DURATIONS:
            return folder.name.removeprefix(prefix)
    return ""


def _clip(folder: Path, index: int, value: object) -> Clip:
    where = f"{folder / SAMPLES}: sample {index}"
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be an object, got {type(value).__name__}")

    def inside(room: str, key: str, name: object) -> Path:
        if not isinstance(name, str) or not name:
            raise ValueError(f"{where}: {key} must be a path, got {name!r}")
        path = Path(name)
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f"{where}: {key} is {name!r}, expected a path inside the dataset")
        return folder / room / path

    images = value.get("event_image") or []
    if not isinstance(images, list):
        raise ValueError(f"{where}: event_image must be a list, got {type(images).__name__}")
    film = value.get("mp4_data")
    events = inside("event_npy", "event_data", value.get("event_data"))
    return Clip(
        index,
        str(value.get("id", index)),
        events.parent.relative_to(folder / "event_npy").as_posix(),
        events,
        tuple(inside("event_image", "event_image", name) for name in images),
        inside("video", "video_data", value.get("video_data")),
        inside("mp4", "mp4_data", film) if film else None,
        _question(where, value.get("conversations")),
    )


def _question(where: str, turns: object) -> str:
    """The first thing that a person says; published conversations are empty strings."""
    if not turns:
        return ""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"{where}: conversations must be a list of turns")
    said = (turn.get("value") for turn in turns if turn.get("from") == "human")
    return str(next(said, "") or "").replace("<event>", "").strip()
