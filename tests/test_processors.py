"""Our preprocessing against transformers' processors: bit for bit on Pillow, near it otherwise.

`data/processors_record.py` recorded the arrays and says by which versions. Where torchvision
resized, bytes differ by 2 at most: it sums with weights of 16 bits, Pillow with 22, in two passes
that both round to bytes. Nothing else may differ, so equal bytes have equal values but for the
rounding of float32.
"""

from __future__ import annotations

import hashlib
import importlib.util
import random
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from xspec_runtime.data.device_images import preprocess_frames
from xspec_runtime.data.images import CLIP_MEAN, CLIP_STD, clip_preprocess
from xspec_runtime.data.video import load_video

DATA = Path(__file__).resolve().parent / "data"
SIZES = {"clip": 336, "image": 224, "video": 224}
ON_PILLOW, WITH_TORCHVISION = "4.46.3", "5.23.0"


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("record", DATA / "processors_record.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RECORD = script()
PICTURES = {f"{h}x{w} {mode}": (h, w, mode) for h, w, mode in RECORD.PICTURES}


class Recorded:
    """One file of recorded arrays; `names` are processor and picture."""

    def __init__(self, version: str) -> None:
        with safe_open(DATA / f"processors_{version}.safetensors", "np") as file:
            self.about = file.metadata()
            self.arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        self.names = sorted({name.rpartition(".")[0] for name in self.arrays})


OLD, NEW = Recorded(ON_PILLOW), Recorded(WITH_TORCHVISION)
SAME_BITS = [(OLD, name) for name in OLD.names]
SAME_BITS += [(NEW, name) for name in NEW.names if f"{name}.bytes" not in NEW.arrays]
NEAR = [name for name in NEW.names if f"{name}.bytes" in NEW.arrays]


def frame_of(name: str, folder: Path) -> np.ndarray:
    """The recorded picture uint8 ``[H, W, 3]``, read from a file as frames are."""
    processor, _, picture = name.partition(" ")
    pixels = RECORD.picture(*PICTURES[picture], shift=3 if processor == "video" else 0)
    Image.fromarray(pixels).save(folder / "frame.png")
    return load_video(folder, 1)[0]


def ours(name: str, folder: Path) -> np.ndarray:
    frame, size = frame_of(name, folder), SIZES[name.partition(" ")[0]]
    found = clip_preprocess(frame, size)
    assert torch.equal(preprocess_frames(torch.from_numpy(frame)[None], size), found)
    return found[0].numpy()


@pytest.mark.parametrize(
    ("recorded", "name"),
    [pytest.param(r, n, id=f"{r.about['transformers']} {n}") for r, n in SAME_BITS],
)
def test_equals_the_processors_on_pillow(recorded, name, tmp_path):
    found, grid = ours(name, tmp_path), RECORD.GRID
    np.testing.assert_array_equal(found[:, ::grid, ::grid], recorded.arrays[f"{name}.grid"])
    assert hashlib.sha256(found.tobytes()).hexdigest() == recorded.about[name]


@pytest.mark.parametrize("name", NEAR)
def test_is_near_the_processors_on_torchvision(name, tmp_path):
    found, step, grid = ours(name, tmp_path), RECORD.BYTES, RECORD.GRID
    here, there = RECORD.bytes_of(found)[:, ::step, ::step], NEW.arrays[f"{name}.bytes"]
    apart = np.abs(here.astype(int) - there)
    assert apart.max() <= 2 and np.count_nonzero(apart) <= 0.02 * apart.size
    here, there = found[:, ::grid, ::grid], NEW.arrays[f"{name}.grid"]
    equal = RECORD.bytes_of(here) == RECORD.bytes_of(there)
    np.testing.assert_allclose(
        here[equal], there[equal], rtol=0, atol=4 * np.spacing(np.float32(1))
    )


def test_the_recording_covers_every_processor():
    for recorded in (OLD, NEW):
        assert {name.partition(" ")[0] for name in recorded.names} == set(SIZES)
    assert "torchvision" in NEW.about and "torchvision" not in OLD.about
    assert {name.partition(" ")[0] for name in NEAR} == {"clip", "video"}
    assert RECORD.CLIP_MEAN == CLIP_MEAN and RECORD.CLIP_STD == CLIP_STD


def test_equals_the_processors_of_the_transformers_here(rng: random.Random):
    """Pictures of other sizes than the recorded ones, and other versions of Pillow."""
    transformers = pytest.importorskip("transformers")
    try:
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    except ImportError:
        pytest.skip(f"transformers {transformers.__version__} has no processors for Pillow alone")
    for _ in range(12):
        height, width, size = rng.randrange(4, 200), rng.randrange(4, 200), rng.randrange(8, 90)
        pixels = np.random.default_rng(rng.randrange(1 << 30)).integers(
            0, 256, (height, width, 3), dtype=np.uint8
        )
        sides = {"height": size, "width": size}
        clip = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=sides)
        llava = transformers.VideoLlavaImageProcessor(size={"shortest_edge": size}, crop_size=sides)
        for processor in (clip, llava):
            (there,) = processor(images=Image.fromarray(pixels), return_tensors="pt").values()
            assert torch.equal(clip_preprocess(pixels, size), there), (height, width, size)
