"""bitsandbytes' NF4 matrices, as transformers makes them."""

from __future__ import annotations

from types import ModuleType

import torch
from torch.nn import functional as F

from .parts import CheckFailed


class Nf4:
    """A weight [N, K] in NF4: blocks of 64, their scales in blocks of 256 of 8 bits.

    Args:
        library: the module `bitsandbytes`.
        weight: [N, K], float; it is not kept.
    """

    def __init__(self, library: ModuleType, weight: torch.Tensor) -> None:
        self._multiply = library.matmul_4bit
        self.packed, self.state = library.functional.quantize_4bit(
            weight.contiguous(), blocksize=64, quant_type="nf4", compress_statistics=True
        )
        scales = self.state.absmax, self.state.state2.absmax
        self.nbytes = sum(x.numel() * x.element_size() for x in (self.packed, *scales))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._multiply(x, self.packed.t(), quant_state=self.state)

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> None:
        """residual += x W^T."""
        residual.add_(self(x))


def check_nf4(library: ModuleType, device: str, seed: int, width: int) -> None:
    """Raise `CheckFailed` unless a product equals that with the dequantized weight in float64."""
    draw = torch.Generator(device).manual_seed(seed)
    like = {"device": device, "dtype": torch.bfloat16, "generator": draw}
    linear = Nf4(library, torch.randn(width, width, **like))
    weight = library.functional.dequantize_4bit(linear.packed, linear.state)
    for rows in (1, 2, 6, 22, 64):
        x = torch.randn(rows, width, **like)
        want = F.linear(x.double(), weight.double())
        error = ((linear(x).double() - want).norm() / want.norm()).item()
        if not error < 2e-2:
            raise CheckFailed(f"bitsandbytes: relative error {error:.3f} at {rows} rows")
