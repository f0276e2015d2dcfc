"""Verify kernels for speculative decoding: the public operations on one screen.

    tree_mask      parents of a draft tree -> ancestor bits, depth, path slots
    verify_greedy  draft tree and the target's tokens -> longest accepted path, tokens to emit
    kv_commit      accepted rows into place in every KV cache
    info           what is installed and what `backend="auto"` takes
    require_backend  raise now if a backend cannot run on a device

Every op takes `backend="auto" | "torch" | "triton" | "cuda"`; `torch` is the reference.
"""

from __future__ import annotations

try:
    import torch as _torch  # noqa: F401
except ImportError as error:
    raise ImportError(
        "xspec_kernels needs PyTorch and does not install it, so as not to replace a CUDA build; "
        "install torch>=2.11 first, for instance `pip install torch==2.13.0`"
    ) from error

from xspec_kernels._dispatch import BACKENDS, MAX_NODES, info, require_backend
from xspec_kernels.kernels.kv_commit import kv_commit
from xspec_kernels.kernels.tree_mask import TreeMask, tree_mask
from xspec_kernels.kernels.verify_greedy import VerifyResult, verify_greedy

__version__ = "0.1.0"

__all__ = [
    "BACKENDS",
    "MAX_NODES",
    "TreeMask",
    "VerifyResult",
    "info",
    "kv_commit",
    "require_backend",
    "tree_mask",
    "verify_greedy",
]
