"""Workspace: scratch memory and semaphores that the kernels of one decoder share across launches.

A split-K product writes partial sums and counts arrivals; two kernels that run at the same time
must not share either, so there is one Workspace per decoder and stream. Every kernel leaves its
semaphores at zero, which saves a memset a launch: they are zeroed once, when they are allocated.

Outgrown storage is kept, because a CUDA graph captured earlier still points at it; storage at least
doubles as it grows, so what is kept is less than what is used.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


class Workspace:
    """Named buffers that grow to the largest size asked for, on one device.

    Buffers hold what the last kernel left there. Not safe to use from two streams at once.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.empty(0, device=device).device
        self._storage: dict[str, torch.Tensor] = {}
        self._outgrown: list[torch.Tensor] = []

    def buffer(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Scratch of this shape, contiguous and aligned, contents unspecified.

        Two calls with one name return the same memory.

        Raises:
            ValueError: the name is in use with another dtype.
            RuntimeError: the buffer would have to grow while a CUDA graph is being captured.
        """
        return self._take(name, math.prod(shape), dtype).view(*shape)

    def semaphores(self, name: str, count: int) -> torch.Tensor:
        """[count] int32, zero unless a kernel was cut short; raises as `buffer` does."""
        return self._take(name, count, torch.int32, zeroed=True)

    def reset(self) -> None:
        """Zero every int32 buffer, as after a kernel that failed half-way."""
        for storage in self._storage.values():
            if storage.dtype == torch.int32:
                storage.zero_()

    @property
    def nbytes(self) -> int:
        """Bytes held, outgrown storage included."""
        return sum(tensor.nbytes for tensor in (*self._storage.values(), *self._outgrown))

    def _take(
        self, name: str, count: int, dtype: torch.dtype, zeroed: bool = False
    ) -> torch.Tensor:
        held = self._storage.get(name)
        if held is not None and held.dtype != dtype:
            raise ValueError(
                f"workspace: buffer {name!r} is {held.dtype}, it was asked for as {dtype}"
            )
        if held is None or held.numel() < count:
            held = self._grow(name, count, dtype, held, zeroed)
        return held[:count]

    def _grow(
        self, name: str, count: int, dtype: torch.dtype, held: torch.Tensor | None, zeroed: bool
    ) -> torch.Tensor:
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"workspace: buffer {name!r} needs {count} elements and has "
                f"{0 if held is None else held.numel()}; run the op once on these shapes before "
                "capturing a graph of it"
            )
        if held is not None:
            self._outgrown.append(held)
            count = max(count, 2 * held.numel())
        allocate = torch.zeros if zeroed else torch.empty
        self._storage[name] = allocate(count, dtype=dtype, device=self.device)
        return self._storage[name]
