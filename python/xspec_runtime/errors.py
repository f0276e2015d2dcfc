"""Errors in one line."""

from __future__ import annotations

import errno
import re


def explain(error: Exception, less_memory: str = "") -> str:
    """One line for the person at the keyboard; `less_memory` is what to do where memory ran out."""
    text = " ".join(str(error).split())
    if out_of_memory(error):
        size = re.search(r"allocate ([\d.]+ ?\w+)", text)
        asked = f" ({size[1]} more were asked for)" if size else ""
        return f"out of memory{asked}" + (f"; {less_memory}" if less_memory else "")
    if isinstance(error, (ValueError, RuntimeError, OSError, ImportError)) and text:
        return text
    return f"{type(error).__name__}: {text or 'no message'} (a fault of the program; see --debug)"


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on the host or on a GPU."""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    # Torch raises a plain RuntimeError on the CPU.
    told = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, RuntimeError) and any(t in str(error).lower() for t in told)
