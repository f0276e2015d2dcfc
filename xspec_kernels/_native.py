"""The native module `_C`, and what to say where it is missing."""

from __future__ import annotations

import time

import torch

try:
    from xspec_kernels import _C as module
except ImportError as error:
    module = None
    MISSING: str | None = (
        f"the native module xspec_kernels._C cannot be imported ({error}); build it with "
        "`pip install -e .` in the source tree"
    )
else:
    MISSING = None


def cpu_unusable() -> str | None:
    """Why the C++ CPU kernels cannot run, or None."""
    return MISSING


def cuda_unusable(device_type: str) -> str | None:
    """Why the CUDA C++ kernels cannot take tensors of this device, or None."""
    if module is None:
        return MISSING
    if not module.built_with_cuda:
        return "xspec_kernels._C was built without CUDA (no nvcc, or XSPEC_CUDA=OFF)"
    if device_type != "cuda":
        return f"it needs CUDA tensors, got {device_type}"
    return None


def await_change(word: torch.Tensor, before: int, microseconds: int) -> bool:
    """Look at one int64 of host memory until it is not `before`; False once the time is over.

    Other Python threads run meanwhile.
    """
    if module is not None:
        return module.await_change(word.data_ptr(), before, microseconds)
    value, deadline = word.numpy(), time.perf_counter() + microseconds / 1e6
    while value == before:
        if time.perf_counter() >= deadline:
            return False
        time.sleep(0)
    return True


def address(tensor: torch.Tensor | None) -> int:
    """The tensor's first byte, 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def device_and_stream(tensor: torch.Tensor) -> tuple[int, int]:
    """The device index and current stream that a native launch takes; (-1, 0) on the CPU."""
    if tensor.device.type == "cpu":
        return -1, 0
    return tensor.device.index, torch.cuda.current_stream(tensor.device).cuda_stream
