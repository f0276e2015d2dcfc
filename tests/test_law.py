"""The law of attention without a GPU: plain decoding, a chain and any tree give the same bits.

The kernel's order of operations is emulated on the CPU: a matrix instruction adds 16 exact products
and the accumulator with one rounding, every other operation rounds once, and sums over a tile are
butterflies, so that the lane of a key matters. Three designs that break the law stay here as
mutants, since a test that lets them pass shows nothing:

    lse_tail       committed keys in splits, the round's keys in one masked tile, a merge
    bfs_tiles      tiles by slot, siblings masked with -inf
    sliding_tile   the far end taken from where the round began
"""

from __future__ import annotations

import math

import pytest
import torch

from attention_cases import random_round, violations
from xspec_kernels.kernels.tree_attention import tree_attention, tree_attention_ref

T, S, D = 32, 256, 32
SCALE = torch.tensor(D**-0.5 * math.log2(math.e))
POWERS = [math.log(2) ** i / math.factorial(i) for i in range(6, -1, -1)]
EDGES = [0, 1, 31, 32, 33, 62, 63, 64, 95, 96, 223, 225, 255, 256, 257, 287, 288, 319, 320]
FAR_EDGES = [511, 512, 513, 543, 544, 576]


def exp2(x: torch.Tensor) -> torch.Tensor:
    """From single fp32 operations: torch.exp2 differs between vector lanes and the remainder."""
    x = x.clamp(min=-127.0)
    whole = x.round()
    y = torch.full_like(x, POWERS[0])
    for power in POWERS[1:]:
        y = y * (x - whole) + power
    return y * ((whole.int() + 127) << 23).view(torch.float32)


