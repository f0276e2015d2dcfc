"""The law of `sample_tokens` as Triton functions over one row, read block by block.

Constants are float32 numbers. They make e^x from float32 operations that round one by one, which
`enable_fp_fusion=False` keeps the compiler from fusing.
"""

from __future__ import annotations

from ctypes import c_float
from typing import TYPE_CHECKING

import torch

from xspec_kernels._triton import jit, launch, tl, triton

if TYPE_CHECKING:
    from xspec_kernels.kernels.sample_tokens import Law

# From here on below the best score, a weight is 0 for certain: e^-30 is less than 2^-43.
CUTOFF = 30.0
LOG2E = c_float(1.4426950408889634).value
# ln 2 in two parts; up to 43 times the first one is exact.
LN2_HI = 0.693359375
LN2_LO = c_float(-2.121944400546905827e-4).value
# 1 / 7! ... 1 / 0!
TAYLOR = tuple(c_float(1 / n).value for n in (5040, 720, 120, 24, 6, 2, 1, 1))
# Exponent of 2^40 as float32 stores it.
ONE_BITS = 127 + 40

_CUTOFF, _LOG2E, _LN2_HI, _LN2_LO, _ONE_BITS = (
    (tl.constexpr(x) for x in (CUTOFF, LOG2E, LN2_HI, LN2_LO, ONE_BITS)) if tl else [None] * 5
)
_T7, _T6, _T5, _T4, _T3, _T2 = map(tl.constexpr, TAYLOR[:6]) if tl else [None] * 6
# Tokens a program looks at at once, and how many of them one thread has.
BLOCK, SHARE = 8192, 16


@jit()
def row_scores(logits, first, inverse, V: tl.constexpr, BLOCK: tl.constexpr):
    """Scores of the tokens from `first` on; -inf past the vocabulary and for NaN."""
    i = first + tl.arange(0, BLOCK)
    x = tl.load(logits + i, mask=i < V, other=float("-inf")).to(tl.float32) * inverse
    return tl.where(x == x, x, float("-inf"))


@jit()
def row_best(logits, inverse, V: tl.constexpr, BLOCK: tl.constexpr):
    """(the largest score, whether the row has a law)."""
    best = float("-inf")
    damaged = 0
    for first in range(0, V, BLOCK):
        i = first + tl.arange(0, BLOCK)
        x = tl.load(logits + i, mask=i < V, other=float("-inf")).to(tl.float32) * inverse
        damaged = tl.maximum(damaged, tl.max((x != x).to(tl.int32), 0))
        best = tl.maximum(best, tl.max(tl.where(x == x, x, float("-inf")), 0))
    finite = (best > float("-inf")) & (best < float("inf"))
    return best, finite & (damaged == 0)


@jit()
def token_weights(scores, best):
    """int64 floor(2^40 e^(scores - best)), for scores up to `best`."""
    distance = tl.minimum(best - scores, _CUTOFF)
    halvings = (distance * _LOG2E + 0.5).to(tl.int32)
    whole = halvings.to(tl.float32)
    x = (whole * _LN2_HI - distance) + whole * _LN2_LO
    power = x * _T7 + _T6
    power = power * x + _T5
    power = power * x + _T4
    power = power * x + _T3
    power = power * x + _T2
    power = power * x + 1.0
    power = power * x + 1.0
    scale = ((-halvings + _ONE_BITS) << 23).to(tl.float32, bitcast=True)
    return (power * scale).to(tl.int64)


@jit()
def kept_mass(logits, best, least, inverse, V: tl.constexpr, BLOCK: tl.constexpr):
    """Sum of the weights of scores from `least` up."""
    total = tl.zeros((), tl.int64)
    for first in range(0, V, BLOCK):
        s = row_scores(logits, first, inverse, V, BLOCK)
        total += tl.sum(tl.where(s >= least, token_weights(s, best), 0), 0)
    return total


