"""The NF4 format of bitsandbytes: 4-bit weights in blocks of 64, each block with its own scale.

A weight matrix [N, K], K a multiple of 64, is stored by rows, two weights a byte: the one at the
even column in the upper four bits. The four bits choose one of 16 values between -1 and 1; a weight
is that value times the largest magnitude of its block, in float32, rounded once. The scales are
float32, or themselves quantized ("double quantization"): 8 bits each, which choose one of 256
values, times the largest magnitude of 256 consecutive scales, plus an offset.

4.5 bits a weight with plain scales, 4.13 with quantized ones. Nothing here imports bitsandbytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import torch

from xspec_kernels.nf4_formats import (
    BLOCK,
    CODE,
    DTYPES,
    GROUP,
    STATE,
    Saved,
    read_state,
    read_tensors,
)

__all__ = [
    "NF4Weight",
    "Nested",
    "absmax",
    "cat",
    "codebook",
    "dequantize",
    "dequantize_rows",
    "from_bitsandbytes",
    "from_tensors",
    "interleave",
    "is_packed",
    "pieces",
    "quantize",
]

# Weights that are dequantized at a time: what then lies in memory stays near the caches.
_PIECE = 1 << 20


class Nested(NamedTuple):
    """How 8-bit scales are read: code[q] * levels[0, group] + levels[1, group], each step rounded.

    Attributes:
        code: [256] float32.
        levels: [2, G] float32, largest magnitude and offset of every group of 256 scales.
        parts: 1, or 2 where the rows of two matrices alternate. Row n is row n // parts of matrix
            n % parts; the groups of the first matrix come before those of the second.
    """

    code: torch.Tensor
    levels: torch.Tensor
    parts: int = 1


@dataclass(frozen=True, slots=True)
class NF4Weight:
    """A matrix [N, K] in NF4.

    Attributes:
        packed: [N, K/2] uint8.
        scales: [N, K/64] float32, or uint8 with `nested`.
        dtype: of the weights before they were quantized; what `dequantize` gives by default.
        nested: see `Nested`.
        dense: the weights once more, dequantized (see `with_dense`); only the torch backend
            looks at them.
    """

    packed: torch.Tensor
    scales: torch.Tensor
    dtype: torch.dtype
    nested: Nested | None = None
    dense: torch.Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """[N, K]"""
        return torch.Size((self.packed.shape[0], 2 * self.packed.shape[1]))

    @property
    def device(self) -> torch.device:
        """Where the packed weights lie."""
        return self.packed.device

    @property
    def nbytes(self) -> int:
        """Bytes of the format; `dense` comes on top."""
        nested = (self.nested.code, self.nested.levels) if self.nested else ()
        return sum(tensor.nbytes for tensor in (self.packed, self.scales, *nested))

    def to(self, device: torch.device | str) -> NF4Weight:
        """The same weight on another device, without `dense`."""
        nested = self.nested
        if nested:
            nested = Nested(nested.code.to(device), nested.levels.to(device), nested.parts)
        return NF4Weight(self.packed.to(device), self.scales.to(device), self.dtype, nested)

    def with_dense(self, dtype: torch.dtype | None = None) -> NF4Weight:
        """With the dequantized weights beside it: 2 or 4 bytes a weight buy a CPU the time of
        dequantizing at every product. Results keep their bits.
        """
        return replace(self, dense=dequantize(self, dtype))


def quantize(weight: torch.Tensor, *, double: bool = True) -> NF4Weight:
    """A float weight [N, K] in NF4, as bitsandbytes' reference quantizes it.

    Args:
        double: quantize the scales too.

    Raises:
        ValueError: the weight is no [N, K] of a 16- or 32-bit float with K a multiple of 64.
    """
    if weight.dim() != 2 or 0 in weight.shape or weight.shape[1] % BLOCK:
        raise ValueError(
            f"nf4: weight has shape {list(weight.shape)}, expected [N, K], K a multiple of {BLOCK}"
        )
    if weight.dtype not in DTYPES:
        raise ValueError(f"nf4: weight is {weight.dtype}, expected one of {DTYPES}")
    blocks = weight.detach().contiguous().float().unflatten(1, (-1, BLOCK))
    scales = blocks.abs().amax(2)
    scaled = blocks * (1.0 / scales.clamp(min=1e-38)).unsqueeze(2)
    code = codebook(weight.device)
    index = torch.bucketize(scaled.clamp_(-1, 1), (code[:-1] + code[1:]) / 2, out_int32=True)
    index = index.to(torch.uint8).flatten(1)
    packed = index[:, 0::2] << 4 | index[:, 1::2]
    if not double:
        return NF4Weight(packed, scales, weight.dtype)
    quantized, nested = _quantize_scales(scales)
    return NF4Weight(packed, quantized, weight.dtype, nested)


def dequantize(w: NF4Weight, dtype: torch.dtype | None = None) -> torch.Tensor:
    """[N, K] in `dtype`, by default that of the weight before it was quantized.

    float32 products rounded once: the bits of bitsandbytes' `dequantize_4bit`.
    """
    scales, dtype = absmax(w), dtype or w.dtype
    out = torch.empty(w.shape, dtype=dtype, device=w.device)
    for rows in pieces(w):
        dequantize_rows(w.packed[rows], scales[rows], dtype, out[rows])
    return out


def dequantize_rows(
    packed: torch.Tensor,
    scales: torch.Tensor,
    dtype: torch.dtype,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Some rows of a weight: packed [R, K/2] and float32 scales [R, K/64] -> [R, K].

    Args:
        out: contiguous [R, K] of `dtype` to write to.
    """
    # Two float32 move as one 8-byte word: half as many look-ups.
    index, pairs = packed.reshape(-1).int(), _pairs(packed.device)
    direct = out is not None and dtype == torch.float32
    values = out.view(torch.float64).view(-1) if direct else pairs.new_empty(index.shape)
    torch.index_select(pairs, 0, index, out=values)
    values = values.view(torch.float32).view(*scales.shape, BLOCK).mul_(scales.unsqueeze(2))
    if out is None:
        return values.to(dtype).flatten(1)
    return out if direct else out.copy_(values.flatten(1))


