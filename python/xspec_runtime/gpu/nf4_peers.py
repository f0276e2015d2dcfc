"""Ways to multiply by a 4-bit matrix, ours and others', for one weight each.

bitsandbytes' ways have our format. torch's int4 and gemlite have another one (evenly spaced values,
a scale and an offset for 64 weights): their times are the speed of light of 4 bits, and their
results are checked against their own weights.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch.nn import functional as F

from xspec_kernels import Workspace, nf4, nf4_linear, nf4_prefill

Multiply = Callable[[torch.Tensor], torch.Tensor]


class Peer(Protocol):
    """One way to compute y = x W^T.

    Attributes:
        name: as rows of results name it.
        nbytes: of the weights as they are stored.
    """

    name: str
    nbytes: int

    def copies(self, count: int) -> list[Multiply]:
        """Products with `count` copies of the weights, each at addresses of its own."""

    def reference(self) -> torch.Tensor:
        """[N, K] float32: the weights that are multiplied."""


class Ours:
    """nf4_linear."""

    name = "nf4_linear"

    def __init__(self, w: nf4.NF4Weight, dtype: torch.dtype, workspace: Workspace) -> None:
        self.w, self.dtype, self.workspace, self.nbytes = w, dtype, workspace, w.nbytes

    def copies(self, count: int) -> list[Multiply]:
        return [self._multiply(_copied(self.w)) for _ in range(count)]

    def _multiply(self, w: nf4.NF4Weight) -> Multiply:
        return lambda x: nf4_linear(x, w, workspace=self.workspace)

    def reference(self) -> torch.Tensor:
        return nf4.dequantize(self.w, self.dtype).float()


class Prefill(Ours):
    """Dequantized into the bounded buffer of a prefill, then the library's product."""

    name = "dequantize + linear"

    def _multiply(self, w: nf4.NF4Weight) -> Multiply:
        backend = "triton" if w.device.type == "cuda" else "torch"
        return lambda x: nf4_prefill.by_parts(x, w, workspace=self.workspace, backend=backend)


class Plain:
    """The weights in 16 bits through the library, for comparison."""

    name = "linear, 16 bits"

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight, self.nbytes = weight, weight.nbytes

    def copies(self, count: int) -> list[Multiply]:
        made = [self.weight.clone() for _ in range(count)]
        return [lambda x, w=w: F.linear(x, w) for w in made]

    def reference(self) -> torch.Tensor:
        return self.weight.float()


class BitsAndBytes:
    """`matmul_4bit`, which chooses between its fused kernel and dequantizing.

    Args:
        fused: the fused kernel, whatever the number of rows; CUDA, from version 0.50 on.
    """

    def __init__(self, weight: torch.Tensor, fused: bool = False) -> None:
        self.library = importlib.import_module("bitsandbytes")
        version = self.library.__version__
        self.name = f"bitsandbytes {version}{' fused' if fused else ''}"
        self._fused = fused_kernel() if fused else None
        self.packed, self.state = self.library.functional.quantize_4bit(
            weight.contiguous(), blocksize=nf4.BLOCK, quant_type="nf4", compress_statistics=True
        )
        self.nbytes = (
            self.packed.nbytes + self.state.absmax.nbytes + self.state.state2.absmax.nbytes
        )

    def copies(self, count: int) -> list[Multiply]:
        made = [(self.packed.clone(), copy.deepcopy(self.state)) for _ in range(count)]
        return [self._multiply(packed, state) for packed, state in made]

    def _multiply(self, packed: torch.Tensor, state: object) -> Multiply:
        if self._fused is None:
            library = self.library
            return lambda x: library.matmul_4bit(x, packed.t(), quant_state=state)
        return lambda x: self._fused(
            x, packed, state.shape, state.state2.absmax, state.blocksize, "nf4", None,
            state.absmax, state.state2.code, state.offset,
        )  # fmt: skip

    def reference(self) -> torch.Tensor:
        return self.library.functional.dequantize_4bit(self.packed, self.state).float()


