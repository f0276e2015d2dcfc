"""Writes processors_VERSION.safetensors beside this file: what transformers' own processors return.

Needs transformers and Pillow, and nothing of this repository:

    python tests/data/processors_record.py

The committed ones come from transformers 4.46.3 without torchvision, and from 5.23.0 with
torchvision 0.28.0, both on Pillow 13.0.0. Per processor and picture there are the float32 values on
a grid, every 32nd row and column, and the SHA-256 of all of them in the file's metadata, with the
versions. Where torchvision did the work, the whole tensor rounded to bytes again is there as well,
every 8th row and column.
"""

from __future__ import annotations

import hashlib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

GRID, BYTES = 32, 8
# Height, width, and how the file's picture is stored: portrait, landscape, tiny, exact, odd.
PICTURES = (
    (480, 640, "RGB"),
    (301, 170, "RGB"),
    (9, 14, "RGB"),
    (2, 7, "RGB"),
    (224, 224, "RGB"),
    (336, 336, "RGB"),
    (224, 398, "RGB"),
    (120, 161, "L"),
)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def picture(height: int, width: int, mode: str, shift: int = 0) -> np.ndarray:
    """uint8 ``[H, W, 3]`` (RGB) or ``[H, W]`` (L), by whole-number arithmetic: edges, ramps and
    noise that leave the range when they are resized.
    """
    y, x, channel = np.ogrid[:height, :width, : len(mode)]
    blocks = ((x + shift) // 7 + y // 5) % 2 * 90
    return ((x * 37 + y * 101 + x * y % 251 * 3 + channel * 85 + blocks) % 256).astype(np.uint8)[
        ..., slice(None) if len(mode) > 1 else 0
    ]


def bytes_of(values: np.ndarray) -> np.ndarray:
    """Normalized ``[3, H, W]`` as the bytes they were made of."""
    mean, std = (np.array(each)[:, None, None] for each in (CLIP_MEAN, CLIP_STD))
    return np.rint((values.astype(np.float64) * std + mean) * 255).astype(np.uint8)


def load_torchvision() -> object:
    """None without torchvision; else what lets one that is built for CUDA load beside a torch for
    CPUs, as long as it is kept.
    """
    try:
        version("torchvision")
    except PackageNotFoundError:
        return None
    import torch

    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


def main() -> None:
    library = load_torchvision()
    fast = library is not None
    import transformers
    from PIL import Image
    from safetensors.numpy import save_file
    from transformers import CLIPImageProcessor, VideoLlavaImageProcessor

    clip = CLIPImageProcessor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    llava = VideoLlavaImageProcessor()
    made: dict[str, np.ndarray] = {}
    metadata = {n: version(n) for n in ("transformers", "pillow", "numpy")}
    metadata |= {"script": "tests/data/processors_record.py"}
    if fast:
        metadata["torchvision"] = version("torchvision")

    def keep(name: str, values: np.ndarray, pillow: bool) -> None:
        metadata[name] = hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()
        made[f"{name}.grid"] = np.ascontiguousarray(values[:, ::GRID, ::GRID])
        if not pillow:
            made[f"{name}.bytes"] = bytes_of(values)[:, ::BYTES, ::BYTES].copy()

    def first(found) -> np.ndarray:
        (values,) = found.values()
        return np.asarray(values[0], np.float32)

    for height, width, mode in PICTURES:
        name = f"{height}x{width} {mode}"
        image = Image.fromarray(picture(height, width, mode))
        keep(f"clip {name}", first(clip(images=image, return_tensors="pt")), not fast)
        keep(f"image {name}", first(llava(images=image, return_tensors="pt")), True)
        if mode == "RGB":
            clip_of = np.stack([picture(height, width, mode, shift) for shift in (0, 3)])
            if hasattr(transformers, "VideoLlavaVideoProcessor"):
                found = transformers.VideoLlavaVideoProcessor()(
                    videos=[clip_of], return_tensors="pt"
                )
            else:
                found = llava(images=None, videos=[list(clip_of)], return_tensors="np")
            keep(f"video {name}", first(found)[1], not fast)
    file = Path(__file__).with_name(f"processors_{transformers.__version__}.safetensors")
    save_file(made, file, metadata)
    file.chmod(0o644)


if __name__ == "__main__":
    main()
