"""What a CUDA graph does, on the CPU: operators are recorded once and repeated on the same tensors.

As in a capture, recording computes nothing: whatever was written is put back, and results are
poisoned until the first replay. Values that the host computed while recording stay as they were
then. Operators that would wait for a GPU, or read pageable memory of the host, are errors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# In inference mode, in which captured functions run, composite operators come whole.
WAITS = {
    "aten::_local_scalar_dense",
    "aten::_pin_memory",
    "aten::_unique2",
    "aten::allclose",
    "aten::argwhere",
    "aten::bincount",
    "aten::equal",
    "aten::is_nonzero",
    "aten::item",
    "aten::lift_fresh",
    "aten::masked_select",
    "aten::nonzero",
    "aten::nonzero_numpy",
    "aten::pin_memory",
    # Of `tolist` and `numpy`, the only operator that is seen.
    "aten::resolve_neg",
    "aten::unique_dim",
}
# Results whose size is a number on the device.
SIZED_BY_VALUES = {
    torch.ops.aten.repeat_interleave.Tensor,
    torch.ops.aten.repeat_interleave.self_Tensor,
    torch.ops.aten.where.default,
}
# Masks among the indices become places, which have to be counted.
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
# Copies to another device, which on a CPU do nothing.
MOVES = {
    torch.ops.aten.to.device: 1,
    torch.ops.aten.to.dtype_layout: "device",
    torch.ops.aten.to.prim_Device: 1,
}


def tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def check_waits(func: torch._ops.OpOverload, args: tuple, kwargs: dict) -> None:
    """Raise `RuntimeError` where CUDA would refuse an operator while capturing."""
    name = func._schema.name
    indices = args[1] if name in INDEXING else []
    place = MOVES.get(func)
    moved = kwargs.get("device") if place == "device" else place and args[1:2]
    if (
        name in WAITS
        or func in SIZED_BY_VALUES
        or moved
        or any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices)
    ):
        raise RuntimeError(f"{name} waits for the device: operation not permitted")


class Tape(TorchDispatchMode):
    """Records what runs inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []
        self._before: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        check_waits(func, args, kwargs)
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self._before += [(tensor, tensor.clone()) for tensor in tensors(value)]
        out = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, out))
        return out

    def undo(self) -> None:
        """Nothing has happened."""
        for tensor, before in reversed(self._before):
            tensor.copy_(before)
        self._before.clear()
        given: set[int] = set()
        for _, args, kwargs, out in self.calls:
            given |= {t.untyped_storage().data_ptr() for t in tensors((args, kwargs))}
            for tensor in tensors(out):
                if tensor.untyped_storage().data_ptr() not in given:
                    poison(tensor)

    def replay(self) -> None:
        """Run it all again."""
        for func, args, kwargs, out in self.calls:
            for old, new in zip(tensors(out), tensors(func(*args, **kwargs)), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def poison(tensor: torch.Tensor) -> None:
    if tensor.dtype == torch.bool:
        tensor.fill_(True)
    else:
        tensor.fill_(torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).min)


class TapeRecorder:
    """Stands in for `CudaRecorder`."""

    def warm(self, run: Callable[[], Any]) -> Any:
        return run()

    def record(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        tape = Tape()
        with tape:
            result = run()
        tape.undo()
        return tape.replay, result
