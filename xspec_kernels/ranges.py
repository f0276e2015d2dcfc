"""NVTX ranges in the domain `xspec`, for Nsight Systems or any other NVTX tool.

    with range_("verify", rows):
        ...

Names come from `NAMES`, so that a timeline holds no stray ones. NVTX takes a payload when a range
opens: `verify` carries the rows that go in, and what comes out is the payload of ranges within it:
`verify.commit` has the accepted draft tokens, and the empty `verify.overhead` and `verify.saved`
have microseconds, where the cost of a plain step is known by then.

Ranges go through the `nvtx` package or, without it, the native module; if neither is there, or no
tool was attached when this module was imported, they do nothing. They nest per thread. `listening`
has them go elsewhere too: into a list (`Events`), or into a torch.profiler trace (`TorchProfiler`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache
from threading import get_ident, local
from time import perf_counter_ns
from typing import Any, NamedTuple, NoReturn, Protocol

import torch

from xspec_kernels import _native

__all__ = [
    "DOMAIN",
    "NAMES",
    "Event",
    "Events",
    "Tool",
    "TorchProfiler",
    "attached",
    "listening",
    "mark",
    "pop",
    "push",
    "range_",
]

try:
    from nvtx import get_domain as _get_domain
except ImportError:
    # Also where `nvtx` is no package but some folder of that name on the module path.
    _get_domain = None

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
    "verify.layers": "rows of the launch; profile mode only",
    "verify.head": "rows of the launch; profile mode only",
    "verify.tail": "rows of the launch; profile mode only",
    "verify.accept": "rows, root included",
    "verify.commit": "accept_len",
    "verify.overhead": "microseconds of the verify beyond a plain step; empty",
    "verify.saved": "microseconds of the plain steps that accept_len stands for; empty",
    "readback": "values copied to the host",
}
"""Every range and what its payload means."""

_COLORS = {
    "draft": 0xFF76B900,
    "target": 0xFF1F77B4,
    "verify": 0xFFFF7F0E,
    "readback": 0xFFD62728,
}


class Tool(Protocol):
    """Where ranges go. A tool may see a `pop` whose `push` came before it listened."""

    def push(self, name: str, payload: int | None) -> None:
        """A range begins, inside those that are open; `name` is one of `NAMES`."""

    def pop(self) -> None:
        """The range that began last ends."""


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


class Event(NamedTuple):
    """One range: nanoseconds of `time.perf_counter_ns`, and the thread that opened it."""

    name: str
    start_ns: int
    end_ns: int
    payload: int | None
    thread: int


class Events:
    """A tool that keeps every range of this process in `found`, in the order they closed."""

    def __init__(self) -> None:
        self.found: list[Event] = []
        self._here = local()

    def push(self, name: str, payload: int | None) -> None:
        """The range's clock starts after everything else here."""
        if not hasattr(self._here, "stack"):
            self._here.stack = []
        self._here.stack.append((name, payload, perf_counter_ns()))

    def pop(self) -> None:
        """The innermost range of this thread is complete."""
        end = perf_counter_ns()
        if stack := getattr(self._here, "stack", None):
            name, payload, start = stack.pop()
            self.found.append(Event(name, start, end, payload, get_ident()))


class TorchProfiler:
    """A tool that shows ranges to torch.profiler as `xspec:verify#6`, the payload last: a trace
    keeps no other argument of an annotation.
    """

    def __init__(self) -> None:
        self._here = local()

    def push(self, name: str, payload: int | None) -> None:
        """An annotation opens."""
        if not hasattr(self._here, "stack"):
            self._here.stack = []
        label = f"{DOMAIN}:{name}" + ("" if payload is None else f"#{payload}")
        opened = torch.profiler.record_function(label)
        opened.__enter__()
        self._here.stack.append(opened)

    def pop(self) -> None:
        """The innermost one of this thread closes."""
        if stack := getattr(self._here, "stack", None):
            stack.pop().__exit__(None, None, None)


class _Several:
    """Tools that hear the same ranges; those that close last opened first."""

    def __init__(self, tools: tuple[Tool, ...]) -> None:
        self._tools = tools

    def push(self, name: str, payload: int | None) -> None:
        for tool in self._tools:
            tool.push(name, payload)

    def pop(self) -> None:
        for tool in reversed(self._tools):
            tool.pop()


def _color(name: str) -> int:
    return _COLORS[name.split(".")[0]]


def _attached() -> Tool | None:
    """The tool that listens, or None."""
    if _get_domain is not None:
        domain = _get_domain(DOMAIN)
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


@contextmanager
def listening(*tools: Tool) -> Iterator[None]:
    """While this lasts, `tools` hear the ranges of every thread, and what listens already does
    too. The last one is nearest to what it measures.
    """
    global _TOOL
    before = _TOOL
    _TOOL = _Several((*([before] if before else []), *tools))
    try:
        yield
    finally:
        _TOOL = before


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


def mark(name: str, payload: int) -> None:
    """An empty range, for its payload; see `range_`."""
    push(name, payload)
    pop()


def _reject(name: str) -> NoReturn:
    raise ValueError(f"no range is named {name!r}, expected one of {', '.join(NAMES)}")
