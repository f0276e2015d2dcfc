"""Host memory that frames pass on their way to a device, pinned once and used again."""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock

import torch


class StagingBuffers:
    """Tensors of one shape, filled on the host and copied to a device without a wait.

    A copy to a GPU reads pinned memory while the host goes on, and pinning takes longer than the
    copy; so a buffer is pinned once, and handed out again once its last copy has ended. On the CPU
    there is nothing to copy: every caller gets memory of its own.

    Args:
        limit: pinned buffers at most; with all of them in flight, the next caller waits for one.

    Raises:
        ValueError: the limit is below 1.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device | str,
        limit: int = 2,
    ) -> None:
        if limit < 1:
            raise ValueError(f"limit must be at least 1, got {limit}")
        self.shape, self.dtype, self.device = tuple(shape), dtype, torch.device(device)
        self._limit = limit
        self._lock = Lock()
        # Oldest copy first; (buffer, what tells that its copy has ended).
        self._flying: list[tuple[torch.Tensor, torch.cuda.Event]] = []
        self._free: list[torch.Tensor] = []
        self._made = 0

    def upload(self, fill: Callable[[torch.Tensor], object]) -> torch.Tensor:
        """Let `fill` write a host tensor, whose old contents mean nothing; the copy on the device,
        ready for work on the current stream. Any thread may call this.
        """
        if self.device.type != "cuda":
            host = torch.empty(self.shape, dtype=self.dtype)
            fill(host)
            return host
        host = self._take()
        try:
            fill(host)
            there = host.to(self.device, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record(torch.cuda.current_stream(self.device))
        except BaseException:
            with self._lock:
                self._free.append(host)
            raise
        with self._lock:
            self._flying.append((host, copied))
        return there

    def _take(self) -> torch.Tensor:
        with self._lock:
            while self._flying and self._flying[0][1].query():
                self._free.append(self._flying.pop(0)[0])
            if self._free:
                return self._free.pop()
            if self._made < self._limit or not self._flying:
                self._made += 1
                return torch.empty(self.shape, dtype=self.dtype, pin_memory=True)
            host, copied = self._flying.pop(0)
        copied.synchronize()
        return host


class Uploads:
    """`StagingBuffers` by shape and dtype, for tensors that come in few of them."""

    def __init__(self, device: torch.device | str) -> None:
        self._device = torch.device(device)
        self._buffers: dict[tuple, StagingBuffers] = {}

    def __call__(self, value: torch.Tensor) -> torch.Tensor:
        """A tensor of the CPU on the device; itself where that is the CPU too."""
        if self._device.type != "cuda":
            return value
        key = (tuple(value.shape), value.dtype)
        if key not in self._buffers:
            self._buffers[key] = StagingBuffers(*key, self._device)
        return self._buffers[key].upload(lambda host: host.copy_(value))
