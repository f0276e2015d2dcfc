"""The n-gram memory of the native module; the reference in Python is xspec_runtime's.

`counts` and `request` make the two halves: what past answers taught, shared by many threads, and
one request's text and trees. Both are documented with the Python classes of the same names.
"""

from __future__ import annotations

from typing import Any

from xspec_kernels import _native


def unusable() -> str | None:
    """Why the native memory cannot be used, or None."""
    if _native.module is None:
        return _native.MISSING
    if not hasattr(_native.module, "NgramCounts"):
        return "xspec_kernels._C was built from older sources; build it with `pip install -e .`"
    return None


def counts(*settings: int | float) -> Any:
    """Empty counts: order, max_tokens, recency, share, low_share, discount.

    Raises:
        RuntimeError: the native module is missing.
        ValueError: a setting is out of range.
    """
    return _made("NgramCounts", settings)


def request(*arguments: Any) -> Any:
    """A request on native counts: counts, chain, copy, then what `growth.py` takes trees from.

    Raises:
        RuntimeError: the native module is missing.
    """
    return _made("NgramRequest", arguments)


def _made(name: str, arguments: tuple[Any, ...]) -> Any:
    reason = unusable()
    if reason:
        raise RuntimeError(reason)
    return getattr(_native.module, name)(*arguments)
