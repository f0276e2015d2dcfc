"""Random inputs of the products: every epilogue, and norms between two of them."""

from __future__ import annotations

import random
from collections.abc import Iterator

import torch

from xspec_kernels import RowNorm, nf4, nf4_linear, skinny_linear

from .cases import Case, Tensors
from .forward_cases import TOLERANCE, draws

# Each shape is a kernel to compile, so there are few.
_PLAIN = (
    ("none", 66, 64, torch.float32), ("bias", 150, 192, torch.float16),
    ("residual", 258, 576, torch.bfloat16), ("gate", 302, 1088, torch.bfloat16),
)  # fmt: skip
# Width of the rows between two products, columns of the second, dtype.
_NORMED = (
    (192, 66, torch.float32), (320, 150, torch.float16), (576, 302, torch.bfloat16),
    (1088, 258, torch.bfloat16),
)  # fmt: skip


def skinny_linear_cases(rng: random.Random, sizes: tuple[int, ...]) -> Iterator[Case]:
    """Every epilogue, widths that no tile divides, rows that do not count; norms."""
    for rows in (*sizes, 70):
        for epilogue, N, K, dtype in _PLAIN:
            yield _plain(rows, N, K, dtype, epilogue, rng.randint(1, rows), draws(rng))
        for width, N, dtype in _NORMED:
            yield _normed(False, rows, rng.randint(1, rows), width, N, dtype, draws(rng))


def nf4_linear_cases(rng: random.Random, sizes: tuple[int, ...]) -> Iterator[Case]:
    """Norms and epilogues as in a layer, weights of one matrix and of two."""
    for rows in (*sizes, 70):
        for width, N, dtype in _NORMED:
            yield _normed(True, rows, rng.randint(1, rows), width, N, dtype, draws(rng))


def _plain(
    rows: int, N: int, K: int, dtype: torch.dtype, epilogue: str, count: int,
    draw: torch.Generator,
) -> Case:  # fmt: skip
    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=draw)

    def call(given: Tensors, backend: str) -> list[torch.Tensor]:
        x, w, num_rows, bias, residual = given
        y = skinny_linear(x, w, num_rows, bias=bias, residual=residual, gate=epilogue == "gate",
                          backend=backend)  # fmt: skip
        return [y[:count]]

    x = normal(rows, K)
    x[count:] = torch.nan
    inputs = [x.to(dtype), (normal(N, K) / K**0.5).to(dtype)]
    inputs += [torch.tensor([count], dtype=torch.int32)]
    inputs += [normal(N).to(dtype) if epilogue == "bias" else None]
    inputs += [normal(rows, N).to(dtype) if epilogue == "residual" else None]
    name = f"{count} of {rows} rows, {N} x {K}, {str(dtype)[6:]}, {epilogue}"
    return Case("skinny_linear", name, inputs, call, ("y",), TOLERANCE[dtype])


def _normed(
    packed: bool, rows: int, count: int, width: int, N: int, dtype: torch.dtype,
    draw: torch.Generator,
) -> Case:  # fmt: skip
    """norm(x) W^T + x, which sums squares first and leaves others, then a gated product of its
    norm, which takes them.
    """

    def call(given: Tensors, backend: str) -> list[torch.Tensor]:
        x, num_rows, scale, *weights = given
        product = nf4_linear if packed else skinny_linear
        if packed:
            weights = [_nf4(weights[:4], dtype, 1), _nf4(weights[4:], dtype, 2)]
        norm, options = RowNorm(scale, 1e-5), {"backend": backend}
        y, squares = product(
            x, weights[0], num_rows, residual=x, norm=norm, with_squares=True, **options
        )
        norm = norm._replace(squares=squares)
        z = product(y, weights[1], num_rows, gate=True, norm=norm, **options)
        return [y[:count], z[:count]]

    def weight(out: int) -> torch.Tensor:
        return torch.randn(out, width, generator=draw) / width**0.5

    x = torch.randn(rows, width, generator=draw)
    x[count:] = torch.nan
    inputs: Tensors = [x.to(dtype), torch.tensor([count], dtype=torch.int32)]
    inputs += [torch.randn(width, generator=draw).to(dtype)]
    if packed:
        pair = nf4.interleave(nf4.quantize(weight(N)), nf4.quantize(weight(N)))
        for w in (nf4.quantize(weight(width)), pair):
            inputs += [w.packed, w.scales, w.nested.code, w.nested.levels]
    else:
        inputs += [weight(width).to(dtype), weight(2 * N).to(dtype)]
    op = "nf4_linear" if packed else "skinny_linear"
    name = f"norms, {count} of {rows} rows, {N} x {width}, {str(dtype)[6:]}"
    return Case(op, name, inputs, call, ("y", "z"), TOLERANCE[dtype])


def _nf4(tensors: Tensors, dtype: torch.dtype, parts: int) -> nf4.NF4Weight:
    packed, scales, code, levels = tensors
    return nf4.NF4Weight(packed, scales, dtype, nf4.Nested(code, levels, parts))
