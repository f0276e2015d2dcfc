"""NF4 weights as bitsandbytes holds and saves them: what the format fixes, and its checked readers.

Everything read here comes from outside, so every part is checked against every other before a
weight is made of them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

BLOCK = 64
GROUP = 256
CODE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
STATE = "quant_state.bitsandbytes__nf4"
"""Below a weight's name, the tensor that says how it is quantized; its values are JSON in bytes."""


class Saved(NamedTuple):
    """The parts of a weight [N, K] whose sizes and kinds fit together.

    Attributes:
        packed: [N, K/2] uint8.
        scales: [N, K/64] float32; uint8 where they are quantized too.
        dtype: of the weight before it was quantized.
        code, levels: as of `nf4.Nested`; None where the scales are float32.
    """

    packed: torch.Tensor
    scales: torch.Tensor
    dtype: torch.dtype
    code: torch.Tensor | None
    levels: torch.Tensor | None


def read_state(weight: torch.Tensor, quant_state: Any, name: str) -> Saved:
    """The parts of a `Params4bit` and its `QuantState`; raises as `nf4.from_bitsandbytes`."""
    if quant_state is None:
        raise ValueError(f"nf4: {name} has no quant_state: it has not been quantized yet")
    if getattr(quant_state, "packing_format_for_cpu", False):
        raise ValueError(
            f"nf4: {name} is packed for bitsandbytes' CPU kernel, which rounded its scales; "
            "expected the layout it is saved in: take the weights before the first forward pass"
        )
    second = quant_state.state2 if quant_state.nested else None
    parts = {
        "absmax": quant_state.absmax,
        "quant_map": quant_state.code,
        "quant_type": quant_state.quant_type,
        "blocksize": quant_state.blocksize,
        "dtype": str(quant_state.dtype).removeprefix("torch."),
        "shape": None if quant_state.shape is None else list(quant_state.shape),
    }
    if second is not None:
        parts |= {
            "nested_absmax": second.absmax,
            "nested_quant_map": second.code,
            "nested_blocksize": second.blocksize,
            "nested_offset": float(quant_state.offset),
        }
    return _Parts(name, weight.detach(), parts).checked()


def read_tensors(tensors: Mapping[str, torch.Tensor], name: str) -> Saved:
    """The parts of a weight in a state dict; raises as `nf4.from_tensors`."""
    fields = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
    parts: dict[str, Any] = {
        field: tensors[f"{name}.{field}"] for field in fields if f"{name}.{field}" in tensors
    }
    state = f"{name}.{STATE}"
    if state not in tensors:
        other = f"{name}.quant_state.bitsandbytes__fp4"
        found = "FP4 weights" if other in tensors else "no quant_state"
        raise ValueError(f"nf4: {name} has {found}, expected {state}")
    if name not in tensors:
        raise ValueError(f"nf4: {name} is missing, {state} is there")
    try:
        values = json.loads(bytes(tensors[state].cpu().flatten().tolist()))
    except (ValueError, TypeError, RecursionError):
        raise ValueError(f"nf4: {state} is not JSON: damaged or cut short") from None
    if not isinstance(values, dict):
        raise ValueError(f"nf4: {state} is {values!r:.60}, expected an object")
    return _Parts(name, tensors[name], values | parts).checked()


class _Parts:
    """A weight and its parts by bitsandbytes' names, none of them trusted."""

    def __init__(self, name: str, weight: torch.Tensor, parts: Mapping[str, Any]) -> None:
        self.name, self.weight, self.parts = name, weight, parts

    def checked(self) -> Saved:
        """Raise `ValueError`, naming the first part that does not fit, or return all of them."""
        parts = self.parts
        self._expect(parts.get("quant_type"), "nf4", "quant_type")
        self._expect(parts.get("blocksize"), BLOCK, "blocksize")
        dtypes = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
        if parts.get("dtype") not in dtypes:
            self._expect(parts.get("dtype"), " or ".join(dtypes), "dtype")
        rows, width = self._shape()
        packed = self.weight.contiguous().view(torch.uint8).reshape(-1)
        self._expect(2 * packed.numel(), rows * width, f"shape {[rows, width]} and weights")
        code = self._tensor("quant_map", len(CODE), torch.float32)
        if code.tolist() != list(CODE):
            raise ValueError(f"nf4: {self.name}.quant_map is not the codebook of NF4")
        count = rows * width // BLOCK
        nested = self._nested(count) if "nested_absmax" in parts else (None, None)
        kind = torch.float32 if nested[0] is None else torch.uint8
        scales = self._tensor("absmax", count, kind).view(rows, -1).contiguous()
        return Saved(packed.view(rows, -1), scales, dtypes[parts["dtype"]], *nested)

    def _shape(self) -> tuple[int, int]:
        shape = self.parts.get("shape")
        sizes = isinstance(shape, list) and len(shape) == 2 and all(type(n) is int for n in shape)
        if not sizes or min(shape) < 1 or shape[1] % BLOCK:
            self._expect(shape, f"[N, K] with K a multiple of {BLOCK}", "shape")
        return shape[0], shape[1]

    def _nested(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Code and levels of `count` quantized scales."""
        self._expect(self.parts.get("nested_blocksize"), GROUP, "nested_blocksize")
        offset = self.parts.get("nested_offset")
        if type(offset) is not float or not math.isfinite(offset):
            self._expect(offset, "a finite number", "nested_offset")
        largest = self._tensor("nested_absmax", -(-count // GROUP), torch.float32)
        code = self._tensor("nested_quant_map", 256, torch.float32)
        return code, torch.stack([largest, torch.full_like(largest, offset)])

    def _tensor(self, field: str, count: int, dtype: torch.dtype) -> torch.Tensor:
        value = self.parts.get(field)
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"nf4: {self.name}.{field} is missing")
        self._expect(value.numel(), count, f"{field} of")
        if value.dtype != dtype:
            raise ValueError(f"nf4: {self.name}.{field} is {value.dtype}, expected {dtype}")
        return value.detach().reshape(-1).to(self.weight.device)

    def _expect(self, found: object, wanted: object, what: str) -> None:
        if found != wanted:
            raise ValueError(f"nf4: {self.name} has {what} {found}, expected {wanted}")
