"""What is public, in the order of docs/api.md: modules and the names of their `__all__`."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

GROUPS = (
    ("The ops", "xspec_kernels"),
    ("NF4 weights", "xspec_kernels.nf4"),
    ("Ranges for profilers", "xspec_kernels.ranges"),
    ("Decoders, targets and drafters", "xspec_runtime"),
    ("Inside transformers' `generate`", "xspec_runtime.hf"),
    ("What a verify costs here", "xspec_runtime.calibration"),
    ("Models in NF4", "xspec_runtime.nf4_model"),
    ("Adapters", "xspec_runtime.adapters"),
    ("Metrics", "xspec_runtime.metrics"),
    ("Vocabularies", "xspec_runtime.vocab"),
    ("Event streams", "xspec_runtime.data.events"),
    ("Images", "xspec_runtime.data.images"),
    ("Videos", "xspec_runtime.data.video"),
    ("Datasets", "xspec_runtime.data.dsec"),
    ("Recorded answers", "xspec_runtime.data.pairs"),
    ("Profiles", "xspec_runtime.profiling.events"),
)
PACKAGES = ("xspec_kernels", "xspec_runtime")


@dataclass(frozen=True, slots=True)
class Entry:
    """One public name: where it is imported from, and what it is."""

    module: str
    name: str
    value: object

    @property
    def is_code(self) -> bool:
        """Whether it is a function or a class, and not a constant."""
        return inspect.isclass(self.value) or inspect.isroutine(self.value)


def entries(module: str) -> list[Entry]:
    """The public names of a module, without the modules among them.

    Raises:
        ValueError: it has no `__all__`, or that names what is not there.
    """
    found = importlib.import_module(module)
    names = getattr(found, "__all__", None)
    if names is None:
        raise ValueError(f"{module} must say in __all__ what is public")
    missing = [name for name in names if not hasattr(found, name)]
    if missing:
        raise ValueError(f"{module}.__all__ names what is not there: {', '.join(missing)}")
    values = [Entry(module, name, getattr(found, name)) for name in names]
    return [entry for entry in values if not isinstance(entry.value, ModuleType)]


def members(owner: type) -> Iterator[tuple[str, object]]:
    """Public methods and properties of a class, those of this project's base classes included."""
    seen = set()
    for base in owner.__mro__:
        if base.__module__.partition(".")[0] not in PACKAGES:
            continue
        for name, value in vars(base).items():
            if name.startswith("_") or name in seen:
                continue
            seen.add(name)
            if isinstance(value, classmethod | staticmethod):
                yield name, value.__func__
            elif isinstance(value, property) or inspect.isfunction(value):
                yield name, value
