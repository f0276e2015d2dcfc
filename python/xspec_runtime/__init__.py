"""The runtime: targets, drafters, the round between them, and what measures it.

Names load on first use, so that the command line answers before transformers is imported.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .batch import BatchDecoder, BatchPrompt
    from .config import SpecConfig
    from .drafters.adapter import AdapterDrafter
    from .drafters.base import Drafter, DraftTree, Request
    from .drafters.draft_model import ModelDrafter
    from .drafters.merge import MergedDrafter
    from .drafters.ngram import NgramDrafter, NgramMemory
    from .drafters.translated import TranslatedDrafter
    from .engine import Generation, SpeculativeDecoder
    from .policy import PricedDrafter
    from .targets.base import Target
    from .targets.llama import LlamaTarget
    from .targets.transformers import TransformersTarget

_HOME = {
    "BatchDecoder": "batch",
    "BatchPrompt": "batch",
    "SpecConfig": "config",
    "AdapterDrafter": "drafters.adapter",
    "Drafter": "drafters.base",
    "DraftTree": "drafters.base",
    "Request": "drafters.base",
    "ModelDrafter": "drafters.draft_model",
    "MergedDrafter": "drafters.merge",
    "NgramDrafter": "drafters.ngram",
    "NgramMemory": "drafters.ngram",
    "TranslatedDrafter": "drafters.translated",
    "Generation": "engine",
    "SpeculativeDecoder": "engine",
    "PricedDrafter": "policy",
    "Target": "targets.base",
    "LlamaTarget": "targets.llama",
    "TransformersTarget": "targets.transformers",
}

__all__ = [
    "AdapterDrafter",
    "BatchDecoder",
    "BatchPrompt",
    "DraftTree",
    "Drafter",
    "Generation",
    "LlamaTarget",
    "MergedDrafter",
    "ModelDrafter",
    "NgramDrafter",
    "NgramMemory",
    "PricedDrafter",
    "Request",
    "SpecConfig",
    "SpeculativeDecoder",
    "Target",
    "TransformersTarget",
    "TranslatedDrafter",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
