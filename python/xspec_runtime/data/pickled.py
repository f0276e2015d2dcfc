"""Read a pickled dict of integer arrays without running any of its content.

``np.save`` of a dict is a pickle, and an unpickler calls whatever the file names. Here the opcode
list is closed and the three NumPy names a file may mention resolve to inert records; their fields
are checked and only then become arrays.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from collections.abc import Sequence
from itertools import islice

import numpy as np

_INTEGER_SPECS = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8")
# Everything np.save of a dict of arrays emits under protocols 3 and 4, and nothing that builds
# classes or reads extension registries. The count bounds nesting (hashing deep tuples recurses in
# C); one-byte memo indices bound the memo.
_OPCODES = frozenset(
    (
        *("PROTO", "FRAME", "STOP", "MARK", "MEMOIZE", "BINPUT", "BINGET"),
        *("NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1"),
        *("SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "SHORT_BINUNICODE", "BINUNICODE"),
        *("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "APPEND", "APPENDS"),
        *("EMPTY_DICT", "SETITEM", "SETITEMS", "GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD"),
    )
)
_MAX_OPCODES = 1000


class _ForeignError(ValueError):
    """The pickle holds something other than plain arrays."""


class _Sealed:
    """Base of the records: pickle's BUILD may not give them attributes of its choice."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        raise _ForeignError("refused: state for an object that has none")


class _NdarrayName(_Sealed):
    """Stands where the pickle names ``numpy.ndarray``; never an array."""

    __slots__ = ()


class _DtypeRecord(_Sealed):
    """What the pickle says about a dtype: a specification such as ``u2`` and a byte order."""

    __slots__ = ("order", "spec")

    def __init__(self, spec: str, align: bool = False, copy: bool = True) -> None:
        self.spec, self.order = spec, "|"

    def __setstate__(self, state: tuple) -> None:
        self.order = state[1]

    def resolve(self) -> np.dtype:
        if self.order not in ("<", ">", "|", "=") or self.spec not in _INTEGER_SPECS:
            raise ValueError(f"integer arrays expected, got dtype {self.spec!r}")
        return np.dtype(self.order + self.spec)


class _ArrayRecord(_Sealed):
    """What the pickle says about an array: shape, dtype, content (bytes; a list for objects)."""

    __slots__ = ("content", "dtype", "shape")

    def __init__(self, kind: object, shape: object, typecode: object) -> None:
        self.shape, self.dtype, self.content = None, None, None

    def __setstate__(self, state: tuple) -> None:
        _, self.shape, self.dtype, _, self.content = state

    def resolve(self) -> np.ndarray:
        """A read-only 1-D array over the pickle's bytes."""
        shape, raw = self.shape, self.content
        one_dim = isinstance(shape, tuple) and len(shape) == 1 and isinstance(shape[0], int)
        if not one_dim or not isinstance(self.dtype, _DtypeRecord) or not isinstance(raw, bytes):
            raise ValueError("1-D integer arrays expected")
        dtype = self.dtype.resolve()
        if shape[0] * dtype.itemsize != len(raw):
            raise ValueError(
                f"damaged: {shape[0]} values announced, {len(raw) // dtype.itemsize} present"
            )
        return np.frombuffer(raw, dtype=dtype)


_STAND_INS = {
    ("numpy", "dtype"): _DtypeRecord,
    ("numpy", "ndarray"): _NdarrayName,
    ("numpy.core.multiarray", "_reconstruct"): _ArrayRecord,
    ("numpy._core.multiarray", "_reconstruct"): _ArrayRecord,
}


class _RecordUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type:
        if (module, name) not in _STAND_INS:
            raise _ForeignError(
                f"refused: names {module}.{name}; only plain NumPy integer arrays may be inside"
            )
        return _STAND_INS[module, name]


def _check_opcodes(body: bytes) -> None:
    names = [op.name for op, _, _ in islice(pickletools.genops(body), _MAX_OPCODES + 1)]
    foreign = next((name for name in names if name not in _OPCODES), None)
    if foreign:
        raise _ForeignError(f"refused: pickle opcode {foreign} has no place in a dict of arrays")
    if len(names) > _MAX_OPCODES:
        raise _ForeignError(f"refused: more than {_MAX_OPCODES} pickle opcodes for a few arrays")


def read_pickled_arrays(body: bytes, fields: Sequence[str]) -> dict[str, np.ndarray]:
    """Read the pickle of a 0-d object array that holds one dict.

    Args:
        body: the pickle, protocol 3 or 4 (what follows the header of a ``.npy`` file).
        fields: keys to return where present; others are ignored.

    Returns:
        ``{name: 1-D integer array}``, read-only views of ``body``'s content.

    Raises:
        ValueError: truncated, damaged, or holding anything but integer arrays under ``fields``.
    """
    try:
        _check_opcodes(body)
        root = _RecordUnpickler(io.BytesIO(body)).load()
    except _ForeignError:
        raise
    except Exception as error:
        raise ValueError(f"truncated or damaged pickle ({error})") from error
    content = root.content if isinstance(root, _ArrayRecord) else None
    found = content[0] if isinstance(content, list) and len(content) == 1 else None
    if not isinstance(found, dict):
        raise ValueError("expected one dict inside a 0-d array")
    arrays = {}
    for name in fields:
        if name not in found:
            continue
        if not isinstance(found[name], _ArrayRecord):
            raise ValueError(
                f"{name}: 1-D integer array expected, got {type(found[name]).__name__}"
            )
        try:
            arrays[name] = found[name].resolve()
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return arrays
