"""Several devices on one CPU: tensors that remember where they are, and operators that refuse to
mix them.

Inside `VirtualDevices`, ``cpu:1``, ``cpu:2``, ... are devices of their own beside the host: models
move there, `tensor.device` says so, and new tensors lie where they are made. As with GPUs, an
operator takes tensors of one device, and numbers of the host; copies and host indices may cross.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

HOST = torch.device("cpu")
COPIES = {"aten::copy_", "aten::_to_copy"}
# Operators that read or write memory of the host too: indices, and the record of a round.
WITH_HOST = {"aten::index", "aten::index_put_", "xspec::verify_tail"}


class MixedDevices(RuntimeError):
    """An operator was given tensors of two devices."""


class Places:
    """Where storages are; a storage that is not known lies on the host."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[StorageWeakRef, torch.device]] = {}

    def of(self, tensor: torch.Tensor) -> torch.device:
        found = self._known.get(tensor.untyped_storage()._cdata)
        return found[1] if found else HOST

    def put(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if device == HOST:
            self._known.pop(storage._cdata, None)
        else:
            # The reference keeps the address from being used again.
            self._known[storage._cdata] = StorageWeakRef(storage), device
        return tensor


def tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class _Operators(TorchDispatchMode):
    """Every operator: one device in, the same device out."""

    def __init__(self, places: Places) -> None:
        super().__init__()
        self._places = places

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = tensors((args, kwargs))
        held = {self._places.of(t) for t in given if t.dim() or self._places.of(t) != HOST}
        name = func._schema.name
        if name in WITH_HOST:
            held = held - {HOST} or held
        if len(held) > 1 and name not in COPIES:
            raise MixedDevices(f"{name} of tensors on {sorted(map(str, held))}")
        out = func(*args, **(kwargs or {}))
        there = self._places.of(given[0]) if name in COPIES else next(iter(held), HOST)
        old = {t.untyped_storage()._cdata for t in given}
        for tensor in tensors(out):
            if tensor.untyped_storage()._cdata not in old:
                self._places.put(tensor, there)
        return out


class VirtualDevices(TorchFunctionMode):
    """See above; to be entered in every thread that computes."""

    def __init__(self, places: Places | None = None) -> None:
        super().__init__()
        self.places = places or Places()
        self._operators = _Operators(self.places)

    def __enter__(self) -> VirtualDevices:
        self._operators.__enter__()
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._operators.__exit__(*error)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if func == torch.Tensor.device.__get__:
            return self.places.of(args[0])
        if name in ("to", "cpu"):
            return self._to(args, kwargs, name)
        if name == "numpy" and self.places.of(args[0]) != HOST:
            raise MixedDevices("numpy of a tensor that is not on the host")
        if name == "new_tensor":
            return self.places.put(func(*args, **kwargs), self.places.of(args[0]))
        if kwargs.get("device") is None:
            return func(*args, **kwargs)
        device, kwargs["device"] = torch.device(kwargs["device"]), HOST
        return self.places.put(func(*args, **kwargs), device)

    def _to(self, args: tuple, kwargs: dict, name: str) -> torch.Tensor:
        source, device, dtype = args[0], HOST if name == "cpu" else None, kwargs.get("dtype")
        for given in (*args[1:], kwargs.get("device")):
            if isinstance(given, (str, torch.device)):
                device = torch.device(given)
            elif isinstance(given, torch.dtype):
                dtype = given
            elif isinstance(given, torch.Tensor):
                device, dtype = self.places.of(given), given.dtype
        moved = source if dtype is None else source.to(dtype)
        if device is None or device == self.places.of(source):
            return moved
        fresh = moved.untyped_storage()._cdata != source.untyped_storage()._cdata
        return self.places.put(moved if fresh else moved.clone(), device)
