"""The Triton kernel of rope_append: a program takes a few heads of one row."""

from __future__ import annotations

import torch

from xspec_kernels._triton import jit, launch, tl
from xspec_kernels.kernels.norm_act import require_aligned, rms_scale


@jit()
def _product(x, y, dtype: tl.constexpr):
    return (x * y).to(dtype).to(tl.float32)


@jit(
    do_not_specialize=["N", "slots", "positions", "stride_batch", "stride_head", "stride_slot"],
    do_not_specialize_on_alignment=["depth", "cache_seqlens", "num_rows"],
)
def _rope_append_kernel(
    qkv,  # [B * N, (HQ + 2 HKV) * D]
    cos,  # [positions, D]
    sin,  # [positions, D]
    depth,  # [B, N] int32
    cache_seqlens,  # [B] int32
    k_cache,  # [B, HKV, slots, D]
    v_cache,  # [B, HKV, slots, D]
    num_rows,  # [B] int32 or None
    q_norm,  # [D] or None
    k_norm,  # [D] or None
    out,  # [B, N, HQ, D]
    eps,
    N,
    slots,
    positions,
    stride_batch,  # of the caches, in units of D, as the two below
    stride_head,
    stride_slot,
    HQ: tl.constexpr,
    HKV: tl.constexpr,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    dtype = out.dtype.element_ty
    line = tl.program_id(0).to(tl.int64)
    request, row = line // N, (line % N).to(tl.int32)
    start = tl.load(cache_seqlens + request)
    slot = start + row
    position = start + tl.load(depth + line)
    real = (slot >= 0) & (slot < slots) & (position >= 0) & (position < positions)
    if num_rows is not None:
        real = real & (row < tl.load(num_rows + request))

    # A tile of heads as two halves, so that an element meets its partner without a shuffle.
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    column = tl.arange(0, HALF)
    inside = (head < HQ + 2 * HKV)[:, None] & (column < D // 2)[None, :]
    tile = head[:, None] * D + column[None, :]
    source = qkv + line * ((HQ + 2 * HKV) * D) + tile
    raw1 = tl.load(source, mask=inside & real, other=0)
    raw2 = tl.load(source + D // 2, mask=inside & real, other=0)
    x1, x2 = raw1.to(tl.float32), raw2.to(tl.float32)

    if q_norm is not None:
        is_q = (head < HQ)[:, None]
        scale = rms_scale(tl.sum(x1 * x1 + x2 * x2, 1), eps, D)[:, None]
        within = (column < D // 2)[None, :]
        weight = tl.where(is_q, q_norm, k_norm) + column[None, :]
        w1 = tl.load(weight, mask=within, other=0).to(tl.float32)
        w2 = tl.load(weight + D // 2, mask=within, other=0).to(tl.float32)
        x1 = _product((x1 * scale).to(dtype).to(tl.float32), w1, dtype)
        x2 = _product((x2 * scale).to(dtype).to(tl.float32), w2, dtype)

    # The same row of the table for every head, in the layout of the tile.
    turn = tl.where(real, position, 0).to(tl.int64) * D + tl.zeros_like(tile) + column[None, :]
    turning = inside & real
    c1 = tl.load(cos + turn, mask=turning, other=0).to(tl.float32)
    c2 = tl.load(cos + turn + D // 2, mask=turning, other=0).to(tl.float32)
    s1 = tl.load(sin + turn, mask=turning, other=0).to(tl.float32)
    s2 = tl.load(sin + turn + D // 2, mask=turning, other=0).to(tl.float32)
    y1 = (_product(x1, c1, dtype) + _product(-x2, s1, dtype)).to(dtype)
    y2 = (_product(x2, c2, dtype) + _product(x1, s2, dtype)).to(dtype)

    is_q = inside & (head < HQ)[:, None]
    target = out + line * (HQ * D) + tile
    tl.store(target, tl.where(real, y1, 0), mask=is_q)
    tl.store(target + D // 2, tl.where(real, y2, 0), mask=is_q)

    is_k = inside & real & ((head >= HQ) & (head < HQ + HKV))[:, None]
    is_v = inside & real & (head >= HQ + HKV)[:, None]
    kv_head = ((head - HQ) % HKV).to(tl.int64)
    place = request * stride_batch + kv_head * stride_head + slot.to(tl.int64) * stride_slot
    place = place[:, None] * D + column[None, :]
    tl.store(k_cache + place, y1, mask=is_k)
    tl.store(k_cache + place + D // 2, y2, mask=is_k)
    tl.store(v_cache + place, raw1, mask=is_v)
    tl.store(v_cache + place + D // 2, raw2, mask=is_v)


def launch_rope_append(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    depth: torch.Tensor,
    cache_seqlens: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    num_rows: torch.Tensor | None,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
    *,
    out: torch.Tensor,
) -> None:
    """The kernel on checked arguments; out is [B, N, H_q, D].

    Raises:
        ValueError: a tensor is not aligned to 16 bytes.
    """
    require_aligned(
        "rope_append", qkv=qkv, cos=cos, sin=sin, k_cache=k_cache, v_cache=v_cache, q_norm=q_norm,
        k_norm=k_norm,
    )  # fmt: skip
    _, kv_heads, slots, head_dim = k_cache.shape
    nodes, q_heads = out.shape[1:3]
    half = 1 << (head_dim // 2 - 1).bit_length()
    # 256 elements of each half are 16 bytes for every lane of a warp, in 16-bit types.
    heads = max(1, 256 // half)
    blocks = -(-(q_heads + 2 * kv_heads) // heads)
    launch(
        _rope_append_kernel, (qkv.shape[0], blocks), qkv.device, qkv, cos, sin, depth,
        cache_seqlens, k_cache, v_cache, num_rows, q_norm, k_norm, out, eps, nodes, slots,
        cos.shape[0], *(stride // head_dim for stride in k_cache.stride()[:3]), HQ=q_heads,
        HKV=kv_heads, D=head_dim, HEADS=heads, HALF=half, num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip
