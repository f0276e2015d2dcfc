"""What Triton compiled for the kernels of this process, from its own caches."""

from __future__ import annotations

import hashlib
import sys
from typing import Any


def compiled_kernels() -> list[dict[str, Any]]:
    """Every compiled form of every Triton kernel of xspec_kernels, in a stable order.

    Returns:
        For each: `name`, `registers` a thread, `spills` (registers), `shared` (bytes),
        `num_warps`, `cubin` (first 16 hex digits of its SHA-256). Empty where nothing was compiled.
    """
    found = []
    for name, module in sorted(sys.modules.items()):
        if not name.startswith("xspec_kernels."):
            continue
        for value in vars(module).values():
            # Of a `triton.runtime.JITFunction`: device -> (compiled forms by signature, ...).
            caches = getattr(value, "device_caches", None)
            if caches and getattr(value, "__module__", None) == name:
                found += [
                    _facts(value, form) for cache in caches.values() for form in _forms(cache)
                ]
    return sorted(found, key=lambda fact: (fact["name"], str(fact["cubin"])))


def _forms(cache: Any) -> list[Any]:
    forms = cache[0] if isinstance(cache, tuple) else cache
    return [form.result() if hasattr(form, "result") else form for form in forms.values()]


def _facts(kernel: Any, form: Any) -> dict[str, Any]:
    metadata = form.metadata
    cubin = form.asm.get("cubin")
    return {
        "name": f"{kernel.__module__}.{kernel.__name__}",
        "registers": form.n_regs,
        "spills": form.n_spills,
        "shared": metadata.shared,
        "num_warps": metadata.num_warps,
        "cubin": None if cubin is None else hashlib.sha256(cubin).hexdigest()[:16],
    }
