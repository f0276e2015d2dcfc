"""NVTX ranges in the domain `xspec`, for Nsight Systems or any other NVTX tool.

    with range_("verify", rows):
        ...

Names come from `NAMES`, so that a timeline holds no stray ones. NVTX takes a payload when a range
opens: `verify` carries the rows that go in, and the accepted draft tokens that come out are the
payload of the `verify.commit` that follows.

Ranges go through the `nvtx` package or, without it, the native module; if neither is there, or no
tool was attached when this module was imported, they do nothing. They nest per thread.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import lru_cache
from typing import Any, NoReturn, Protocol

from xspec_kernels import _native

try:
    import nvtx as _nvtx
except ImportError:
    _nvtx = None

DOMAIN = "xspec"
NAMES: dict[str, str] = {
    "draft.prefill": "prompt rows",
    "draft.decode": "tokens fed",
    "draft.adapter": "draft tokens mapped",
    "draft.propose": "most rows allowed",
    "target.preprocess": "frames or event images",
    "target.vision": "frames or event images",
    "target.prefill": "prompt rows",
    "target.decode": "rows: 1, a round without drafts",
    "verify": "rows, root included",
    "verify.forward": "rows, root included",
    "verify.accept": "rows, root included",
    "verify.commit": "accept_len",
    "readback": "values copied to the host",
}
"""Every range and what its payload means."""

_COLORS = {
    "draft": 0xFF76B900,
    "target": 0xFF1F77B4,
    "verify": 0xFFFF7F0E,
    "readback": 0xFFD62728,
}


class _Tool(Protocol):
    """Where ranges go."""

    def push(self, name: str, payload: int | None) -> None: ...

    def pop(self) -> None: ...


class _Package:
    """Through the `nvtx` package, with attributes kept per name and payload."""

    def __init__(self, domain: Any) -> None:
        @lru_cache(maxsize=4096)
        def attributes(name: str, payload: int | None) -> Any:
            return domain.get_event_attributes(name, _color(name), payload=payload)

        self._attributes = attributes
        self._push = domain.push_range
        self.pop = domain.pop_range

    def push(self, name: str, payload: int | None) -> None:
        self._push(self._attributes(name, payload))


class _Native:
    """Through the native module."""

    def __init__(self, module: Any) -> None:
        self._push = module.nvtx_push
        self.pop = module.nvtx_pop

    def push(self, name: str, payload: int | None) -> None:
        self._push(name, _color(name), payload)


def _color(name: str) -> int:
    return _COLORS[name.split(".")[0]]


def _attached() -> _Tool | None:
    """The tool that listens, or None."""
    if _nvtx is not None:
        domain = _nvtx.get_domain(DOMAIN)
        idle = type(domain).__name__ == "DummyDomain"
        return _Package(domain) if not idle and hasattr(domain, "get_event_attributes") else None
    if getattr(_native.module, "nvtx_attached", bool)():
        return _Native(_native.module)
    return None


_TOOL = _attached()


class _Idle:
    """A range that nobody records."""

    __slots__ = ()

    def __enter__(self) -> None:
        return None

    def __exit__(self, *raised: object) -> None:
        return None


class _Range:
    """A range that the attached tool records."""

    __slots__ = ("name", "payload")

    def __init__(self, name: str, payload: int | None) -> None:
        self.name = name
        self.payload = payload

    def __enter__(self) -> None:
        push(self.name, self.payload)

    def __exit__(self, *raised: object) -> None:
        pop()


_IDLE = _Idle()


def attached() -> bool:
    """Whether a tool records the ranges of this process."""
    return _TOOL is not None


def range_(name: str, payload: int | None = None) -> AbstractContextManager[None]:
    """A context manager: the range `name` around its block.

    Args:
        name: a key of `NAMES`, which also says what `payload` counts.

    Raises:
        ValueError: `name` is none of `NAMES`, tool or not.
    """
    if name not in NAMES:
        _reject(name)
    return _IDLE if _TOOL is None else _Range(name, payload)


def push(name: str, payload: int | None = None) -> None:
    """Open a range that `pop` closes; for those that are no block, otherwise see `range_`."""
    if name not in NAMES:
        _reject(name)
    if _TOOL is not None:
        _TOOL.push(name, payload)


def pop() -> None:
    """Close the innermost range of this thread."""
    if _TOOL is not None:
        _TOOL.pop()


def _reject(name: str) -> NoReturn:
    raise ValueError(f"no range is named {name!r}, expected one of {', '.join(NAMES)}")
