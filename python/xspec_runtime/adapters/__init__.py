"""Adapters: small networks that turn what the draft said into tokens the target may say.

One file a network, each with its configuration; `alignment` says which position predicts which,
`checkpoint` reads and writes them. `training`, `scoring` and `analysis` are about all of them,
`mini` about the embedded pair's.
"""

from __future__ import annotations

from .base import Adapter, Proposer
from .checkpoint import load_adapter, save_adapter
from .prefix_adapter import PrefixAdapter, PrefixAdapterConfig
from .token_adapter import TokenAdapter, TokenAdapterConfig

__all__ = [
    "Adapter",
    "PrefixAdapter",
    "PrefixAdapterConfig",
    "Proposer",
    "TokenAdapter",
    "TokenAdapterConfig",
    "load_adapter",
    "save_adapter",
]
