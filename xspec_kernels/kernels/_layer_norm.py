"""A LayerNorm inside the product that consumes its rows, from moments that its maker left.

As in `_row_norm`, no tile of the product that makes a row sees all of it. Each tile leaves the mean
of its own columns and the sum of squares about that mean, both of rounded values; whoever consumes
the row joins these (Chan, Golub, LeVeque 1979), in an order that is the same for every row and
number of rows. Nothing is squared before a mean has been taken off, so a row that lies far from
zero keeps its digits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from xspec_kernels._dispatch import check_tensor
from xspec_kernels._triton import jit, launch, tl, triton
from xspec_kernels.kernels._product import check_alignment, narrow
from xspec_kernels.kernels.norm_act import check_eps
from xspec_kernels.tiles import Tile


class LayerNorm(NamedTuple):
    """(x - mean) / sqrt(variance + eps) * weight + bias of each row, rounded once.

    Attributes:
        weight, bias: [K], dtype of x.
        eps: added to the variance.
        moments: [T, 2, M] float32, what the product that made x returned beside it
            (`with_moments=True`): mean and sum of squares about it of T parts of each row. None
            lets Triton's kernels take them in a launch of their own; torch's read x alone.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    eps: float = 1e-5
    moments: torch.Tensor | None = None


class NormArguments(NamedTuple):
    """A norm as a kernel takes it; all None and 0 where there is none."""

    weight: torch.Tensor | None
    bias: torch.Tensor | None
    moments: torch.Tensor | None
    eps: float
    parts: int
    part: int


def layer_norm_ref(x: torch.Tensor, norm: LayerNorm | None) -> torch.Tensor:
    """The definition; x itself where there is no norm."""
    return x if norm is None else F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)


def unpack_norm(
    norm: LayerNorm | None,
) -> tuple[list[torch.Tensor], float, torch.Tensor | None]:
    """A norm as the ops' schemas spell it: [weight, bias] or [], eps, moments."""
    return ([], 0.0, None) if norm is None else ([norm.weight, norm.bias], norm.eps, norm.moments)


def pack_norm(
    affine: list[torch.Tensor], eps: float, moments: torch.Tensor | None
) -> LayerNorm | None:
    """The inverse of `unpack_norm`."""
    return LayerNorm(*affine, eps, moments) if affine else None


def check_layer_norm(
    op: str,
    name: str,
    x: torch.Tensor,
    affine: list[torch.Tensor],
    eps: float,
    moments: torch.Tensor | None,
) -> None:
    """Raise ValueError unless these fit rows x [M, K]."""
    if len(affine) not in (0, 2) or (moments is not None and not affine):
        raise ValueError(f"{op}: {name} needs a weight and a bias, got {len(affine)} tensors")
    for part, tensor in zip(("weight", "bias"), affine, strict=False):
        check_tensor(op, f"{name}.{part}", tensor, x.shape[1:], (x.dtype,), x.device)
    check_eps(op, eps)
    if moments is not None:
        _check_moments(op, f"{name}.moments", moments, x.shape[0], x.device)


def _check_moments(
    op: str, name: str, moments: torch.Tensor, rows: int, device: torch.device
) -> None:
    if moments.dim() != 3 or not moments.shape[0]:
        raise ValueError(
            f"{op}: {name} has shape {list(moments.shape)}, expected [T, 2, {rows}] with T >= 1"
        )
    check_tensor(op, name, moments, (moments.shape[0], 2, rows), (torch.float32,), device)