def absmax(w: NF4Weight) -> torch.Tensor:
    """The scales of all blocks, float32 [N, K/64]."""
    if w.nested is None:
        return w.scales
    code, levels, parts = w.nested
    rows, blocks = w.scales.shape
    row = torch.arange(rows, device=w.device)
    first = row % parts * (levels.shape[1] // parts)
    place = (row // parts * blocks).unsqueeze(1) + torch.arange(blocks, device=w.device)
    group = place // GROUP + first.unsqueeze(1)
    return code[w.scales.int()] * levels[0][group] + levels[1][group]


def pieces(w: NF4Weight) -> list[slice]:
    """Row ranges of about a million weights each, even numbers of rows."""
    step = max(2, _PIECE // w.shape[1] & -2)
    return [slice(lo, lo + step) for lo in range(0, w.shape[0], step)]


def cat(weights: Sequence[NF4Weight]) -> NF4Weight:
    """Matrices of one K on top of each other, e.g. q, k and v; no weight changes.

    Quantized scales stay so where every matrix but the last ends at the end of a group of 256
    scales (and all read them by one code); elsewhere the result has float32 scales.

    Raises:
        ValueError: they differ in K or dtype.
    """
    _check_alike("cat", weights)
    packed = torch.cat([w.packed for w in weights])
    nested = _common_code(weights)
    if nested is None or any(w.scales.numel() % GROUP for w in weights[:-1]):
        return NF4Weight(packed, torch.cat([absmax(w) for w in weights]), weights[0].dtype)
    levels = torch.cat([w.nested.levels for w in weights], 1)
    scales = torch.cat([w.scales for w in weights])
    return NF4Weight(packed, scales, weights[0].dtype, Nested(nested.code, levels))


def interleave(gate: NF4Weight, up: NF4Weight) -> NF4Weight:
    """Rows gate 0, up 0, gate 1, ... as `nf4_linear(..., gate=True)` wants them; no weight changes.

    Raises:
        ValueError: the two differ in shape or dtype.
    """
    _check_alike("interleave", (gate, up))
    if gate.shape != up.shape:
        raise ValueError(f"nf4: shapes {list(gate.shape)} and {list(up.shape)} cannot alternate")

    def mixed(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        return torch.stack([first, second], 1).flatten(0, 1)

    packed, nested = mixed(gate.packed, up.packed), _common_code((gate, up))
    if nested is None:
        return NF4Weight(packed, mixed(absmax(gate), absmax(up)), gate.dtype)
    levels = torch.cat([gate.nested.levels, up.nested.levels], 1)
    nested = Nested(nested.code, levels, parts=2)
    return NF4Weight(packed, mixed(gate.scales, up.scales), gate.dtype, nested)


def from_bitsandbytes(weight: torch.Tensor, quant_state: Any, name: str = "weight") -> NF4Weight:
    """A `Params4bit` and its `QuantState`; memory is shared where the layouts agree.

    Args:
        name: of the weight, for messages.

    Raises:
        ValueError: it is not NF4 in blocks of 64 of a matrix [N, K] with K a multiple of 64, its
            parts do not fit together, or bitsandbytes has repacked it for its CPU kernel.
    """
    return _held(read_state(weight, quant_state, name))


def from_tensors(tensors: Mapping[str, torch.Tensor], name: str) -> NF4Weight:
    """A weight as bitsandbytes saves it: `<name>` and what lies under `<name>.`.

    Args:
        tensors: a state dict, or the tensors of a safetensors file.
        name: e.g. "model.layers.0.self_attn.q_proj.weight".

    Raises:
        ValueError: a tensor is missing, the quantization state cannot be read, or as
            `from_bitsandbytes`.
    """
    return _held(read_tensors(tensors, name))


def is_packed(tensors: Mapping[str, torch.Tensor], name: str) -> bool:
    """Whether bitsandbytes wrote the weight `name` in 4 bits, though parts of it may be missing."""
    return any(f"{name}.{part}" in tensors for part in ("absmax", STATE))


def _held(saved: Saved) -> NF4Weight:
    nested = Nested(saved.code, saved.levels) if saved.levels is not None else None
    return NF4Weight(saved.packed, saved.scales, saved.dtype, nested)


@cache
def codebook(device: torch.device) -> torch.Tensor:
    """The 16 values, float32 [16]."""
    return torch.tensor(CODE, device=device)


@cache
def _pairs(device: torch.device) -> torch.Tensor:
    """The two values of every byte as one 8-byte word, [256]."""
    byte = torch.arange(256, device=device)
    code = codebook(device)
    return torch.stack([code[byte >> 4], code[byte & 15]], 1).view(torch.float64).view(-1)


@cache
def _scale_code(device: torch.device) -> torch.Tensor:
    """The 256 values of quantized scales, ascending: Dettmers' dynamic 8-bit type (2021).

    A sign, e zeros, a one and 6 - e bits of fraction: decades from 1e-6 to 1, the larger the finer.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        steps = torch.linspace(0.1, 1, 2**decade + 1)
        middles = 10 ** (decade - 6) * ((steps[:-1] + steps[1:]) / 2)
        values += [*middles.tolist(), *(-middles).tolist()]
    return torch.tensor(sorted(values), device=device)


def _quantize_scales(scales: torch.Tensor) -> tuple[torch.Tensor, Nested]:
    """float32 [N, K/64] -> uint8 of that shape, and how to read them."""
    offset = scales.mean()
    code, count = _scale_code(scales.device), scales.numel()
    groups = -(-count // GROUP)
    padded = torch.zeros(groups * GROUP, device=scales.device)
    padded[:count] = (scales - offset).flatten()
    padded = padded.view(groups, GROUP)
    largest = padded.abs().amax(1)
    scaled = (padded * (1.0 / largest.clamp(min=1e-38)).unsqueeze(1)).clamp_(-1, 1)
    index = torch.bucketize(scaled, (code[:-1] + code[1:]) / 2, out_int32=True).to(torch.uint8)
    levels = torch.stack([largest, offset.expand(groups)])
    return index.flatten()[:count].view_as(scales), Nested(code, levels)


def _common_code(weights: Sequence[NF4Weight]) -> Nested | None:
    """How all of them read their scales; None where they do not do it alike."""
    first = weights[0].nested
    for w in weights:
        if w.nested is None or w.nested.parts != 1 or not torch.equal(w.nested.code, first.code):
            return None
    return first


def _check_alike(what: str, weights: Sequence[NF4Weight]) -> None:
    if not weights:
        raise ValueError(f"nf4: {what} of no weights")
    kinds = {(w.shape[1], w.dtype) for w in weights}
    if len(kinds) > 1:
        raise ValueError(
            f"nf4: {what} of weights with different (K, dtype): {sorted(kinds, key=str)}"
        )
