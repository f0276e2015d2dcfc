"""Op registration, argument checks and the choice of a backend.

Every op is a torch operator `torch.ops.xspec.<op>` whose last argument names the backend:

    "torch"   the reference in plain torch, on any device
    "triton"  the Triton kernel: CUDA tensors, or any under TRITON_INTERPRET=1
    "cuda"    the CUDA C++ kernel of the native module: CUDA tensors
    "auto"    XSPEC_BACKEND where set; otherwise on the CPU the native module's C++ version if
              it is built, else torch; on CUDA Triton if it is installed, else torch

A named backend that cannot run raises RuntimeError saying what is missing; nothing falls back.
`auto` takes no CUDA C++ kernel, as no architecture has a recorded passing device check.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from xspec_kernels import _native, _triton

BACKENDS = ("auto", "torch", "triton", "cuda")
MAX_NODES = 64

_LIBRARY = torch.library.Library("xspec", "DEF")
_IMPLEMENTATIONS: dict[str, Mapping[str, Callable[..., Any]]] = {}


def register(
    name: str,
    schema: str,
    *,
    check: Callable[..., torch.device],
    fake: Callable[..., Any],
    **implementations: Callable[..., Any],
) -> Callable[..., Any]:
    """Define `torch.ops.xspec.<name>` and return its overload.

    Args:
        schema: argument and result types; the last argument must be `str backend`.
        check: takes the other arguments, raises ValueError, returns the device.
        fake: takes the same, returns empty results of the right shape.
        implementations: `torch`, and any of `cpp` (CPU), `triton`, `cuda`, taking the same.
    """
    _IMPLEMENTATIONS[name] = implementations
    _LIBRARY.define(name + schema)

    def run(*args: Any) -> Any:
        device = check(*args[:-1])
        return implementations[choose(name, args[-1], device.type)](*args[:-1])

    def run_fake(*args: Any) -> Any:
        check(*args[:-1])
        return fake(*args[:-1])

    _LIBRARY.impl(name, run, "CPU")
    _LIBRARY.impl(name, run, "CUDA")
    torch.library.register_fake(f"xspec::{name}", run_fake, lib=_LIBRARY)
    return getattr(torch.ops.xspec, name).default


def choose(name: str, backend: str, device_type: str) -> str:
    """The implementation that runs: "torch", "cpp", "triton" or "cuda".

    Raises:
        ValueError: the backend's name is unknown.
        RuntimeError: the named backend cannot run here.
    """
    if backend == "auto":
        backend = os.environ.get("XSPEC_BACKEND") or "auto"
    available = _IMPLEMENTATIONS[name]
    if backend == "auto":
        return _automatic(available, device_type)
    if backend not in BACKENDS:
        raise ValueError(f"{name}: backend {backend!r}, expected one of {', '.join(BACKENDS)}")
    if backend not in available:
        raise RuntimeError(f"{name}: there is no {backend} kernel for this op")
    reason = None
    if backend == "triton":
        reason = _triton.unusable(device_type)
    elif backend == "cuda":
        reason = _native.cuda_unusable(device_type)
    if reason:
        raise RuntimeError(f"{name}: backend {backend!r} cannot run: {reason}")
    return backend


def require_backend(backend: str, device_type: str, ops: Iterable[str] | None = None) -> None:
    """Raise as `choose` does unless `backend` can run `ops` (default: all) on `device_type`."""
    for name in sorted(_IMPLEMENTATIONS) if ops is None else ops:
        choose(name, backend, device_type)


def _automatic(available: Mapping[str, Any], device_type: str) -> str:
    if device_type == "cpu":
        return "cpp" if "cpp" in available and _native.cpu_unusable() is None else "torch"
    return "triton" if "triton" in available and _triton.MISSING is None else "torch"


def exact() -> bool:
    """Whether XSPEC_EXACT=1 asks the torch implementations for bits that do not depend on M.

    In exact mode a row's result is a function of that row and the weights: not of how many rows
    there are, of their order or of their siblings. Slower; Triton kernels are so in every mode.

    Raises:
        ValueError: XSPEC_EXACT is set to something other than 0 or 1.
    """
    value = os.environ.get("XSPEC_EXACT") or "0"
    if value not in ("0", "1"):
        raise ValueError(f"XSPEC_EXACT is {value!r}, expected 0 or 1")
    return value == "1"


def check_tensor(
    op: str,
    name: str,
    tensor: torch.Tensor,
    shape: torch.Size | tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
) -> None:
    """Raise ValueError unless `tensor` is contiguous and of this shape, device and one dtype."""
    if tensor.shape != shape:
        raise ValueError(f"{op}: {name} has shape {list(tensor.shape)}, expected {list(shape)}")
    if tensor.dtype not in dtypes:
        expected = " or ".join(str(dtype) for dtype in dtypes)
        raise ValueError(f"{op}: {name} is {tensor.dtype}, expected {expected}")
    if tensor.device != device:
        raise ValueError(f"{op}: {name} is on {tensor.device}, expected {device}")
    if not tensor.is_contiguous():
        raise ValueError(f"{op}: {name} must be contiguous, got strides {tensor.stride()}")


def check_nodes(op: str, name: str, tensor: torch.Tensor) -> None:
    """Raise ValueError unless `tensor` is [B, N] with B >= 1 and 1 <= N <= 64."""
    shape = tensor.shape
    if len(shape) != 2 or shape[0] < 1 or not 1 <= shape[1] <= MAX_NODES:
        raise ValueError(
            f"{op}: {name} has shape {list(shape)}, expected [B, N] with B >= 1, N 1..{MAX_NODES}"
        )


def info() -> dict[str, Any]:
    """What is installed, and which implementation `auto` takes for each op and device.

    Keys: `torch`, `triton`, `native` (a version or description, or why it is missing),
    `interpreted`, `backend` (XSPEC_BACKEND or "auto") and `auto` ({op: {"cpu", "cuda"}}).
    Names only: XSPEC_BACKEND is reported, not resolved, and no device is touched.
    """
    native = _native.MISSING
    if _native.module is not None:
        archs = _native.module.cuda_archs
        native = f"CPU and CUDA {archs}" if _native.module.built_with_cuda else "CPU"
    return {
        "torch": torch.__version__,
        "triton": _triton.MISSING or _triton.triton.__version__,
        "native": native,
        "interpreted": _triton.INTERPRETED,
        "backend": os.environ.get("XSPEC_BACKEND") or "auto",
        "auto": {
            name: {device: _automatic(available, device) for device in ("cpu", "cuda")}
            for name, available in sorted(_IMPLEMENTATIONS.items())
        },
    }
