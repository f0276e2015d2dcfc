"""Triton kernel of verify_sampling where drafts were drawn: one program walks a request's tree."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from xspec_kernels._triton import jit, launch, tl
from xspec_kernels.kernels._sampling_triton import (
    aim,
    block_passed,
    options,
    row_best,
    row_law,
    row_scores,
    token_weights,
)

if TYPE_CHECKING:
    from xspec_kernels.kernels.sample_tokens import Law
    from xspec_kernels.kernels.verify_greedy import VerifyResult

# As in _sampling_triton; a program has more to remember here.
BLOCK, SHARE = 4096, 8


@jit()
def _units(q):
    """Probabilities as int64 in units of 2^-40."""
    return (q * 1099511627776.0).to(tl.int64)


@jit()
def _scaled(values, factor):
    return (values.to(tl.float64) * factor).to(tl.int64)


@jit()
def _fill_law(
    logits, law, best, least, total, inverse, V: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Store the target's law of a row, int64 in units of 2^-40; returns its sum."""
    factor = 1099511627776.0 / total.to(tl.float64)
    mass = tl.zeros((), tl.int64)
    for first in range(0, V, BLOCK):
        i = first + tl.arange(0, BLOCK)
        s = row_scores(logits, first, inverse, V, BLOCK)
        p = _scaled(tl.where(s >= least, token_weights(s, best), 0), factor)
        tl.store(law + i, p, mask=i < V)
        mass += tl.sum(p, 0)
    tl.debug_barrier()
    return mass


@jit()
def _draft_mass(draft, V: tl.constexpr, BLOCK: tl.constexpr):
    mass = tl.zeros((), tl.int64)
    for first in range(0, V, BLOCK):
        i = first + tl.arange(0, BLOCK)
        mass += tl.sum(_units(tl.load(draft + i, mask=i < V, other=0.0)), 0)
    return mass


@jit()
def _reject(law, draft, token, mass, left, DRAWN, V: tl.constexpr, BLOCK: tl.constexpr):
    """Take a rejected token's draft law, or where it was not DRAWN the token, out of `law`;
    returns what is left.
    """
    # Every thread has read the token's own mass before one writes it.
    tl.debug_barrier()
    shrink = 1099511627776.0 / mass.to(tl.float64)
    grow = 1099511627776.0 / tl.maximum(left, 1).to(tl.float64)
    rest = tl.zeros((), tl.int64)
    for first in range(0, V, BLOCK):
        i = first + tl.arange(0, BLOCK)
        p = tl.load(law + i, mask=i < V, other=0)
        q = _scaled(_units(tl.load(draft + i, mask=i < V, other=0.0)), grow)
        p = tl.where(DRAWN, tl.maximum(_scaled(p, shrink) - q, 0), tl.where(i == token, 0, p))
        tl.store(law + i, p, mask=i < V)
        rest += tl.sum(p, 0)
    tl.debug_barrier()
    return rest


@jit()
def _draw(law, uniform, mass, V: tl.constexpr, BLOCK: tl.constexpr):
    target = aim(uniform, mass)
    before = tl.zeros((), tl.int64)
    token = tl.zeros((), tl.int32)
    for first in range(0, V, BLOCK):
        if before <= target:
            i = first + tl.arange(0, BLOCK)
            before, passed = block_passed(
                before, tl.load(law + i, mask=i < V, other=0), target
            )  # fmt: skip
            token += passed
    return token.to(tl.int64)


