"""What follows the complete sum of a tile: bias, SiLU-gate, residual, one rounding, squares."""

from __future__ import annotations

import torch

from xspec_kernels._dispatch import check_tensor
from xspec_kernels._triton import jit, tl
from xspec_kernels.kernels._product import narrow
from xspec_kernels.kernels._row_norm import row_squares


def check_epilogue(
    op: str,
    x: torch.Tensor,
    N: int,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    gate: bool,
) -> None:
    """Raise ValueError unless these fit a product of x [M, K] with a weight of N rows."""
    if gate and (N % 2 or residual is not None):
        raise ValueError(
            f"{op}: gate=True needs an even N and no residual, got N {N} and residual "
            f"{None if residual is None else list(residual.shape)}"
        )
    for name, tensor, shape in (("bias", bias, (N,)), ("residual", residual, (x.shape[0], N))):
        if tensor is not None:
            check_tensor(op, name, tensor, shape, (x.dtype,), x.device)


@jit()
def finish(
    total,
    y,
    bias,
    residual,
    squares_out,
    M,
    rows,
    tile,
    block,
    N: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    GATE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    m = block * BM + tl.arange(0, BM)
    n = tile * BN + tl.arange(0, BN)
    if bias is not None:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if GATE:
        gate, up = tl.split(tl.reshape(total, (BM, BN // 2, 2)))
        total = gate / (1.0 + tl.exp(-gate)) * up
        n = tile * (BN // 2) + tl.arange(0, BN // 2)
    WIDTH: tl.constexpr = N // 2 if GATE else N
    at = m.to(tl.int64)[:, None] * WIDTH + n[None, :]
    inside = (m < rows)[:, None] & (n < WIDTH)[None, :]
    if residual is not None:
        total += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    total = narrow(total, y.dtype.element_ty, INTERPRETED)
    tl.store(y + at, total, mask=inside)
    if squares_out is not None:
        tl.store(squares_out + tile * M + m, row_squares(total, inside), mask=m < rows)
