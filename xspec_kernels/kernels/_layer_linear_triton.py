"""The Triton kernel of layer_linear: `tile_product` and `finish` with LayerNorms on the way in."""

from __future__ import annotations

from xspec_kernels._triton import jit, tl
from xspec_kernels.kernels._layer_norm import gelu, join_moments, layer_normed, leave_moments
from xspec_kernels.kernels._product import (
    count_rows,
    leave_partial,
    narrow,
    settled,
    sum_partials,
)

_POINTERS = ("num_rows", "bias", "moments", "residual_moments", "moments_out")


@jit()
def _normed_product(
    x,  # [M, K]
    w,  # [N, K] pointer, or its descriptor of [BN, BK] blocks
    weight,  # [K] of the norm, or None
    shift,  # [K] of the norm, or None
    mean,  # [BM] fp32, or None
    scale,  # [BM] fp32, or None
    rows,
    tile,
    split,
    block,
    N: tl.constexpr,
    K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SPLIT_K: tl.constexpr,
    GELU: tl.constexpr,
    TMA: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """`tile_product` behind a LayerNorm: this split's sum for one tile, [BM, BN] fp32."""
    STEPS: tl.constexpr = K // BK
    row = tl.arange(0, BM)
    k = tl.arange(0, BK)
    inside = (block * BM + row < rows)[:, None]
    x_at = x + block.to(tl.int64) * (BM * K) + row[:, None] * K + k[None, :]
    column = tile * BN + tl.arange(0, BN)
    if not TMA:
        w_at = w + column.to(tl.int64)[:, None] * K + k[None, :]
    first = split * STEPS // SPLIT_K
    if weight is not None:
        factor = tl.load(weight + first * BK + k)
        offset = tl.load(shift + first * BK + k)
    total = tl.zeros((BM, BN), tl.float32)
    for step in tl.range(first, (split + 1) * STEPS // SPLIT_K):
        a = tl.load(x_at + step * BK, mask=inside, other=0.0)
        if weight is not None:
            # Too narrow for the compiler to fetch ahead.
            following = tl.minimum(step + 1, STEPS - 1) * BK + k
            next_factor = tl.load(weight + following)
            next_offset = tl.load(shift + following)
            a = layer_normed(
                a, mean, scale, factor, offset, x.dtype.element_ty, GELU, INTERPRETED
            ).to(x.dtype.element_ty)
            factor = next_factor
            offset = next_offset
        if TMA:
            b = w.load([tile * BN, step * BK])
        elif N % BN == 0:
            b = tl.load(w_at + step * BK)
        else:
            b = tl.load(w_at + step * BK, mask=(column < N)[:, None], other=0.0)
        if INTERPRETED:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        total = tl.dot(a, tl.trans(b), total, input_precision="ieee")
        if TMA and weight is not None and not INTERPRETED:
            total = settled(total)
    return total


@jit()
def _finish(
    total,
    y,
    bias,
    residual,
    weight,
    shift,
    mean,
    deviation,
    moments_out,
    scale,
    keep,
    M,
    rows,
    tile,
    block,
    N: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    GELU: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Bias, GELU, scale, residual, one rounding, moments."""
    m = block * BM + tl.arange(0, BM)
    n = tile * BN + tl.arange(0, BN)
    if bias is not None:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if GELU:
        total = gelu(total)
    total *= scale
    at = m.to(tl.int64)[:, None] * N + n[None, :]
    inside = (m < rows)[:, None] & (n < N)[None, :]
    if residual is not None:
        kept = tl.load(residual + at, mask=inside, other=0.0)
        if weight is not None:
            factor = tl.load(weight + n, mask=n < N, other=0.0)
            offset = tl.load(shift + n, mask=n < N, other=0.0)
            kept = layer_normed(
                kept, mean, deviation, factor, offset, y.dtype.element_ty, False, INTERPRETED
            )
        total += keep * kept.to(tl.float32)
    total = narrow(total, y.dtype.element_ty, INTERPRETED)
    tl.store(y + at, total, mask=inside)
    if moments_out is not None:
        leave_moments(total, moments_out, inside, m, rows, tile, M, N, BN)


@jit(do_not_specialize=["M", "bounded"], do_not_specialize_on_alignment=_POINTERS)
def layer_linear_kernel(
    x,  # [M, K]
    w,  # [N, K] pointer, or its descriptor of [BN, BK] blocks
    weights,  # [N, K] pointer, or None: no early launch
    y,  # [M, N]
    bias,  # [N] or None
    residual,  # [M, N] or None
    norm_weight,  # [K], of the LayerNorm of x, or None
    norm_bias,  # [K] or None
    moments,  # [PARTS, 2, M] fp32 of x's rows, or None
    residual_weight,  # [N], of the LayerNorm of the residual, or None
    residual_bias,  # [N] or None
    residual_moments,  # [RESIDUAL_PARTS, 2, M] fp32 of the residual's rows, or None
    moments_out,  # [TILES, 2, M] fp32 of y's rows, or None
    eps,
    residual_eps,
    scale,
    keep,
    partial,  # [row blocks * BM, SPLIT_K, TILES * BN] fp32, or None for SPLIT_K == 1
    semaphore,  # [row blocks * TILES] int32 zeros
    num_rows,  # [1] int32, read if `bounded`
    M,
    bounded,
    N: tl.constexpr,
    K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SPLIT_K: tl.constexpr,
    GELU_IN: tl.constexpr,
    GELU_OUT: tl.constexpr,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
    RESIDUAL_PARTS: tl.constexpr,
    RESIDUAL_PART: tl.constexpr,
    TMA: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    tile = tl.program_id(0)
    split = tl.program_id(1)
    block = tl.program_id(2)
    TILES: tl.constexpr = (N + BN - 1) // BN
    rows = count_rows(weights, num_rows, M, bounded, tile, split, N, K, BN, BK, SPLIT_K)
    if block * BM >= rows:
        return
    mean = None
    deviation = None
    if norm_weight is not None:
        mean, deviation = join_moments(moments, eps, M, rows, block, K, BM, PARTS, PART)
    total = _normed_product(
        x, w, norm_weight, norm_bias, mean, deviation, rows, tile, split, block, N, K, BM, BN, BK,
        SPLIT_K, GELU_IN, TMA, INTERPRETED,
    )  # fmt: skip
    if weights is not None:
        tl.extra.cuda.gdc_launch_dependents()
    if SPLIT_K > 1:
        if not leave_partial(
            total, partial, semaphore, rows, tile, split, block, TILES, BM, BN, SPLIT_K
        ):
            return
        total = sum_partials(partial, semaphore, rows, tile, block, TILES, BM, BN, SPLIT_K)
    if residual_weight is not None:
        mean, deviation = join_moments(
            residual_moments, residual_eps, M, rows, block, N, BM, RESIDUAL_PARTS, RESIDUAL_PART
        )
    _finish(
        total, y, bias, residual, residual_weight, residual_bias, mean, deviation, moments_out,
        scale, keep, M, rows, tile, block, N, BM, BN, GELU_OUT, INTERPRETED,
    )  # fmt: skip
