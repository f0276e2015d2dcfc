"""The one place that imports Triton, so that the package works without it."""

from __future__ import annotations

import os
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError as error:
    triton = tl = TensorDescriptor = None
    MISSING: str | None = f"triton cannot be imported ({error}); install triton>=3.6"
else:
    MISSING = None

# Triton reads the variable when a kernel is decorated; later changes have no effect.
INTERPRETED = MISSING is None and os.environ.get("TRITON_INTERPRET") == "1"


def jit(**options: Any) -> Any:
    """`triton.jit`, or a decorator that leaves the function alone where Triton is missing."""
    return (lambda function: function) if triton is None else triton.jit(**options)


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, **meta: Any):
    """Run `kernel` on the current stream of `device`."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*args, **meta)
    else:
        kernel[grid](*args, **meta)


def unusable(device_type: str) -> str | None:
    """Why Triton kernels cannot take tensors of this device, or None."""
    if MISSING:
        return MISSING
    if device_type != "cuda" and not INTERPRETED:
        return f"it needs CUDA tensors (or TRITON_INTERPRET=1 from the start), got {device_type}"
    return None


__all__ = [
    "INTERPRETED",
    "MISSING",
    "TensorDescriptor",
    "jit",
    "launch",
    "tl",
    "triton",
    "unusable",
]