def new_moments(x: torch.Tensor, N: int, tile: Tile) -> torch.Tensor:
    """Where the tiles of a product of x with a weight of N rows leave the moments of its rows."""
    return x.new_empty((-(-N // tile.block_n), 2, x.shape[0]), dtype=torch.float32)


def check_moments_out(
    op: str, moments: torch.Tensor | None, rows: int, N: int, tile: Tile, device: torch.device
) -> None:
    """Raise ValueError unless each tile has a place."""
    if moments is None:
        return
    _check_moments(op, "moments_out", moments, rows, device)
    tiles = -(-N // tile.block_n)
    if moments.shape[0] != tiles:
        raise ValueError(f"{op}: moments_out has {moments.shape[0]} parts, expected {tiles}")


def norm_arguments(op: str, name: str, x: torch.Tensor, norm: LayerNorm | None) -> NormArguments:
    """For a kernel, with the moments taken here where they are not given."""
    if norm is None:
        return NormArguments(None, None, None, 0.0, 0, 0)
    for tensor in (norm.weight, norm.bias):
        check_alignment(op, name, tensor)
    moments = row_moments(op, x) if norm.moments is None else norm.moments
    parts = moments.shape[0]
    return NormArguments(
        norm.weight, norm.bias, moments, norm.eps, parts, _part_width(x.shape[1], parts)
    )


def row_moments(op: str, x: torch.Tensor) -> torch.Tensor:
    """[1, 2, M], for norms of rows that no product has made; one launch."""
    check_alignment(op, "x", x)
    rows, width = x.shape
    moments = x.new_empty((1, 2, rows), dtype=torch.float32)
    block = 1 << (width - 1).bit_length()
    launch(
        _row_moments_kernel, (rows,), x.device, x, moments, rows, D=width, BLOCK=block,
        num_warps=min(8, max(1, block // 256)),
    )  # fmt: skip
    return moments


def _part_width(width: int, parts: int) -> int:
    """Columns of a part: all of one, else the only power of two that makes so many parts."""
    part = width if parts == 1 else 1
    while -(-width // part) > parts:
        part *= 2
    return part


@jit(do_not_specialize=["M"])
def _row_moments_kernel(
    x,  # [M, D]
    moments,  # [1, 2, M] fp32
    M,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < D
    values = tl.load(x + row.to(tl.int64) * D + column, mask=inside, other=0).to(tl.float32)
    mean = tl.sum(values, 0) / D
    off = tl.where(inside, values - mean, 0.0)
    tl.store(moments + row, mean)
    tl.store(moments + M + row, tl.sum(off * off, 0))


@jit()
def join_moments(
    moments,  # [PARTS, 2, M] fp32
    eps,
    M,
    rows,
    block,
    D: tl.constexpr,
    BM: tl.constexpr,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
):
    """(mean, 1 / standard deviation) of each row of a block, [BM] fp32."""
    m = block * BM + tl.arange(0, BM)
    part = tl.arange(0, triton.next_power_of_2(PARTS))
    inside = (part < PARTS)[:, None] & (m < rows)[None, :]
    at = moments + (2 * part)[:, None] * M + m[None, :]
    means = tl.load(at, mask=inside, other=0.0)
    spreads = tl.load(at + M, mask=inside, other=0.0)
    width = tl.maximum(tl.minimum(D - part * PART, PART), 0).to(tl.float32)[:, None]
    mean = tl.sum(width * means, 0) / D
    off = means - mean[None, :]
    variance = (tl.sum(spreads, 0) + tl.sum(width * (off * off), 0)) / D
    return mean, tl.rsqrt(variance + eps)


@jit()
def layer_normed(
    a, mean, scale, weight, bias, dtype: tl.constexpr, GELU: tl.constexpr, INTERPRETED: tl.constexpr
):
    """A block of rows as LayerNorm, and perhaps GELU behind it, leaves it, in float32 that holds
    values of `dtype`.
    """
    a = (a.to(tl.float32) - mean[:, None]) * scale[:, None]
    a = a * weight.to(tl.float32)[None, :] + bias.to(tl.float32)[None, :]
    a = narrow(a, dtype, INTERPRETED).to(tl.float32)
    if GELU:
        a = narrow(gelu(a), dtype, INTERPRETED).to(tl.float32)
    return a


@jit()
def gelu(x):
    """x times the normal distribution's integral up to x, by the error function."""
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@jit()
def leave_moments(
    y,
    moments,  # [TILES, 2, M] fp32
    inside,
    m,
    rows,
    tile,
    M,
    N: tl.constexpr,
    BN: tl.constexpr,
):
    """Moments of the columns in a tile, of y as it was stored."""
    y = tl.where(inside, y.to(tl.float32), 0.0)
    width = tl.minimum(N - tile * BN, BN).to(tl.float32)
    mean = tl.sum(y, 1) / width
    off = tl.where(inside, y - mean[:, None], 0.0)
    at = moments + 2 * tile * M + m
    tl.store(at, mean, mask=m < rows)
    tl.store(at + M, tl.sum(off * off, 1), mask=m < rows)
