"""Preprocessing on a device: Pillow's bits, and pinned memory that is used again."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from xspec_runtime.data.device_images import preprocess_frames
from xspec_runtime.data.images import clip_preprocess
from xspec_runtime.data.staging import StagingBuffers, Uploads
from xspec_runtime.data.video import DeviceVideo, preprocess_video

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fit", ["crop", "squash"])
def test_bits_are_those_of_pillow(device: str, fit: str, rng: random.Random) -> None:
    for height, width, size in (
        *((480, 640, 224), (64, 64, 64), (37, 91, 64), (30, 20, 48), (1, 5, 7), (64, 100, 64)),
        *((rng.randrange(1, 90), rng.randrange(1, 90), rng.randrange(1, 70)) for _ in range(25)),
    ):
        if int(size * height / min(height, width)) < size:
            continue
        draw = np.random.default_rng(rng.randrange(1 << 30))
        frames = draw.integers(0, 256, (2, height, width, 3), dtype=np.uint8)
        # Edges of the range, where sums leave it.
        frames[0] = np.where(frames[0] > 127, 255, 0)
        found = preprocess_frames(torch.from_numpy(frames).to(device), size, fit=fit)
        assert torch.equal(found.cpu(), clip_preprocess(frames, size, fit=fit)), (
            height,
            width,
            size,
        )


def test_what_is_refused() -> None:
    good = torch.zeros(1, 4, 4, 3, dtype=torch.uint8)
    for frames in (good.float(), good[0], good[..., :2], good[:, :0]):
        with pytest.raises(ValueError, match=r"expected uint8 \[T, H, W, 3\], got"):
            preprocess_frames(frames, 4)
    with pytest.raises(ValueError, match="size must be at least 1"):
        preprocess_frames(good, 0)
    with pytest.raises(ValueError, match="std > 0"):
        preprocess_frames(good, 4, std=(1, 0, 1))
    with pytest.raises(ValueError, match="limit must be at least 1"):
        StagingBuffers((1,), torch.uint8, "cpu", 0)


@pytest.mark.parametrize("device", DEVICES)
def test_a_clip_on_a_device(device: str, tmp_path: Path) -> None:
    read = DeviceVideo(device, size=32)
    draw = np.random.default_rng(0)
    for height, width in ((48, 64), (48, 64), (40, 40)):
        clip = draw.integers(0, 256, (20, height, width, 3), dtype=np.uint8)
        np.save(tmp_path / "clip.npy", clip)
        found = read(tmp_path / "clip.npy")
        assert found.device.type == device
        assert torch.equal(found.cpu(), preprocess_video(tmp_path / "clip.npy", size=32))
    with pytest.raises(FileNotFoundError, match="video not found"):
        read(tmp_path / "no.mp4")


def test_on_the_cpu_every_caller_has_its_own() -> None:
    buffers = StagingBuffers((3,), torch.uint8, "cpu")
    one, two = (buffers.upload(lambda host, v=v: host.fill_(v)) for v in (1, 2))
    assert one.tolist() == [1, 1, 1] and two.tolist() == [2, 2, 2]
    assert not one.is_pinned()


class FakeEvent:
    """A copy that ends when told to, or is waited for."""

    made: list[FakeEvent]

    def __init__(self) -> None:
        self.done = self.waited = False
        self.made.append(self)

    def record(self, stream: object) -> None:
        self.stream = stream

    def query(self) -> bool:
        return self.done

    def synchronize(self) -> None:
        self.done = self.waited = True


@pytest.fixture
def pinned(monkeypatch) -> list[torch.Tensor]:
    """CUDA's part played by the CPU; the host tensors in the order they were pinned."""
    FakeEvent.made, made, empty = [], [], torch.empty

    def pin(*args, pin_memory: bool = False, **kwargs) -> torch.Tensor:
        tensor = empty(*args, **kwargs)
        made.extend([tensor] if pin_memory else [])
        return tensor

    monkeypatch.setattr(torch, "empty", pin)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *_, **__: self)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "stream")
    return made


def test_a_buffer_is_used_again_once_its_copy_has_ended(pinned) -> None:
    buffers = StagingBuffers((2,), torch.uint8, "cuda", limit=2)
    seen = [buffers.upload(lambda host: host.fill_(1)).data_ptr() for _ in range(2)]
    assert len(pinned) == 2 and len(set(seen)) == 2
    # Both are in flight: the third caller waits for the older one.
    assert buffers.upload(lambda host: host.fill_(2)).data_ptr() == seen[0]
    assert [e.waited for e in FakeEvent.made] == [True, False, False]
    FakeEvent.made[1].done = True
    assert buffers.upload(lambda host: host.fill_(3)).data_ptr() == seen[1]
    assert [e.waited for e in FakeEvent.made] == [True, False, False, False]
    assert len(pinned) == 2


def test_a_fill_that_fails_gives_its_buffer_back(pinned) -> None:
    buffers = StagingBuffers((2,), torch.uint8, "cuda", limit=1)

    def fail(host: torch.Tensor) -> None:
        raise OSError("no frames")

    for _ in range(3):
        with pytest.raises(OSError, match="no frames"):
            buffers.upload(fail)
    buffers.upload(lambda host: host.fill_(1))
    assert len(pinned) == 1 and len(FakeEvent.made) == 1


def test_uploads_by_shape(pinned) -> None:
    upload = Uploads("cuda")
    values = [torch.full(shape, 3.0) for shape in ((2, 2), (3,), (2, 2))]
    found = [upload(value).clone() for value in values]
    assert all(torch.equal(a, b) for a, b in zip(values, found, strict=True))
    assert sorted(tuple(t.shape) for t in pinned) == [(2, 2), (2, 2), (3,)]
    FakeEvent.made[0].done = True
    upload(values[0])
    assert len(pinned) == 3
    assert Uploads("cpu")(values[0]) is values[0]
