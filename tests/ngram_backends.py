"""The two ways to count a memory's n-grams, for tests that run with both."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest

from xspec_kernels import ngram
from xspec_runtime.drafters.memory import NgramMemory

BACKENDS = ("python", "native")


def memory_maker(backend: str) -> Callable[..., NgramMemory]:
    """NgramMemory of that backend; skips where the native module is missing."""
    if backend == "native" and ngram.unusable():
        pytest.skip(ngram.unusable())
    return partial(NgramMemory, backend=backend)
