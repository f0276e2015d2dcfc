"""What a process holds: does it grow from request to request?

Resident memory alone says little: an allocator keeps what was freed, and a leak of a kilobyte a
request is lost in its noise. What is counted here has no noise of its own:

    heap     bytes that malloc has given out and not got back: tensors on the CPU, the native
             memories, everything of C and C++; glibc only
    blocks   memory blocks that Python's own allocator has given out: all small objects
    tensors  bytes of tensors on any device that Python can reach, made since the watch began

Resident memory is reported beside them, after giving free pages back.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

# Requests, as parts of all, whose memory is compared: 200 to 300 and 900 to 1,000 of 1,000.
EARLY, LATE = (0.2, 0.3), (0.9, 1.0)
TOLERANCE = 0.01
COMPARED = ("heap", "blocks", "rss")


@dataclass(frozen=True)
class MemorySample:
    """After so many requests; bytes, but for `blocks`. 0 where it cannot be told."""

    requests: int
    rss: int
    heap: int
    blocks: int
    tensors: int


class MemoryWatch:
    """Samples of this process, between a start and `close`."""

    def __init__(self) -> None:
        gc.collect()
        # What lives now is not looked at again, which makes collections cheap.
        gc.freeze()
        self.samples: list[MemorySample] = []

    def sample(self, requests: int) -> MemorySample:
        """Collect garbage and measure, after `requests` requests."""
        gc.collect()
        tensors = {
            storage.data_ptr(): storage.nbytes()
            for storage in map(_storage, gc.get_objects())
            if storage is not None
        }
        total = sum(tensors.values())
        del tensors
        found = MemorySample(requests, _resident(), _heap(), sys.getallocatedblocks(), total)
        self.samples.append(found)
        return found

    def close(self) -> None:
        """Let the collector look at everything again."""
        gc.unfreeze()


def growth(samples: Sequence[MemorySample]) -> dict[str, dict[str, float]]:
    """By measure: the mean over `EARLY` and over `LATE`, and the relative difference.

    Returns:
        nothing for a measure that cannot be told, or where a window holds no sample.
    """
    total = samples[-1].requests if samples else 0
    found = {}
    for name in COMPARED:
        early, late = (
            [getattr(s, name) for s in samples if low * total <= s.requests <= high * total]
            for low, high in (EARLY, LATE)
        )
        if not early or not late or not all(early):
            continue
        before, after = sum(early) / len(early), sum(late) / len(late)
        found[name] = {
            "early": round(before),
            "late": round(after),
            "growth": after / before - 1,
            "per_request": (after - before) / ((sum(LATE) - sum(EARLY)) / 2 * total),
        }
    return found


def _storage(thing: object) -> torch.UntypedStorage | None:
    # isinstance would ask lazy modules and mocks what class they pretend to be.
    return thing.untyped_storage() if issubclass(type(thing), torch.Tensor) else None


class _Heap(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd",
            "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
        )
    ]  # fmt: skip


def _heap() -> int:
    """Bytes given out by malloc, mapped ones included; 0 without glibc 2.33."""
    ask = getattr(ctypes.CDLL(None), "mallinfo2", None) if os.name == "posix" else None
    if ask is None:
        return 0
    ask.restype = _Heap
    heap = ask()
    return heap.uordblks + heap.hblkhd


def _resident() -> int:
    """Bytes in memory, free pages given back first; 0 where /proc does not say."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