def mma(acc: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """acc + a @ b; fp64 holds 16 products of bf16 numbers and their sum."""
    for g in range(0, a.shape[-1], 16):
        acc = (acc.double() + a[:, g : g + 16].double() @ b[g : g + 16].double()).float()
    return acc


def butterfly(x: torch.Tensor) -> torch.Tensor:
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        x = x[..., :half] + x[..., half:]
    return x[..., 0]


def empty(rows: int) -> tuple[torch.Tensor, ...]:
    return torch.full((rows,), -math.inf), torch.zeros(rows), torch.zeros(rows, D)


def keep(use, new, old):
    pairs = zip(new, old, strict=True)
    return tuple(torch.where(use[:, None] if a.dim() > 1 else use, a, b) for a, b in pairs)


def tile_step(state, q, k, v, use, live=None):
    """One tile of keys; rows without `use` keep their state, `live` masks single keys."""
    m, weight, acc = state
    s = mma(torch.zeros(len(q), len(k)), q, k.T) * SCALE
    if live is not None:
        s = s.masked_fill(~live, -math.inf)
    m_new = torch.maximum(m, s.amax(-1))
    use = use & (m_new > -math.inf)
    finite = torch.where(use, m_new, 0.0)
    alpha, w = exp2(m - finite), exp2(s - finite[:, None])
    summed = mma(acc * alpha[:, None], w.bfloat16().float(), v)
    return keep(use, (m_new, weight * alpha + butterfly(w), summed), state)


def key_step(state, q, k, v, use):
    """One key per row: k, v [R, D]."""
    m, weight, acc = state
    s = butterfly(q * k) * SCALE
    m_new = torch.maximum(m, s)
    alpha, w = exp2(m - m_new), exp2(s - m_new)
    return keep(use, (m_new, weight * alpha + w, acc * alpha[:, None] + w[:, None] * v), state)


def merge(parts) -> torch.Tensor:
    top = torch.stack([m for m, _, _ in parts]).amax(0)
    weight, acc = torch.zeros_like(top), torch.zeros(len(top), D)
    for m, part_weight, part in parts:
        w = exp2(m - top)
        weight, acc = weight + w * part_weight, acc + w[:, None] * part
    return acc / weight[:, None]


def single_head(attention):
    """Of [R, 1, D] queries and [n + R, 1, D] keys, with tables as int64."""

    def run(q, k, v, n, depth, path):
        return attention(q[:, 0], k[:, 0], v[:, 0], n, depth.long(), path.long())[:, None]

    return run


def far_and_near(q, k, v, n, depth, path, end):
    """Tiles below each row's far end, then its own path from there on, key by key."""
    p, width = n + depth, path.shape[1]
    parts, high = [], int(end.max())
    for low in range(0, high, S):
        state = empty(len(q))
        for t in range(low, min(low + S, high), T):
            state = tile_step(state, q, k[t : t + T], v[t : t + T], t < end)
        parts.append(state)
    state = empty(len(q))
    for step in range(int((p - end).max()) + 1):
        position = end + step
        use = position <= p
        own = path.gather(1, (position - n).clamp(0, width - 1)[:, None])[:, 0]
        slot = torch.where(use, torch.where(position < n, position, n + own), 0)
        state = key_step(state, q, k[slot], v[slot], use)
    return merge([*parts, state])


@single_head
def option_r(q, k, v, n, depth, path):
    end = (n + depth - path.shape[1] + 1).clamp(min=0) // T * T
    return far_and_near(q, k, v, n, depth, path, end)


def padded(x: torch.Tensor, rows: int) -> torch.Tensor:
    return torch.cat([x, torch.zeros(rows - len(x), D)])


def on_path(depth: torch.Tensor, path: torch.Tensor, columns: int) -> torch.Tensor:
    live = torch.zeros(len(depth), columns, dtype=torch.bool)
    for row, count in enumerate(depth.tolist()):
        live[row, path[row, : count + 1]] = True
    return live


def in_tiles(q, k, v, live) -> list:
    """Splits of whole tiles over keys that are masked one by one."""
    size = -(-len(k) // T) * T
    k, v, live = padded(k, size), padded(v, size), padded_mask(live, size)
    everyone, parts = torch.ones(len(q), dtype=torch.bool), []
    for low in range(0, size, S):
        state = empty(len(q))
        for t in range(low, min(low + S, size), T):
            tile = slice(t, t + T)
            state = tile_step(state, q, k[tile], v[tile], everyone, live[:, tile])
        parts.append(state)
    return parts


def padded_mask(live: torch.Tensor, columns: int) -> torch.Tensor:
    return torch.nn.functional.pad(live, (0, columns - live.shape[1]))


@single_head
def lse_tail(q, k, v, n, depth, path):
    everyone = torch.ones(len(q), dtype=torch.bool)
    parts = in_tiles(q, k[:n], v[:n], everyone[:, None].expand(-1, n)) if n else []
    tail = [padded(x[n:], 64) for x in (k, v)]
    live = on_path(depth, path, 64)
    return merge([*parts, tile_step(empty(len(q)), q, *tail, everyone, live)])


@single_head
def bfs_tiles(q, k, v, n, depth, path):
    live = torch.cat([torch.ones(len(q), n, dtype=torch.bool), on_path(depth, path, len(q))], 1)
    return merge(in_tiles(q, k, v, live))


@single_head
def sliding_tile(q, k, v, n, depth, path):
    return far_and_near(q, k, v, n, depth, path, torch.full_like(depth, n // T * T))


def exact_op(q, k, v, n, depth, path) -> torch.Tensor:
    """The op on caches whose other slots hold NaN."""
    caches = [torch.full((1, x.shape[1], len(x) + 5, D), math.nan) for x in (k, v)]
    for cache, x in zip(caches, (k, v), strict=True):
        cache[0, :, : len(x)] = x.transpose(0, 1)
    seqlens = torch.tensor([n], dtype=torch.int32)
    return tree_attention(q[None], *caches, depth[None], path[None], seqlens, backend="torch")[0]


@pytest.mark.parametrize("n", EDGES + FAR_EDGES)
def test_emulated_kernel_holds_the_law(n, rng):
    assert violations(option_r, random_round(rng, n, 24), rng) == 0


def test_every_residue_of_a_tile(rng):
    lengths = range(250, 250 + T + 1)
    rounds = ((n, random_round(rng, n, 20)) for n in lengths)
    assert [n for n, whole in rounds if violations(option_r, whole, rng, nodes=2)] == []


@pytest.mark.parametrize("n", [0, 1, 63, 95, 96, 300])
def test_wide_window_holds_the_law(n, rng):
    whole = random_round(rng, n, 64, max_depth=64)
    assert violations(option_r, whole, rng, width=64, nodes=4) == 0


@pytest.mark.parametrize("mutant", [lse_tail, bfs_tiles, sliding_tile])
def test_design_that_breaks_the_law_is_rejected(mutant, rng):
    rounds = [random_round(rng, n, 32) for n in (60, 90, 250, 310)]
    broken = sum(violations(mutant, whole, rng, nodes=8, garbage=None) for whole in rounds)
    assert broken >= 8, f"{broken} of 32 rows: too few to be noticed"


def test_emulated_kernel_computes_attention(rng):
    whole = random_round(rng, 300, 32)
    depth, path = whole.tree.tables(32)
    k, v = (x.transpose(0, 1)[None] for x in (whole.k, whole.v))
    want = tree_attention_ref(
        whole.q[None], k, v, depth[None], path[None], torch.tensor([300], dtype=torch.int32)
    )[0]
    for design in (option_r, lse_tail, bfs_tiles):
        assert (whole.run(design, 32) - want).abs().max() < 2e-3


@pytest.mark.parametrize("n", [*EDGES[::2], 512, 600])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(1, 1, 32), (6, 2, 32), (9, 3, 32)])
def test_exact_torch_holds_the_law(n, heads, kv_heads, head_dim, rng, monkeypatch):
    monkeypatch.setenv("XSPEC_EXACT", "1")
    whole = random_round(rng, n, 24, heads, kv_heads, head_dim, dtype=torch.float32)
    assert violations(exact_op, whole, rng) == 0


@pytest.mark.parametrize("n", [0, 64, 300])
def test_exact_torch_with_a_wide_window(n, rng, monkeypatch):
    monkeypatch.setenv("XSPEC_EXACT", "1")
    whole = random_round(rng, n, 64, 4, 2, max_depth=64, dtype=torch.float32)
    assert violations(exact_op, whole, rng, width=64) == 0


def test_fast_torch_makes_no_promise(rng, monkeypatch):
    monkeypatch.setenv("XSPEC_EXACT", "0")
    rounds = [random_round(rng, n, 24, 6, 2, dtype=torch.float32) for n in (60, 250, 310)]
    assert sum(violations(exact_op, whole, rng, garbage=None) for whole in rounds) > 0
