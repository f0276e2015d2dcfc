"""docs/api.md: signatures and docstrings of what is public."""

from __future__ import annotations

import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from typing import ForwardRef

from .public import GROUPS, Entry, entries, members

WIDTH = 96
SECTIONS = ("Args", "Attributes", "Returns", "Raises", "Yields")
HEADER = """# API

What is public: the names in the `__all__` of the modules below; anything else may change. Written
by `python bench/reference.py` from signatures and docstrings. The words are those of the
[README](../README.md#words), the commands have [a page of their own](commands.md).
"""


def api_markdown() -> str:
    """The page."""
    lines = [HEADER]
    for title, module in GROUPS:
        lines.append(f"- [{title}](#{_anchor(title)}): `{module}`")
    shown: set[int] = set()
    for title, module in GROUPS:
        about = f"`{module}`. {_summary(importlib.import_module(module))}"
        lines += ["", f"## {title}", "", *_wrapped(about)]
        # What several modules offer stands under the first.
        found = [e for e in entries(module) if not (e.is_code and id(e.value) in shown)]
        shown |= {id(e.value) for e in found}
        constants = [e for e in found if not e.is_code]
        if constants:
            lines += ["", *(f"- `{e.name} = {_short(e.value)}`" for e in constants)]
        for entry in found:
            if entry.is_code:
                lines += _entry(entry)
    return "\n".join(lines) + "\n"


def untyped(function: object) -> list[str]:
    """Parameters of a function without a type, and `return` where that has none."""
    signature = inspect.signature(function)
    missing = [
        name
        for name, parameter in signature.parameters.items()
        if parameter.annotation is parameter.empty and name not in ("self", "cls")
    ]
    return missing + ["return"] * (signature.return_annotation is signature.empty)


def faults(entry: Entry) -> list[str]:
    """What a public function or class lacks: docstrings, and types."""
    where, value = f"{entry.module}.{entry.name}", entry.value
    found = [] if _own_doc(value) else [f"{where}: no docstring"]
    if not inspect.isclass(value):
        return found + [f"{where}: no type of {name}" for name in untyped(value)]
    for name, member in members(value):
        if not inspect.getdoc(getattr(value, name)):
            found.append(f"{where}.{name}: no docstring")
        function = member.fget if isinstance(member, property) else member
        found += [f"{where}.{name}: no type of {missing}" for missing in untyped(function)]
    return found


def _own_doc(value: object) -> str:
    """A docstring that someone wrote: dataclasses make up one of their own."""
    doc = inspect.getdoc(value) or ""
    return "" if inspect.isclass(value) and doc.startswith(f"{value.__name__}(") else doc


def _entry(entry: Entry) -> list[str]:
    value = entry.value
    lines = ["", f"### {entry.name}", "", "```python", *_signature(entry.name, value), "```", ""]
    lines += list(markdown_of(_own_doc(value)))
    if not inspect.isclass(value):
        return lines
    brief, long = [], []
    for name, member in members(value):
        doc = inspect.getdoc(getattr(value, name)) or ""
        if "\n\n" in doc:
            call = _lines(name, _plain(member, bound=True))
            long += ["", f"#### {entry.name}.{name}", "", "```python", *call, "```", ""]
            long += list(markdown_of(doc))
        else:
            call = "" if isinstance(member, property) else str(_plain(member, bound=True))
            brief += _wrapped(f"- `{name}{call}`: {_escape(' '.join(doc.split()))}")
    return [*lines, *(["", "**Methods:**", *brief] if brief else []), *long]


def _signature(name: str, value: object) -> list[str]:
    if not inspect.isclass(value):
        return _lines(name, _plain(value))
    if getattr(value, "_is_protocol", False):
        return [f"class {name}(Protocol)"]
    return _lines(f"class {name}", _plain(value))


def _lines(start: str, signature: inspect.Signature) -> list[str]:
    """A signature in lines of at most `WIDTH` columns."""
    if len(line := f"{start}{signature}") <= WIDTH:
        return [line]
    ends = f") -> {signature.return_annotation!r}" if _returns(signature) else ")"
    inside = str(signature.replace(return_annotation=inspect.Signature.empty))[1:-1]
    parts = [f"{part}," for part in _split(inside)]
    # Spaces within a parameter are kept together.
    joined = textwrap.wrap(
        " ".join(part.replace(" ", "\0") for part in parts), WIDTH - 4, break_on_hyphens=False
    )
    return [f"{start}(", *(f"    {line}".replace("\0", " ") for line in joined), ends]


def _split(inside: str) -> Iterator[str]:
    """Parameters at the commas that stand in no bracket and no string."""
    depth, part, quote = 0, "", ""
    for letter in inside:
        quote = "" if letter == quote else quote or (letter if letter in "'\"" else "")
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and not depth and not quote:
            yield part.strip()
            part = ""
        else:
            part += letter
    yield part.strip()


class _Text:
    """Shows as it is in a signature."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def _plain(value: object, bound: bool = False) -> inspect.Signature:
    """A signature whose annotations are as written, without quotes; `bound` as a method's."""
    try:
        signature = inspect.signature(value)
    except ValueError:
        return inspect.Signature()

    def text(annotation: object) -> object:
        if annotation is inspect.Parameter.empty:
            return annotation
        if isinstance(annotation, ForwardRef):
            annotation = annotation.__forward_arg__
        named = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
        return _Text(named)

    parameters = [
        p.replace(annotation=text(p.annotation), default=_default(p.default))
        for p in signature.parameters.values()
        if not (bound and p.name in ("self", "cls"))
    ]
    returned = (
        inspect.Signature.empty if inspect.isclass(value) else text(signature.return_annotation)
    )
    return signature.replace(parameters=parameters, return_annotation=returned)


def _default(value: object) -> object:
    if value is inspect.Parameter.empty or isinstance(value, str | int | float | None):
        return value
    shown = repr(value)
    return _Text("..." if " at 0x" in shown or len(shown) > 40 else shown)


def _returns(signature: inspect.Signature) -> bool:
    return signature.return_annotation is not inspect.Signature.empty


def markdown_of(doc: str) -> Iterator[str]:
    """Lines of Markdown for a docstring: its sections as lists, all else as it stands."""
    section = ""
    for line in doc.splitlines():
        if line.rstrip().removesuffix(":") in SECTIONS and line.rstrip().endswith(":"):
            section = line.strip()
            yield f"**{section}**"
        elif section and line.startswith("    ") and not line.startswith("     "):
            name, colon, rest = line.strip().partition(": ")
            named = colon and re.fullmatch(r"[\w*, .]+", name)
            text = f"`{name}`: {_escape(rest)}" if named else _escape(line.strip())
            yield f"- {text}"
        elif line and not line.startswith(" "):
            section = ""
            yield _escape(line)
        else:
            yield _escape(line.rstrip() if not section else f"  {line.strip()}".rstrip())


def _escape(line: str) -> str:
    """Angle brackets outside code, which Markdown takes for tags; double backticks to single."""
    parts = line.replace("``", "`").split("`")
    return "`".join(part if i % 2 else part.replace("<", "&lt;") for i, part in enumerate(parts))


def _wrapped(line: str) -> list[str]:
    return textwrap.wrap(
        line, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )


def _summary(module: object) -> str:
    return _escape(" ".join((module.__doc__ or "").strip().partition("\n\n")[0].split()))


def _short(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."


def _anchor(title: str) -> str:
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