@jit()
def largest_threshold(
    logits, best, floor, need, inverse, COUNT: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr
):
    """The largest score v such that scores >= v weigh (COUNT: number) at least `need`, or the
    smallest one from `floor` up where they all together do not.
    """
    low = float("inf")
    for first in range(0, V, BLOCK):
        s = row_scores(logits, first, inverse, V, BLOCK)
        low = tl.minimum(low, tl.min(tl.where(s >= floor, s, float("inf")), 0))
    high = best
    # Both ends are scores of the row, and every turn moves one of them at least.
    while low < high:
        middle = low + (high - low) * 0.5
        middle = tl.where(middle < high, middle, low)
        above = tl.zeros((), tl.int64)
        least_above = float("inf")
        most_below = float("-inf")
        for first in range(0, V, BLOCK):
            s = row_scores(logits, first, inverse, V, BLOCK)
            upper = (s > middle) & (s <= high)
            lower = (s >= low) & (s <= middle)
            if COUNT:
                above += tl.sum(upper.to(tl.int64), 0)
            else:
                above += tl.sum(tl.where(upper, token_weights(s, best), 0), 0)
            least_above = tl.minimum(least_above, tl.min(tl.where(upper, s, float("inf")), 0))
            most_below = tl.maximum(most_below, tl.max(tl.where(lower, s, float("-inf")), 0))
        enough = above >= need
        low = tl.where(enough, least_above, low)
        high = tl.where(enough, high, most_below)
        need = tl.where(enough, need, need - above)
    return low


@jit()
def row_law(
    logits,
    best,
    inverse,
    top_k,
    top_p,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(the least score that is kept, the mass of those kept)."""
    # Below the cutoff all weights are 0, kept or not.
    least = best - _CUTOFF
    if TOP_K:
        need = tl.zeros((), tl.int64) + top_k
        least = largest_threshold(logits, best, least, need, inverse, True, V, BLOCK)
    total = kept_mass(logits, best, least, inverse, V, BLOCK)
    if TOP_P:
        share = total.to(tl.float64) * tl.full((), top_p, tl.float64)
        need = share.to(tl.int64)
        need = tl.maximum(need + (need.to(tl.float64) < share).to(tl.int64), 1)
        least = largest_threshold(logits, best, least, need, inverse, False, V, BLOCK)
        total = kept_mass(logits, best, least, inverse, V, BLOCK)
    return least, total


@jit()
def aim(uniform, total):
    """The running sum that a token has to exceed."""
    return tl.minimum(tl.maximum((uniform * total.to(tl.float64)).to(tl.int64), 0), total - 1)


@jit()
def block_passed(before, weights, target):
    """(sum of what came before and this block, its tokens whose running sum is up to `target`)."""
    running = before + tl.cumsum(weights, 0)
    return before + tl.sum(weights, 0), tl.sum((running <= target).to(tl.int32), 0)


@jit(do_not_specialize=["N", "top_k"])
def _sample_tokens_kernel(
    logits,  # [B * N, V]
    uniforms,  # [B * N] fp64
    num_rows,  # [B] int32 or None
    ids,  # [B * N] int64
    N,
    inverse,
    top_k,
    top_p,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    rows = N
    if num_rows is not None:
        rows = tl.load(num_rows + row // N)
    if row % N >= rows:
        tl.store(ids + row, -1)
        return
    logits += row * V
    best, valid = row_best(logits, inverse, V, BLOCK)
    if not valid:
        tl.store(ids + row, -1)
        return
    least, total = row_law(logits, best, inverse, top_k, top_p, TOP_K, TOP_P, V, BLOCK)
    target = aim(tl.load(uniforms + row), total)
    before = tl.zeros((), tl.int64)
    token = tl.zeros((), tl.int32)
    for first in range(0, V, BLOCK):
        if before <= target:
            s = row_scores(logits, first, inverse, V, BLOCK)
            weights = tl.where(s >= least, token_weights(s, best), 0)
            before, passed = block_passed(before, weights, target)
            token += passed
    tl.store(ids + row, token.to(tl.int64))


def options(vocab: int, law: Law, block: int, share: int) -> dict:
    """Constants of a launch whose programs look at up to `block` tokens, `share` a thread."""
    block = min(block, triton.next_power_of_2(vocab))
    return {
        "TOP_K": law.top_k > 0,
        "TOP_P": law.top_p < 1,
        "V": vocab,
        "BLOCK": block,
        "num_warps": max(1, block // (32 * share)),
        "enable_fp_fusion": False,
    }


def launch_sample(
    logits: torch.Tensor,
    uniforms: torch.Tensor,
    num_rows: torch.Tensor | None,
    ids: torch.Tensor,
    nodes: int,
    law: Law,
) -> None:
    """Fill `ids` from logits [..., V]; of every `nodes` rows those from num_rows on get -1."""
    vocab = logits.shape[-1]
    launch(
        _sample_tokens_kernel, (ids.numel(),), logits.device, logits, uniforms, num_rows, ids,
        nodes, law.inverse, law.top_k, law.top_p, **options(vocab, law, BLOCK, SHARE),
    )  # fmt: skip
