"""What is installed, what `auto` picks and why, and which caches there are."""

from __future__ import annotations

import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.version import Version
from rich.console import Console
from rich.table import Table

from .tables import print_wide

# name, oldest supported, first unsupported, what it is for
SUPPORTED = (
    ("torch", "2.11", None, "everything"),
    ("triton", "3.6", None, "Triton kernels"),
    ("transformers", "5.17", "6", "targets and drafts"),
    ("numpy", "1.26", None, "files"),
    ("safetensors", "0.4", None, "checkpoints, memories"),
    ("nvtx", "0.2.12", None, "ranges in a profiler"),
    ("av", "12", None, "video files"),
    ("matplotlib", "3.8", None, "plots"),
    ("peft", "0.18", None, "xspec train lora"),
    ("bitsandbytes", "0.50", None, "NF4 checkpoints"),
    ("flash-attn", "2.6", None, "prefill"),
)
OPTIONAL = {"nvtx", "av", "matplotlib", "peft", "bitsandbytes", "flash-attn"}


def doctor(console: Console) -> bool:
    """Print the report; True if everything needed is there in a supported version."""
    healthy = _packages(console)
    healthy &= _backends(console)
    _caches(console)
    return healthy


def _packages(console: Console) -> bool:
    table = Table(
        "package", "found", "supported", "for", title=f"Python {platform.python_version()}"
    )
    healthy = True
    for name, low, high, purpose in SUPPORTED:
        wanted = f">={low}" + (f",<{high}" if high else "")
        try:
            found = version(name)
        except PackageNotFoundError:
            healthy &= name in OPTIONAL
            table.add_row(name, "missing" if name not in OPTIONAL else "-", wanted, purpose)
            continue
        plain = Version(Version(found).public)
        good = plain >= Version(low) and (high is None or plain < Version(high))
        healthy &= good
        table.add_row(name, found if good else f"{found} (not supported)", wanted, purpose)
    print_wide(console, table)
    return healthy


def _backends(console: Console) -> bool:
    import torch

    import xspec_kernels

    info = xspec_kernels.info()
    console.print(f"native module: {info['native']}")
    console.print(f"triton: {info['triton']}{' (interpreted)' if info['interpreted'] else ''}")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    console.print(f"GPU: {gpu}; nvcc: {shutil.which('nvcc') or 'not found'}")
    table = Table("op", "auto on CPU", "auto on CUDA", title="Backends")
    for op, choice in info["auto"].items():
        table.add_row(op, choice["cpu"], choice["cuda"])
    print_wide(console, table)
    console.print(
        "auto takes the C++ version on the CPU where it is built, Triton on CUDA where it is "
        "installed, else torch; no CUDA C++ kernel until its check on a GPU is recorded. "
        f"XSPEC_BACKEND is {os.environ.get('XSPEC_BACKEND') or 'not set'}."
    )
    known = info["backend"] in xspec_kernels.BACKENDS
    if not known:
        console.print(f"XSPEC_BACKEND must be one of {', '.join(xspec_kernels.BACKENDS)}")
    return known


def _caches(console: Console) -> None:
    from .calibration import cache_folder

    _kernels(console)
    kept = cache_folder()
    if kept is None:
        console.print("calibrations: not kept, XSPEC_CACHE is off")
        return
    count = len(list(kept.glob("vm-*.json")))
    console.print(
        f"calibrations (v(M) by machine and model): {count or 'none'} in {kept}"
        f"{f'; clear: rm {kept}/vm-*.json' if count else ''}; XSPEC_CACHE names another folder, or "
        "off"
    )


def _kernels(console: Console) -> None:
    folder = Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")
    if not folder.is_dir():
        console.print(
            f"compiled kernels: none yet; the first use of each on a GPU compiles it into {folder} "
            "(TRITON_CACHE_DIR names another), where later processes find it"
        )
        return
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    console.print(
        f"compiled kernels: {size / 1e6:.1f} MB in {folder}, compiled once and then read by every "
        f"process; TRITON_CACHE_DIR names another folder; clear: rm -r {folder}"
    )