@jit(do_not_specialize=["N", "top_k"])
def _verify_rejection_kernel(
    logits,  # [B, N, V]
    token_ids,  # [B, N] int32 or int64
    parent_idx,  # [B, N] int32
    uniforms,  # [B, N] fp64
    num_rows,  # [B] int32 or None
    draft_probs,  # [B, N, V] fp32
    law,  # [B, V] int64 scratch
    accept_len,  # [B] int32
    accept_path,  # [B, N] int32
    output_ids,  # [B, N], dtype of token_ids
    N,
    inverse,
    top_k,
    top_p,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    V: tl.constexpr,
    NODES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    base = request * N
    law += request * V
    rows = N
    if num_rows is not None:
        rows = tl.minimum(tl.load(num_rows + request), N)
    i = tl.arange(0, NODES)
    tokens = tl.load(token_ids + base + i, mask=i < rows, other=-1).to(tl.int64)
    parents = tl.load(parent_idx + base + i, mask=i < rows, other=-1)
    numbers = tl.load(uniforms + base + i, mask=i < rows, other=0.0)
    path = tl.full((NODES,), -1, tl.int32)
    output = tl.full((NODES,), -1, tl.int64)
    length = tl.where(rows > 0, 0, -1)
    node = tl.where(rows > 0, 0, -1)

    while node >= 0:
        row, draft = logits + (base + node) * V, draft_probs + (base + node) * V
        best, valid = row_best(row, inverse, V, BLOCK)
        accepted = -1
        last = tl.full((), -1, tl.int64)
        if valid:
            least, total = row_law(row, best, inverse, top_k, top_p, TOP_K, TOP_P, V, BLOCK)
            mass = _fill_law(row, law, best, least, total, inverse, V, BLOCK)
            left = _draft_mass(draft, V, BLOCK)
            child = node + 1
            while (child < rows) & (accepted < 0) & (mass > 0):
                is_child = tl.sum(((i == child) & (parents == node)).to(tl.int32), 0) > 0
                token = tl.sum(tl.where(i == child, tokens, 0), 0)
                if is_child & (token >= 0) & (token < V):
                    elder = (i > node) & (i < child) & (parents == node) & (tokens == token)
                    fresh = tl.sum(elder.to(tl.int32), 0) == 0
                    q = tl.where(fresh, _units(tl.load(draft + token)), 0)
                    p = tl.load(law + token).to(tl.float64)
                    uniform = tl.sum(tl.where(i == child, numbers, 0.0), 0)
                    grow = 1099511627776.0 / tl.maximum(left, 1).to(tl.float64)
                    share = _scaled(q, grow).to(tl.float64)
                    drawn = q > 0
                    bound = mass.to(tl.float64) * tl.where(drawn, share, 1.0)
                    if uniform * bound < p * tl.where(drawn, 1099511627776.0, 1.0):
                        accepted = child
                    else:
                        mass = _reject(law, draft, token, mass, left, drawn, V, BLOCK)
                        left -= q
                child += 1
            if accepted < 0:
                if mass == 0:
                    mass = _fill_law(row, law, best, least, total, inverse, V, BLOCK)
                last = _draw(law, tl.sum(tl.where(i == 0, numbers, 0.0), 0), mass, V, BLOCK)
            # The next row's law goes where every thread may still be reading this one's.
            tl.debug_barrier()
        path = tl.where((i == length) & (accepted >= 0), accepted, path)
        emitted = tl.where(accepted >= 0, tl.sum(tl.where(i == accepted, tokens, 0), 0), last)
        output = tl.where(i == length, emitted, output)
        length += (accepted >= 0).to(tl.int32)
        node = accepted

    tl.store(accept_len + request, length)
    tl.store(accept_path + base + i, path, mask=i < N)
    tl.store(output_ids + base + i, output, mask=i < N)


def launch_rejection(
    logits: torch.Tensor,
    token_ids: torch.Tensor,
    parent_idx: torch.Tensor,
    uniforms: torch.Tensor,
    num_rows: torch.Tensor | None,
    draft_probs: torch.Tensor,
    out: VerifyResult,
    law: Law,
) -> None:
    """Fill `out`; arguments as in `verify_sampling`."""
    batch, nodes, vocab = logits.shape
    scratch = logits.new_empty((batch, vocab), dtype=torch.int64)
    launch(
        _verify_rejection_kernel, (batch,), logits.device,
        logits, token_ids, parent_idx, uniforms, num_rows, draft_probs, scratch, *out,
        nodes, law.inverse, law.top_k, law.top_p, NODES=64, **options(vocab, law, BLOCK, SHARE),
    )  # fmt: skip
