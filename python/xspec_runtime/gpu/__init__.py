"""The one command that checks and times everything on a GPU: `python bench/gpu_suite.py`.

A phase is a module with `parts(options) -> list[Part]`, named here; a part is a generator of
results (see `parts.Part`). Whatever a part yields is in the result file at once, so a run that is
killed leaves what it had. On a GPU the parts of a phase run in a process of their own, so that a
kernel that faults or hangs costs its own part and no other.
"""

from __future__ import annotations

# Phase -> module, in the order they run.
PHASES = {
    "check": "xspec_runtime.gpu.check",
    "verify": "xspec_runtime.gpu.verify",
    "kernels": "xspec_runtime.gpu.kernels",
    "baseline": "xspec_runtime.gpu.baseline",
    "nf4": "xspec_runtime.gpu.nf4_bench",
    "prefill": "xspec_runtime.gpu.prefill",
    "e2e": "xspec_runtime.gpu.e2e",
    "overlap": "xspec_runtime.gpu.overlap",
    "full_size": "xspec_runtime.gpu.full_size",
}
