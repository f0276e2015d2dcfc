"""rope_append: rotate q and k of the new rows, write k and v behind the committed rows.

Row r of request b has position cache_seqlens[b] + depth[b, r] and goes to slot cache_seqlens[b] + r
of the cache: siblings share a position, not a slot. Rotation as in transformers' Llama (the second
half of a head is the partner of the first), each product rounded to the model's dtype; optional
RMSNorm of every q and k head before it, as in Qwen3.

A row from num_rows on, or one whose slot or position lies outside the cache or the table, leaves
the cache alone and gives q = 0. On CPU tensors the latter raises instead; on a GPU a check would
wait for the device, and verify_tail reports the full cache.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from xspec_kernels._dispatch import check_tensor, register
from xspec_kernels.kernels._rope_append_triton import launch_rope_append
from xspec_kernels.kernels.norm_act import FLOATS, rms_norm_ref


def rope_table(
    inv_freq: torch.Tensor, positions: int, dtype: torch.dtype, scaling: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [positions, 2 * len(inv_freq)]: computed in float32, then cast to dtype.

    Raises:
        ValueError: inv_freq is no vector of floats, dtype none of floats, or positions below 1.
    """
    if inv_freq.dim() != 1 or not inv_freq.numel() or not inv_freq.is_floating_point():
        raise ValueError(
            f"rope_table: inv_freq is {inv_freq.dtype} {list(inv_freq.shape)}, expected [D/2] of "
            "floats"
        )
    if positions < 1:
        raise ValueError(f"rope_table: positions must be at least 1, got {positions}")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"rope_table: dtype must be one of floats, got {dtype!r}")
    position = torch.arange(positions, device=inv_freq.device, dtype=torch.float32)
    angle = position[:, None] * inv_freq.float()
    angle = torch.cat((angle, angle), dim=-1)
    return (angle.cos() * scaling).to(dtype), (angle.sin() * scaling).to(dtype)


