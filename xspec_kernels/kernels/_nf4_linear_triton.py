"""The Triton kernel of nf4_linear.

A step takes one block of 64 weights from each row of a tile. A thread holds half a block. It
multiplies the 16 values of the code by the block's scale, rounds them, and keeps the low and the
high bytes of the results in eight registers; byte permutations then find four weights at a time.
For 32 weights that is 32 instructions for the table and 84 for the look-ups, all of them exact.
Where there is no such instruction (Triton's interpreter) or no 16-bit result (float32), each weight
is looked up and multiplied on its own.
"""

from __future__ import annotations

import struct

from xspec_kernels import nf4
from xspec_kernels._triton import jit, tl
from xspec_kernels.kernels._epilogue import finish
from xspec_kernels.kernels._product import (
    count_rows,
    leave_partial,
    narrow,
    normalized,
    sum_partials,
)
from xspec_kernels.kernels._row_norm import row_scale


def table_source(pair: str) -> str:
    """PTX: scale $8 -> bytes of the 16 weights, low ones $0-$3 and high ones $4-$7.

    Args:
        pair: type of two packed weights, "f16x2" or "bf16x2".
    """
    lines = [".reg .f32 a<16>; .reg .b32 h<8>;"]
    for i, value in enumerate(nf4.CODE):
        bits = struct.unpack("<I", struct.pack("<f", value))[0]
        lines.append(f"mul.rn.f32 a{i}, $8, 0f{bits:08X};")
    lines += [f"cvt.rn.{pair}.f32 h{i}, a{2 * i + 1}, a{2 * i};" for i in range(8)]
    for i in range(4):
        for plane, selector in ((i, "0x6420"), (4 + i, "0x7531")):
            lines.append(f"prmt.b32 ${plane}, h{2 * i}, h{2 * i + 1}, {selector};")
    return "{ " + "\n".join(lines) + " }"


def lookup_source() -> str:
    """PTX: eight packed weights $8 and their table $9-$16 -> weights $0-$7, even column first.

    prmt takes the lower three bits of an index; the fourth chooses between its two results.
    """
    lines = [
        ".reg .b32 e, m, a, b, l, h, w<4>;",
        "and.b32 e, $8, 0x77777777;",
        "shr.b32 m, $8, 1;",
        "and.b32 m, m, 0x44444444;",
        "or.b32 m, m, 0x32103210;",
    ]
    for half in range(2):
        if half:
            lines += ["shr.b32 e, e, 16;", "shr.b32 m, m, 16;"]
        for plane, first in (("l", 9), ("h", 13)):
            lines += [
                f"prmt.b32 a, ${first}, ${first + 1}, e;",
                f"prmt.b32 b, ${first + 2}, ${first + 3}, e;",
                f"prmt.b32 {plane}, a, b, m;",
            ]
        lines += [
            f"prmt.b32 w{2 * half}, l, h, 0x4051;",
            f"prmt.b32 w{2 * half + 1}, l, h, 0x6273;",
        ]
    lines += [f"mov.b32 {{${2 * i}, ${2 * i + 1}}}, w{i};" for i in range(4)]
    return "{ " + "\n".join(lines) + " }"


if tl is not None:
    _TABLE_F16 = tl.constexpr(table_source("f16x2"))
    _TABLE_BF16 = tl.constexpr(table_source("bf16x2"))
    _TABLE_TYPES = tl.constexpr("=r,=r,=r,=r,=r,=r,=r,=r,f")
    _LOOKUP = tl.constexpr(lookup_source())
    _LOOKUP_TYPES = tl.constexpr("=h,=h,=h,=h,=h,=h,=h,=h,r,r,r,r,r,r,r,r,r")
    _SCALE = tl.constexpr("{ .reg .f32 a; mul.rn.f32 a, $1, $2; add.rn.f32 $0, a, $3; }")


@jit()
def _scale(
    scales,  # [N, K/64] fp32, or uint8 where there is a scale_code
    scale_code,  # [256] fp32 or None
    levels,  # [2, GROUPS] fp32 or None
    n,
    step,
    BLOCKS: tl.constexpr,
    GROUPS: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """float32 scale of block `step` in each row of `n`, with the roundings of `nf4.absmax`."""
    scale = tl.load(scales + n * BLOCKS + step)
    if scale_code is not None:
        at = levels + n % PARTS * (GROUPS // PARTS) + (n // PARTS * BLOCKS + step) // GROUP_SIZE
        value = tl.load(scale_code + scale.to(tl.int32))
        largest = tl.load(at)
        offset = tl.load(at + GROUPS)
        if INTERPRETED:
            scale = value * largest + offset
        else:
            # Left to the compiler, the two would become one operation with one rounding.
            scale = tl.inline_asm_elementwise(
                _SCALE, "=f,f,f,f", [value, largest, offset],
                dtype=tl.float32, is_pure=True, pack=1,
            )  # fmt: skip
    return scale


@jit()
def _look_up(words, scale, DTYPE: tl.constexpr, OPAQUE: tl.constexpr):
    """Eight weights a word from a table of their block, [BN, 8] int32 -> [BN, 64]."""
    if tl.bfloat16 == DTYPE:
        TABLE: tl.constexpr = _TABLE_BF16
        TYPES: tl.constexpr = (tl.bfloat16,) * 8
    else:
        TABLE: tl.constexpr = _TABLE_F16
        TYPES: tl.constexpr = (tl.float16,) * 8
    t0, t1, t2, t3, t4, t5, t6, t7 = tl.inline_asm_elementwise(
        TABLE, _TABLE_TYPES, [scale[:, None]], dtype=(tl.int32,) * 8, is_pure=True, pack=1
    )
    v0, v1, v2, v3, v4, v5, v6, v7 = tl.inline_asm_elementwise(
        _LOOKUP, _LOOKUP_TYPES, [words, t0, t1, t2, t3, t4, t5, t6, t7],
        dtype=TYPES, is_pure=True, pack=1,
    )  # fmt: skip
    even = tl.join(tl.join(v0, v4), tl.join(v2, v6))
    odd = tl.join(tl.join(v1, v5), tl.join(v3, v7))
    block = tl.reshape(tl.join(even, odd), (words.shape[0], 64))
    if OPAQUE:
        # The compiler must not look through this: it would give the product a layout for 8-bit
        # operands, and every matrix instruction some moves.
        block = tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [block], dtype=block.dtype, is_pure=False, pack=2
        )
    return block


@jit()
def _multiply(words, scale, code, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr):
    """The same weights one by one, `code` being the 16 values in memory."""
    column = tl.arange(0, 8)
    shift = column // 2 * 8 + (1 - column % 2) * 4
    index = (words[:, :, None] >> shift[None, None, :]) & 15
    value = tl.load(code + index) * scale[:, None, None]
    return tl.reshape(narrow(value, DTYPE, INTERPRETED), (words.shape[0], 64))


@jit()
def _tile_product(
    x, words, scales, code, scale_code, levels, norm, factor, M, tile, split, block,
    N: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    SPLIT_K: tl.constexpr, GROUPS: tl.constexpr, PARTS: tl.constexpr, GROUP_SIZE: tl.constexpr,
    OPAQUE: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """This split's sum for one tile, [BM, BN] fp32; rows from M on read nothing and are zero."""
    STEPS: tl.constexpr = K // BK
    DTYPE: tl.constexpr = x.dtype.element_ty
    row = tl.arange(0, BM)
    n = tile * BN + tl.arange(0, BN)
    if N % BN != 0:
        # Columns behind the last one are computed from its weights and never stored.
        n = tl.minimum(n, N - 1)
    rows = (block * BM + row < M)[:, None]
    k = tl.arange(0, BK)
    x_at = x + block.to(tl.int64) * (BM * K) + row[:, None] * K + k[None, :]
    words_at = words + n.to(tl.int64)[:, None] * (K // 8) + tl.arange(0, 8)[None, :]
    if norm is not None:
        weight = tl.load(norm + split * STEPS // SPLIT_K * BK + k)
    total = tl.zeros((BM, BN), tl.float32)
    for step in tl.range(split * STEPS // SPLIT_K, (split + 1) * STEPS // SPLIT_K):
        a = tl.load(x_at + step * BK, mask=rows, other=0.0)
        if norm is not None:
            following = tl.load(norm + tl.minimum(step + 1, STEPS - 1) * BK + k)
            a = normalized(a, factor, weight, INTERPRETED)
            weight = following
        q = tl.load(words_at + step * 8)
        scale = _scale(
            scales, scale_code, levels, n, step, STEPS, GROUPS, PARTS, GROUP_SIZE, INTERPRETED
        )
        if INTERPRETED or tl.float32 == DTYPE:
            b = _multiply(q, scale, code, DTYPE, INTERPRETED)
        else:
            b = _look_up(q, scale, DTYPE, OPAQUE)
        if INTERPRETED:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        total = tl.dot(a, tl.trans(b), total, input_precision="ieee")
    return total


@jit(
    do_not_specialize=["M", "bounded"],
    do_not_specialize_on_alignment=["num_rows", "bias", "squares", "squares_out"],
)
def nf4_linear_kernel(
    x,  # [M, K]
    words,  # [N, K/8] int32, eight weights each
    early,  # words, or None: no early launch
    scales,  # see _scale
    code,  # [16] fp32
    scale_code,
    levels,
    y,  # [M, N], [M, N/2] for the gate
    bias,  # [N] or None
    residual,  # [M, N] or None
    norm,  # [K], weight of the RMSNorm of x, or None
    squares,  # [PARTS, M] fp32 of x's rows, or None
    squares_out,  # [TILES, M] fp32 of y's rows, or None
    eps,
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
    GROUPS: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    GATE: tl.constexpr,
    NORM_PARTS: tl.constexpr,
    OPAQUE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    tile = tl.program_id(0)
    split = tl.program_id(1)
    block = tl.program_id(2)
    TILES: tl.constexpr = (N + BN - 1) // BN
    rows = count_rows(early, num_rows, M, bounded, tile, split, N, K // 8, BN, BK // 8, SPLIT_K)
    if block * BM >= rows:
        return
    factor = None
    if norm is not None:
        factor = row_scale(squares, eps, M, rows, block, K, BM, NORM_PARTS)
    total = _tile_product(
        x, words, scales, code, scale_code, levels, norm, factor, rows, tile, split, block,
        N, K, BM, BN, BK, SPLIT_K, GROUPS, PARTS, GROUP_SIZE, OPAQUE, INTERPRETED,
    )  # fmt: skip
    if early is not None:
        tl.extra.cuda.gdc_launch_dependents()
    if SPLIT_K > 1:
        if not leave_partial(
            total, partial, semaphore, rows, tile, split, block, TILES, BM, BN, SPLIT_K
        ):
            return
        total = sum_partials(partial, semaphore, rows, tile, block, TILES, BM, BN, SPLIT_K)
    finish(
        total, y, bias, residual, squares_out, M, rows, tile, block, N, BM, BN, GATE, INTERPRETED
    )