def fused_kernel() -> Callable[..., torch.Tensor] | None:
    """bitsandbytes' fused 4-bit product without the choice before it, or None."""
    try:
        module = importlib.import_module("bitsandbytes.backends.cuda.ops")
    except (ImportError, AttributeError):
        return None
    return getattr(module, "_gemm_4bit_kernel_impl", None)


class Even:
    """Evenly spaced 4-bit values in groups of 64: codes [N, K], scales and middles [N, K/64]."""

    def __init__(self, weight: torch.Tensor) -> None:
        groups = weight.float().unflatten(1, (-1, nf4.BLOCK))
        low, high = groups.aminmax(dim=2)
        self.scales = ((high - low) / 15).to(weight.dtype)
        self.zeros = ((low + high) / 2).to(weight.dtype)
        steps = (groups - self.zeros.float()[:, :, None]) / self.scales.float()[:, :, None]
        self.codes = (steps + 8).round_().clamp_(0, 15).to(torch.uint8).flatten(1)
        self.nbytes = self.codes.numel() // 2 + self.scales.nbytes + self.zeros.nbytes

    def reference(self) -> torch.Tensor:
        """[N, K] float32."""
        steps = self.codes.float().unflatten(1, (-1, nf4.BLOCK)) - 8
        return (steps * self.scales.float()[:, :, None] + self.zeros.float()[:, :, None]).flatten(1)


class Int4(Even):
    """torch's own `_weight_int4pack_mm`; bfloat16."""

    name = "torch int4"

    def copies(self, count: int) -> list[Multiply]:
        aten, codes = torch.ops.aten, self.codes
        both = torch.stack([self.scales, self.zeros], 2).transpose(0, 1).contiguous()
        if codes.is_cuda:
            packed = aten._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], 8)
            multiply = aten._weight_int4pack_mm
        else:
            packed = aten._convert_weight_to_int4pack_for_cpu(codes.int(), 8)
            multiply = aten._weight_int4pack_mm_for_cpu
        made = [(packed.clone(), both.clone()) for _ in range(count)]
        return [lambda x, w=w, s=s: multiply(x, w, nf4.BLOCK, s) for w, s in made]


class GemLite(Even):
    """gemlite's Triton kernels, where it is installed: (code - zero) * scale."""

    name = "gemlite int4"

    def copies(self, count: int) -> list[Multiply]:
        helper = importlib.import_module("gemlite.helper")
        maker = helper.A16W4_HQQ_INT(device=str(self.codes.device), dtype=self.scales.dtype)
        zeros = 8 - self.zeros.float() / self.scales.float()
        return [maker.from_weights(self.codes, self.scales, zeros) for _ in range(count)]


def peers(
    weight: torch.Tensor, workspace: Workspace, notes: dict[str, None]
) -> Iterator[Callable[[], Peer]]:
    """What makes each peer of a float weight [N, K], ours first; those that are missing are noted.

    bitsandbytes and gemlite are taken where they can be imported.
    """
    packed = nf4.quantize(weight)
    yield lambda: Ours(packed, weight.dtype, workspace)
    yield lambda: Prefill(packed, weight.dtype, workspace)
    yield lambda: Plain(weight)
    if importlib.util.find_spec("bitsandbytes"):
        yield lambda: BitsAndBytes(weight)
        if weight.is_cuda and fused_kernel():
            yield lambda: BitsAndBytes(weight, fused=True)
        else:
            notes["bitsandbytes' fused kernel: needs CUDA and version 0.50"] = None
    else:
        notes["bitsandbytes is neither installed nor carried; `make gpu-bundle` fetches it"] = None
    if weight.dtype == torch.bfloat16:
        yield lambda: Int4(weight)
    if importlib.util.find_spec("gemlite") and weight.is_cuda:
        yield lambda: GemLite(weight)
    else:
        notes["gemlite is not installed, or there is no GPU"] = None


def _copied(w: nf4.NF4Weight) -> nf4.NF4Weight:
    nested = w.nested
    if nested:
        nested = nf4.Nested(nested.code.clone(), nested.levels.clone(), nested.parts)
    return nf4.NF4Weight(w.packed.clone(), w.scales.clone(), w.dtype, nested)
