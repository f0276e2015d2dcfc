"""tree_attention: N new rows over the committed KV cache and, of each other, their own ancestors.

What a row gets must not depend on the round that computes it, so a key's place in the arithmetic
is a function of (row position p, key position) alone. With W columns in `path_slot`, the row's far
end is f = 32 * max(0, (p - W + 1) // 32):

    far    keys [0, f): always committed, since depths stay below W; whole 32-key tiles on the
           matrix unit, in splits of 256 keys by absolute position
    near   keys [f, p], at most W + 31: gathered along the row's own path, in position order
    merge  the far splits ascending, then the near part

Slots, siblings, N and the place where the round began do not occur in it. Rows of one tree differ
in f by a tile; a row that does not use a tile keeps its state. Published kernels split keys into
cached and new ones instead, which changes the rounding of a token with the round it falls in.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from xspec_kernels import _dispatch
from xspec_kernels.kernels import _tree_attention_triton as _kernels
from xspec_kernels.kernels._product import check_alignment
from xspec_kernels.kernels._tree_attention_exact import attend_exact
from xspec_kernels.kernels.kv_commit import check_caches
from xspec_kernels.workspace import Workspace

HEAD_DIMS = (32, 64, 128, 256)
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def tree_attention_ref(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    depth: torch.Tensor,
    path_slot: torch.Tensor,
    cache_seqlens: torch.Tensor,
    num_rows: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """The definition: fp32 softmax over the committed keys and the row's own path."""
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    lengths = _lengths(q, cache_seqlens, num_rows)
    return _each(_attend, lengths, q, k_cache, v_cache, depth, path_slot, factor)


