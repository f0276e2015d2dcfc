"""tree_attention in plain torch with bits that depend on (row position, key position) alone.

The roles are those of the kernel: far splits by absolute position, near keys by their distance from
the far end, a merge in order. Rounding is kept apart from the shape of the call: sums are halvings
of a fixed number of lanes, powers are single operations (torch's exp2 differs between vector lanes
and the remainder), and matrix products have one shape, 64 rows by one split, whatever N and the
length are. Then the bits of a row of a product do not depend on its place among the 64; that is a
property of the library, and the tests ask for it.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from xspec_kernels.kernels._tree_attention_triton import SPLIT, TILE

_ROWS = 64
_LOG2E = 1.4426950408889634
# 2**f on [-0.5, 0.5], Taylor coefficients of exp(f ln 2), highest first: error below 3e-8.
_POWERS = (1.540353e-4, 1.3333558e-3, 9.6181291e-3, 5.5504109e-2, 0.24022651, 0.69314718, 1.0)


def attend_exact(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    depth: torch.Tensor,
    path_slot: torch.Tensor,
    n: int,
    scale: float,
) -> torch.Tensor:
    """One request, [R, H_q, D] fp32: q [R, H_q, D], k and v [H_kv, S, D], tables of the R rows."""
    rows, heads, head_dim = q.shape
    kv_heads = k.shape[0]
    query = q.float().view(rows, kv_heads, -1, head_dim).transpose(0, 1)
    width = path_slot.shape[1]
    position = n + depth.long()
    end = (position - (width - 1)).clamp_min(0) // TILE * TILE
    scale = scale * _LOG2E
    parts = _far(query, k, v, end, scale)
    parts.append(_near(query, k, v, path_slot.long(), position, end, n, scale))
    top = torch.stack([m for m, _, _ in parts]).amax(0)
    weight, total = torch.zeros_like(top), torch.zeros_like(query)
    for m, part_weight, part in parts:
        factor = _exp2(m - top)
        weight = weight + factor * part_weight
        total = total + factor[..., None] * part
    return (total / weight[..., None]).transpose(0, 1).reshape(rows, heads, head_dim)


def _far(query, k, v, end, scale: float) -> list[tuple[torch.Tensor, ...]]:
    """(maximum, weight, sums) of every split, each [H_kv, R, G] or [H_kv, R, G, D]."""
    kv_heads, rows, group, head_dim = query.shape
    packed = rows * group
    fill = -packed % _ROWS
    blocks = pad(query.reshape(kv_heads, packed, head_dim), (0, 0, 0, fill)).split(_ROWS, 1)
    until = pad(end.repeat_interleave(group), (0, fill))
    parts = []
    for low in range(0, int(end.max()), SPLIT):
        high = min(low + SPLIT, int(end.max()))
        key, value = (pad(c[:, low:high].float(), (0, 0, 0, low + SPLIT - high)) for c in (k, v))
        live = torch.arange(low, low + SPLIT, device=end.device) < until[:, None]
        s = torch.cat([_products(block, key.transpose(1, 2)) for block in blocks], 1) * scale
        m, w, weight = _softmax_parts(s, live)
        total = torch.cat([_products(block, value) for block in w.split(_ROWS, 1)], 1)
        shape = (kv_heads, rows, group)
        parts.append(
            (
                m[:, :packed].reshape(shape),
                weight[:, :packed].reshape(shape),
                total[:, :packed].reshape(*shape, head_dim),
            )
        )
    return parts


def _products(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b head by head: every call is one product of one shape."""
    return torch.stack([torch.mm(left, right) for left, right in zip(a, b, strict=True)])


def _near(query, k, v, path_slot, position, end, n: int, scale: float):
    """(maximum, weight, sums) of keys [end, position], one lane for each distance from `end`."""
    width = path_slot.shape[1]
    at = end[:, None] + torch.arange(width + TILE - 1, device=end.device)
    use = at <= position[:, None]
    new = path_slot.gather(1, (at - n).clamp(0, width - 1))
    slot = torch.where(use, torch.where(at < n, at, n + new), 0)
    value = torch.where(use[:, :, None], v[:, slot].float(), 0.0)
    products = query[:, :, :, None, :] * k[:, slot].float()[:, :, None]
    s = _halve(products, -1) * scale
    m, w, weight = _softmax_parts(s, use[:, None, :])
    return m, weight, _halve(w[..., None] * value[:, :, None], -2)


def _softmax_parts(s: torch.Tensor, live: torch.Tensor):
    """Maximum, weights and their sum over the last dimension; lanes that are not live weigh 0."""
    s = torch.where(live, s, -torch.inf)
    m = s.amax(-1)
    w = _exp2(s - torch.where(m > -torch.inf, m, 0.0)[..., None])
    return m, w, _halve(w, -1)


def _halve(x: torch.Tensor, dim: int) -> torch.Tensor:
    """The sum over `dim` by adding its upper half to its lower one until one lane is left."""
    while (lanes := x.shape[dim]) > 1:
        half = lanes // 2
        folded = x.narrow(dim, 0, half) + x.narrow(dim, half, half)
        x = torch.cat([folded, x.narrow(dim, lanes - 1, 1)], dim) if lanes % 2 else folded
    return x.squeeze(dim)


def _exp2(x: torch.Tensor) -> torch.Tensor:
    """2**x for x <= 0, lane by lane; 0 from -127 down."""
    x = x.clamp_min(-127.0)
    whole = x.round()
    fraction = x - whole
    y = torch.full_like(x, _POWERS[0])
    for power in _POWERS[1:]:
        y = y * fraction + power
    return y * ((whole.int() + 127) << 23).view(torch.float32)
