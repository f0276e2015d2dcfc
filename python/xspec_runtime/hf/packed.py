"""A model's linear layers on packed weights for as long as calls run; the model stays what it is.

See `xspec_runtime.packing` for what packing is worth. There it takes the layers over; here the
model belongs to somebody else, who may train it, save it, or move it between two calls.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
from torch import nn

from ..packing import PackedLinear, can_pack

# Part of the free memory that a copy of the weights may take without being asked for.
SHARE = 0.25
# Elements of a weight below which a call of the packed product costs more than it saves.
_SMALL = 1 << 17
_LOOKED_AT = 16  # elements of a weight that tell whether it has changed


class _Twin(NamedTuple):
    """A layer, its packed twin, and what the weight was when it was packed."""

    linear: nn.Linear
    packed: PackedLinear
    address: int
    version: int
    sample: torch.Tensor

    @classmethod
    def of(cls, linear: nn.Linear) -> _Twin:
        weight = linear.weight.detach()
        return cls(
            linear,
            PackedLinear(linear),
            weight.data_ptr(),
            weight._version,
            _sample(weight).clone(),
        )

    def current(self) -> bool:
        """Whether the packed weight is still the layer's."""
        weight = self.linear.weight.detach()
        same = (weight.data_ptr(), weight._version) == (self.address, self.version)
        # Writes through `.data` leave the version alone.
        return same and torch.equal(_sample(weight), self.sample)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The packed layer; what wants a gradient gets the layer's own product."""
        if torch.is_grad_enabled():
            return nn.functional.linear(x, self.linear.weight, self.linear.bias)
        return self.packed(x)


class PackedWeights:
    """The packed twins of a model's float32 CPU linear layers; empty where torch cannot pack.

    Layers with hooks or a `forward` of their own are left alone.
    """

    def __init__(self, model: nn.Module) -> None:
        self._twins: list[_Twin] = []
        self.refresh(model)

    def __len__(self) -> int:
        return len(self._twins)

    def refresh(self, model: nn.Module) -> None:
        """Pack what is new, or has changed since; not while installed."""
        known = {id(twin.linear): twin for twin in self._twins}
        twins = []
        for linear in packable(model):
            twin = known.get(id(linear))
            twins.append(twin if twin and twin.current() else _Twin.of(linear))
        self._twins = twins

    def install(self) -> None:
        """Let the layers compute by their twins."""
        for twin in self._twins:
            twin.linear.forward = twin.forward

    def remove(self) -> None:
        """Let them compute by themselves again."""
        for twin in self._twins:
            vars(twin.linear).pop("forward", None)


def packable(model: nn.Module) -> list[nn.Linear]:
    """Layers that can have a packed twin and gain by it."""
    if not can_pack():
        return []
    return [
        layer
        for layer in model.modules()
        if type(layer) is nn.Linear
        and layer.weight.dtype == torch.float32
        and layer.weight.device.type == "cpu"
        and layer.weight.numel() >= _SMALL
        and not (layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer))
    ]


def affordable(model: nn.Module) -> bool:
    """Whether a packed copy of the weights takes at most `SHARE` of the free memory."""
    wanted = sum(layer.weight.nbytes for layer in packable(model))
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return False
    return 0 < wanted <= SHARE * free


def _sample(weight: torch.Tensor) -> torch.Tensor:
    flat = weight.reshape(-1)
    return flat[:: max(1, flat.numel() // _LOOKED_AT)]