def _each(
    attend: Callable[..., torch.Tensor],
    lengths: list[tuple[int, int]],
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    depth: torch.Tensor,
    path_slot: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """`attend` on the real rows of every request, zero elsewhere."""
    out = torch.zeros_like(q)
    for b, (n, rows) in enumerate(lengths):
        if rows:
            tables = depth[b, :rows], path_slot[b, :rows]
            out[b, :rows] = attend(q[b, :rows], k_cache[b], v_cache[b], *tables, n, scale)
    return out


def _lengths(
    q: torch.Tensor, cache_seqlens: torch.Tensor, num_rows: torch.Tensor | None
) -> list[tuple[int, int]]:
    """(committed rows, rows of the tree) of every request, on the host."""
    batch, nodes = q.shape[:2]
    rows = [nodes] * batch if num_rows is None else num_rows.clamp(0, nodes).tolist()
    return list(zip(cache_seqlens.tolist(), rows, strict=True))


def _attend(q, k, v, depth, path_slot, n: int, scale: float) -> torch.Tensor:
    """One request: q [R, H_q, D], k and v [H_kv, S, D], tables of the R rows."""
    rows, heads, head_dim = q.shape
    kv_heads = k.shape[0]
    own = torch.arange(path_slot.shape[1], device=q.device) <= depth[:, None]
    slot = n + torch.where(own, path_slot, 0)
    query = q.float().view(rows, kv_heads, -1, head_dim).transpose(0, 1) * scale
    packed = query.flatten(1, 2)

    past = packed @ k[:, :n].float().transpose(1, 2)
    fresh = query @ k[:, slot].float().transpose(2, 3)
    fresh = fresh.masked_fill(~own[:, None, :], -torch.inf)
    weights = torch.cat([past.view(*query.shape[:3], n), fresh], -1).softmax(-1)
    value = torch.where(own[:, :, None], v[:, slot].float(), 0.0)
    mixed = weights[..., :n].flatten(1, 2) @ v[:, :n].float()
    out = mixed.view_as(query) + weights[..., n:] @ value
    return out.transpose(0, 1).reshape(rows, heads, head_dim)


def _torch(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    depth: torch.Tensor,
    path_slot: torch.Tensor,
    cache_seqlens: torch.Tensor,
    num_rows: torch.Tensor | None,
    scratch: torch.Tensor | None,
    scale: float,
    max_seqlen: int,
) -> torch.Tensor:
    lengths = _lengths(q, cache_seqlens, num_rows)
    if q.device.type == "cpu":
        _check_values(lengths, depth, path_slot, k_cache.shape[2], max_seqlen)
    attend = attend_exact if _dispatch.exact() else _attend
    return _each(attend, lengths, q, k_cache, v_cache, depth, path_slot, scale)


def _check_values(
    lengths: list[tuple[int, int]],
    depth: torch.Tensor,
    path_slot: torch.Tensor,
    slots: int,
    max_seqlen: int,
) -> None:
    nodes, width = path_slot.shape[1:]
    for request, (n, rows) in enumerate(lengths):
        if not 0 <= n <= max_seqlen or n + rows > slots:
            raise ValueError(
                f"tree_attention: request {request} has {n} committed and {rows} new rows, "
                f"expected at most max_seqlen = {max_seqlen} committed and {slots} in all"
            )
        depths, paths = depth[request, :rows], path_slot[request, :rows]
        own = torch.arange(width) <= depths[:, None]
        bad = (depths < 0) | (depths >= width) | (own & ((paths < 0) | (paths >= nodes))).any(1)
        if bad.any():
            row = int(bad.nonzero()[0])
            raise ValueError(
                f"tree_attention: row {row} of request {request} has depth {int(depths[row])} and "
                f"path {paths[row].tolist()}, expected a depth in 0..{width - 1} and as many "
                f"ancestors in 0..{nodes - 1} as tree_mask gives"
            )


def _check(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    depth: torch.Tensor,
    path_slot: torch.Tensor,
    cache_seqlens: torch.Tensor,
    num_rows: torch.Tensor | None,
    scratch: torch.Tensor | None,
    scale: float,
    max_seqlen: int,
) -> torch.device:
    op, device = "tree_attention", q.device
    _dispatch.check_nodes(op, "depth", depth)
    batch, nodes = depth.shape
    int32 = (torch.int32,)
    _dispatch.check_tensor(op, "depth", depth, (batch, nodes), int32, device)
    width = path_slot.shape[-1] if path_slot.dim() == 3 else 0
    if width not in (32, 64):
        raise ValueError(
            f"{op}: path_slot has shape {list(path_slot.shape)}, expected [{batch}, {nodes}, 32] "
            f"or [{batch}, {nodes}, 64]"
        )
    _dispatch.check_tensor(op, "path_slot", path_slot, (batch, nodes, width), int32, device)
    _dispatch.check_tensor(op, "cache_seqlens", cache_seqlens, (batch,), int32, device)
    if num_rows is not None:
        _dispatch.check_tensor(op, "num_rows", num_rows, (batch,), int32, device)
    if q.dim() != 4 or 0 in q.shape:
        raise ValueError(
            f"{op}: q has shape {list(q.shape)}, expected [{batch}, {nodes}, H_q, D] without 0"
        )
    _dispatch.check_tensor(op, "q", q, (batch, nodes, *q.shape[2:]), _DTYPES, device)
    _check_caches(q, k_cache, v_cache)
    if not 0 <= max_seqlen <= k_cache.shape[2]:
        raise ValueError(f"{op}: max_seqlen is {max_seqlen}, expected 0..{k_cache.shape[2]}")
    if scratch is not None:
        floats = _kernels.scratch_floats(q, max_seqlen)
        _dispatch.check_tensor(op, "scratch", scratch, (floats,), (torch.float32,), device)
    return device


def _check_caches(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> None:
    op, (batch, _, heads, head_dim) = "tree_attention", q.shape
    check_caches(op, [k_cache, v_cache], batch, q.device)
    shape, strides = k_cache.shape, k_cache.stride()
    if shape[3] != head_dim or heads % shape[1] or k_cache.dtype != q.dtype:
        raise ValueError(
            f"{op}: the caches are {k_cache.dtype} {list(shape)}, expected {q.dtype} "
            f"[{batch}, H_kv, S, {head_dim}] with H_kv a divisor of {heads}"
        )
    if any(n > 1 and step % head_dim for n, step in zip(shape[:3], strides[:3], strict=True)):
        raise ValueError(
            f"{op}: the caches have strides {strides}, expected whole multiples of {head_dim}"
        )


def _triton(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, *rest) -> torch.Tensor:
    if q.shape[3] not in HEAD_DIMS:
        raise ValueError(
            f"tree_attention: the Triton kernel takes head sizes {HEAD_DIMS}, got {q.shape[3]}; "
            "pad q, k and v with zeros and give the scale of the true size"
        )
    for name, tensor in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        # Another alignment would be another cubin, and with it perhaps other bits.
        check_alignment("tree_attention", name, tensor)
    return _kernels.run(q, k_cache, v_cache, *rest)


def _fake(q: torch.Tensor, *rest) -> torch.Tensor:
    return torch.empty_like(q)


_OP = _dispatch.register(
    "tree_attention",
    "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor depth, Tensor path_slot,"
    " Tensor cache_seqlens, Tensor? num_rows, Tensor(a!)? scratch, float scale, int max_seqlen,"
    " str backend) -> Tensor",
    check=_check,
    fake=_fake,
    torch=_torch,
    triton=_triton,
)


def tree_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    depth: torch.Tensor,
    path_slot: torch.Tensor,
    cache_seqlens: torch.Tensor,
    num_rows: torch.Tensor | None = None,
    *,
    scale: float | None = None,
    max_seqlen: int | None = None,
    workspace: Workspace | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Attention of a draft tree's rows over the committed keys and their own ancestors.

    Plain decoding is the tree of one row: the same kernel, and for a given position and path the
    same bits. On torch that holds under XSPEC_EXACT=1.

    Args:
        q: [B, N, H_q, D] fp32, fp16 or bf16, N <= 64; the Triton kernel takes D 32, 64, 128, 256.
        k_cache, v_cache: [B, H_kv, S, D] of q's dtype and with one set of strides: D contiguous,
            the others whole multiples of D. Rows [0, cache_seqlens[b]) are committed and the tree's
            rows lie at slots cache_seqlens[b] + row; no other slot is read.
        depth: [B, N] int32 from `tree_mask`.
        path_slot: [B, N, W] int32 from `tree_mask`, W 32 or 64. W is part of the arithmetic: two
            calls agree bit for bit only under one W.
        cache_seqlens: [B] int32.
        num_rows: [B] int32, real rows of each request; None means N.
        scale: of the scores; None means D ** -0.5.
        max_seqlen: upper bound of cache_seqlens, which sizes the grid and the workspace and does
            not touch the result; None means S.
        workspace: buffers to reuse; None takes a fresh one.
        backend: see `xspec_kernels`; there is no CUDA C++ kernel.

    Returns:
        [B, N, H_q, D] of q's dtype; rows from num_rows on are zero. On a GPU, where a check of
        values would wait for the device, a request that exceeds S or max_seqlen gives NaN.

    Raises:
        ValueError: a shape, stride, dtype or device is wrong; on CPU tensors also for lengths that
            exceed S or max_seqlen and for tables out of range (not under Triton's interpreter).
    """
    for name, tensor, wanted in (
        ("q", q, "[B, N, H_q, D]"), ("k_cache", k_cache, "[B, H_kv, S, D]"),
    ):  # fmt: skip
        if tensor.dim() != 4 or not tensor.shape[3]:
            raise ValueError(
                f"tree_attention: {name} has shape {list(tensor.shape)}, expected {wanted} with "
                "D >= 1"
            )
    bound = k_cache.shape[2] if max_seqlen is None else max_seqlen
    scratch = None
    if workspace is not None:
        floats = _kernels.scratch_floats(q, bound)
        scratch = workspace.buffer("attention.partial", (floats,), torch.float32)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    return _OP(
        q, k_cache, v_cache, depth, path_slot, cache_seqlens, num_rows, scratch, factor, bound,
        backend,
    )  # fmt: skip
