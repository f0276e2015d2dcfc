"""An RMSNorm inside the product that consumes its rows, rounded where `norm_act` rounds.

The norm of a row needs the sum of its squares, which no tile of the product that makes the row
knows. Each tile therefore leaves the sum over its own columns, taken of the rounded values; the
product that consumes the row adds these up, in an order that is the same for every row and number
of rows, and normalizes each block of x on its way to the matrix units. What `norm_act` does in a
launch needs none.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from xspec_kernels._dispatch import check_tensor
from xspec_kernels._triton import jit, launch, tl, triton
from xspec_kernels.kernels._product import check_alignment
from xspec_kernels.kernels.norm_act import check_eps, rms_norm_ref, rms_scale
from xspec_kernels.tiles import Tile


class RowNorm(NamedTuple):
    """An RMSNorm of a product's x: the product is that of `norm_act(x, weight, eps)`.

    Attributes:
        weight: [K], dtype of x.
        eps: added to the mean of squares.
        squares: [T, M] float32, what the product that made x returned beside it
            (`with_squares=True`): the sums of squares over T parts of each row. Triton's kernel
            takes them as they are; None lets it sum them in a launch of its own. The torch
            implementation reads x alone.
    """

    weight: torch.Tensor
    eps: float
    squares: torch.Tensor | None = None


def unpack(norm: RowNorm | None) -> tuple[torch.Tensor | None, float, torch.Tensor | None]:
    """A norm as the ops' schemas spell it."""
    return (None, 0.0, None) if norm is None else norm


def normed_ref(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """What a product multiplies."""
    return x if weight is None else rms_norm_ref(x, weight, eps)


def check_norm(
    op: str,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    squares: torch.Tensor | None,
    squares_out: torch.Tensor | None,
) -> None:
    """Raise ValueError unless these fit x [M, K]."""
    if weight is not None:
        check_tensor(op, "norm.weight", weight, x.shape[1:], (x.dtype,), x.device)
        check_eps(op, eps)
    elif squares is not None:
        raise ValueError(f"{op}: norm.squares without norm.weight")
    if squares is not None:
        _check_squares(op, "norm.squares", squares, x)
    if squares_out is not None:
        _check_squares(op, "squares_out", squares_out, x)


def _check_squares(op: str, name: str, squares: torch.Tensor, x: torch.Tensor) -> None:
    if squares.dim() != 2 or not squares.shape[0]:
        raise ValueError(
            f"{op}: {name} has shape {list(squares.shape)}, expected [T, {x.shape[0]}] with T >= 1"
        )
    shape = (squares.shape[0], x.shape[0])
    check_tensor(op, name, squares, shape, (torch.float32,), x.device)


def new_squares(x: torch.Tensor, N: int, tile: Tile) -> torch.Tensor:
    """Where the tiles of a product of x with a weight of N rows leave their sums."""
    return x.new_empty((-(-N // tile.block_n), x.shape[0]), dtype=torch.float32)


def check_squares_out(op: str, squares: torch.Tensor | None, N: int, tile: Tile) -> None:
    """Raise ValueError unless each tile has a place."""
    tiles = -(-N // tile.block_n)
    if squares is not None and squares.shape[0] != tiles:
        raise ValueError(f"{op}: squares_out has {squares.shape[0]} parts, expected {tiles}")


@jit()
def _row_squares_kernel(x, squares, D: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    at = x + row.to(tl.int64) * D + column
    values = tl.load(at, mask=column < D, other=0).to(tl.float32)
    tl.store(squares + row, tl.sum(values * values, 0))


def norm_arguments(
    op: str, x: torch.Tensor, weight: torch.Tensor | None, squares: torch.Tensor | None
) -> tuple[torch.Tensor | None, int]:
    """(squares, their number a row) for a kernel, summed here where they are not given."""
    if weight is None:
        return None, 0
    check_alignment(op, "norm.weight", weight)
    if squares is None:
        rows, width = x.shape
        squares = x.new_empty((1, rows), dtype=torch.float32)
        block = 1 << (width - 1).bit_length()
        launch(
            _row_squares_kernel, (rows,), x.device, x, squares, D=width, BLOCK=block,
            num_warps=min(8, max(1, block // 256)), enable_fp_fusion=False,
        )  # fmt: skip
    return squares, squares.shape[0]


@jit()
def row_scale(
    squares,  # [PARTS, M] fp32
    eps,
    M,
    rows,
    block,
    K: tl.constexpr,
    BM: tl.constexpr,
    PARTS: tl.constexpr,
):
    """The factor of each row of a block, [BM] fp32; of rows behind the last one that of zeros."""
    m = block * BM + tl.arange(0, BM)
    WIDTH: tl.constexpr = triton.next_power_of_2(PARTS)
    part = tl.arange(0, WIDTH)
    inside = (part < PARTS)[:, None] & (m < rows)[None, :]
    found = tl.load(squares + part[:, None] * M + m[None, :], mask=inside, other=0.0)
    return rms_scale(tl.sum(found, 0), eps, K)


@jit()
def row_squares(y, inside):
    """Of the columns in a tile, summed in float32."""
    y = tl.where(inside, y.to(tl.float32), 0.0)
    return tl.sum(y * y, 1)