def rotate_ref(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """transformers' rotary embedding of x [..., D]."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


class _Geometry(NamedTuple):
    batch: int
    nodes: int
    q_heads: int
    kv_heads: int
    slots: int
    head_dim: int


def _geometry(qkv: torch.Tensor, depth: torch.Tensor, k_cache: torch.Tensor) -> _Geometry:
    _, kv_heads, slots, head_dim = k_cache.shape
    return _Geometry(*depth.shape, qkv.shape[1] // head_dim - 2 * kv_heads, kv_heads, slots,
                     head_dim)  # fmt: skip


def rope_append_ref(
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
) -> torch.Tensor:
    """The definition: all rows rotated, then those that have a place written."""
    size = _geometry(qkv, depth, k_cache)
    placed = _placed(size, cos.shape[0], depth, cache_seqlens, num_rows)
    if depth.device.type == "cpu":
        _check_placed(placed, size, depth, cache_seqlens, num_rows)
    position = (cache_seqlens[:, None] + depth).clamp(0, cos.shape[0] - 1)
    turn = cos[position][:, :, None], sin[position][:, :, None]

    rotated = (size.q_heads, size.kv_heads)
    qk, v = qkv.view(*depth.shape, -1, size.head_dim).split((sum(rotated), size.kv_heads), 2)
    if q_norm is not None:
        q, k = qk.split(rotated, 2)
        qk = torch.cat((rms_norm_ref(q, q_norm, eps), rms_norm_ref(k, k_norm, eps)), 2)
    q, k = rotate_ref(qk, *turn).split(rotated, 2)

    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    for request, (slots, rows) in enumerate(placed):
        k_cache[request][:, slots] = k[request, rows].transpose(0, 1)
        v_cache[request][:, slots] = v[request, rows].transpose(0, 1)
        out[request, rows] = q[request, rows]
    return out


def _counts(size: _Geometry, num_rows: torch.Tensor | None) -> list[int]:
    if num_rows is None:
        return [size.nodes] * size.batch
    return [min(max(count, 0), size.nodes) for count in num_rows.tolist()]


def _placed(
    size: _Geometry,
    positions: int,
    depth: torch.Tensor,
    cache_seqlens: torch.Tensor,
    num_rows: torch.Tensor | None,
) -> list[tuple[slice, slice] | tuple[list[int], list[int]]]:
    """Slots and rows of every request's rows that have a place, as indices."""
    placed = []
    requests = zip(_counts(size, num_rows), cache_seqlens.tolist(), depth.tolist(), strict=True)
    for count, start, depths in requests:
        rows = [
            row
            for row, deep in enumerate(depths[:count])
            if 0 <= start + row < size.slots and 0 <= start + deep < positions
        ]
        if len(rows) == count:
            placed.append((slice(start, start + count) if count else slice(0), slice(count)))
        else:
            placed.append(([start + row for row in rows], rows))
    return placed


def _check_placed(
    placed: list[tuple],
    size: _Geometry,
    depth: torch.Tensor,
    cache_seqlens: torch.Tensor,
    num_rows: torch.Tensor | None,
) -> None:
    counts = _counts(size, num_rows)
    for request, (_, rows) in enumerate(placed):
        if isinstance(rows, slice):
            continue
        row = min(set(range(counts[request])) - set(rows))
        start = int(cache_seqlens[request])
        raise ValueError(
            f"rope_append: row {row} of request {request} has slot {start + row} and position "
            f"{start + int(depth[request, row])}; the cache has {size.slots} slots"
        )


def _empty(qkv: torch.Tensor, *inputs: torch.Tensor | float | None) -> torch.Tensor:
    size = _geometry(qkv, inputs[2], inputs[4])
    return qkv.new_empty((size.batch, size.nodes, size.q_heads, size.head_dim))


def _triton(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    depth: torch.Tensor,
    cache_seqlens: torch.Tensor,
    k_cache: torch.Tensor,
    *rest: torch.Tensor | float | None,
) -> torch.Tensor:
    inputs = (qkv, cos, sin, depth, cache_seqlens, k_cache, *rest)
    out = _empty(*inputs)
    launch_rope_append(*inputs, out=out)
    return out


def _check_cache(qkv: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> None:
    op, shape, strides = "rope_append", k_cache.shape, k_cache.stride()
    if len(shape) != 4 or 0 in shape or shape[3] % 2:
        raise ValueError(
            f"{op}: k_cache has shape {list(shape)}, expected [B, H_kv, S, D] with D even"
        )
    if strides[3] != 1 or any(stride % shape[3] for stride in strides[:3]):
        raise ValueError(
            f"{op}: k_cache has strides {strides}, expected contiguous rows of D = {shape[3]} at "
            "multiples of D"
        )
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        same = cache.shape == shape and cache.stride() == strides
        if not same or cache.dtype != qkv.dtype or cache.device != qkv.device:
            raise ValueError(
                f"{op}: {name} is {cache.dtype} {list(cache.shape)} with strides {cache.stride()} "
                f"on {cache.device}, expected {qkv.dtype} {list(shape)} with strides {strides} on "
                f"{qkv.device}"
            )


def _check(
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
) -> torch.device:
    op, device, dtype = "rope_append", qkv.device, qkv.dtype
    _check_cache(qkv, k_cache, v_cache)
    batch, kv_heads, slots, head_dim = k_cache.shape
    if depth.dim() != 2 or depth.shape[0] != batch or not depth.shape[1]:
        raise ValueError(f"{op}: depth has shape {list(depth.shape)}, expected [{batch}, N]")
    rows = depth.numel()
    width = qkv.shape[1] if qkv.dim() == 2 else 0
    if (
        qkv.dim() != 2
        or qkv.shape[0] != rows
        or width % head_dim
        or width <= 2 * kv_heads * head_dim
    ):
        raise ValueError(
            f"{op}: qkv has shape {list(qkv.shape)}, expected [{rows}, (H_q + {2 * kv_heads}) * "
            f"{head_dim}] with H_q >= 1"
        )
    check_tensor(op, "qkv", qkv, qkv.shape, FLOATS, device)
    if cos.dim() != 2 or cos.shape[0] < slots:
        raise ValueError(
            f"{op}: cos has shape {list(cos.shape)}, expected [P, {head_dim}] with P >= {slots}, "
            "a position for every slot of the cache"
        )
    for name, table in (("cos", cos), ("sin", sin)):
        check_tensor(op, name, table, (cos.shape[0], head_dim), (dtype,), device)
    check_tensor(op, "depth", depth, depth.shape, (torch.int32,), device)
    check_tensor(op, "cache_seqlens", cache_seqlens, (batch,), (torch.int32,), device)
    if num_rows is not None:
        check_tensor(op, "num_rows", num_rows, (batch,), (torch.int32,), device)
    if (q_norm is None) != (k_norm is None):
        raise ValueError(f"{op}: q_norm and k_norm are given together or not at all")
    for name, weight in (("q_norm", q_norm), ("k_norm", k_norm)):
        if weight is not None:
            check_tensor(op, name, weight, (head_dim,), (dtype,), device)
    if not eps >= 0:
        raise ValueError(f"{op}: eps is {eps}, expected a number >= 0")
    return device


_OP = register(
    "rope_append",
    "(Tensor qkv, Tensor cos, Tensor sin, Tensor depth, Tensor cache_seqlens, Tensor(a!) k_cache,"
    " Tensor(b!) v_cache, Tensor? num_rows, Tensor? q_norm, Tensor? k_norm, float eps, str backend)"
    " -> Tensor",
    check=_check,
    fake=_empty,
    torch=rope_append_ref,
    triton=_triton,
)


def rope_append(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    depth: torch.Tensor,
    cache_seqlens: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    num_rows: torch.Tensor | None = None,
    *,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 1e-6,
    backend: str = "auto",
) -> torch.Tensor:
    """Rotated queries of N new rows a request; their rotated keys and values go into the cache.

    Args:
        qkv: [B * N, (H_q + 2 H_kv) * D] float32, float16 or bfloat16, the heads of q, then of k,
            then of v; biases are in it already.
        cos, sin: [P, D], dtype of qkv, by position, P >= S; see `rope_table`.
        depth: [B, N] int32 from `tree_mask`; a chain, such as a prompt, has depth = row.
        cache_seqlens: [B] int32, committed rows of each request.
        k_cache, v_cache: [B, H_kv, S, D], dtype of qkv, changed in place. Same strides, whole
            multiples of D; D is even and contiguous.
        num_rows: [B] int32, rows of each request, the rest is padding; None means N.
        q_norm, k_norm: [D], weights of the RMSNorm of each head, or neither.
        eps: of that norm.
        backend: see `xspec_kernels`.

    Returns:
        [B, N, H_q, D]; 0 in rows that are padding or have no place in the cache.

    Raises:
        ValueError: a shape, stride, dtype or device is wrong or, for Triton, a tensor is not
            aligned to 16 bytes. On CPU tensors also where a row does not fit the cache, before
            anything is written (except under Triton's interpreter).
    """
    return _OP(
        qkv, cos, sin, depth, cache_seqlens, k_cache, v_cache, num_rows, q_norm, k_norm, eps,
        backend,
    )  # fmt: skip
