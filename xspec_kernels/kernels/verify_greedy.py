"""verify_greedy: the longest path of a draft tree that the target itself would have produced.

A node matches if its token is the target's token after its parent; the root always matches. It is
accepted iff it and all its ancestors match: on 64-bit words, (matching & ancestors) == ancestors.
The deepest accepted node wins, the lowest index among equals. Emitted are the accepted tokens, then
the target's token after the last of them (recovered, or bonus if the whole path was accepted).

A negative target token marks an invalid row, such as one whose logits were NaN: it matches nothing
below it, and where it would be emitted the slot holds -1, which the caller must treat as an error.
Greedy speculative decoding over trees: Miao et al., SpecInfer, arXiv:2305.09781.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from xspec_kernels import _native
from xspec_kernels._dispatch import check_nodes, check_tensor, register
from xspec_kernels._triton import jit, launch, tl


class VerifyResult(NamedTuple):
    """The accepted path of each request.

    Attributes:
        accept_len: [B] int32, accepted draft tokens, neither root nor bonus counted; -1 for an
            idle request (num_rows 0), so that accept_len + 1 tokens are emitted in every case.
        accept_path: [B, N] int32, accepted nodes in order, root excluded, then -1.
        output_ids: [B, N], dtype of token_ids: accepted tokens, the recovered or bonus token,
            then -1.
    """

    accept_len: torch.Tensor
    accept_path: torch.Tensor
    output_ids: torch.Tensor


def verify_greedy_ref(
    token_ids: torch.Tensor,
    parent_idx: torch.Tensor,
    target_ids: torch.Tensor,
    ancestor_bits: torch.Tensor,
    num_rows: torch.Tensor | None,
) -> VerifyResult:
    """The definition, on [B, N] and [B, N, N] tensors."""
    batch, nodes = token_ids.shape
    node = torch.arange(nodes, device=token_ids.device)
    real = node < (nodes if num_rows is None else num_rows[:, None])
    is_root = node == 0

    want = target_ids.gather(1, parent_idx.clamp(0, nodes - 1).long())
    precedes = (parent_idx >= 0) & (parent_idx < node)
    matches = real & (is_root | (precedes & (want >= 0) & (token_ids == want)))
    matching = (matches.long() << node).sum(1, keepdim=True)

    ancestors = torch.where(is_root, 1, ancestor_bits)
    member = (ancestors[:, :, None] >> node) & 1
    well_formed = (member[:, :, 0] == 1) & (member.diagonal(dim1=1, dim2=2) == 1)
    accepted = real & well_formed & (matching & ancestors == ancestors)
    length = torch.where(accepted, member.sum(2) - 1, -1)
    last = (length * nodes - node).argmax(1, keepdim=True)
    accept_len = length.gather(1, last)

    taken = member.gather(1, last[:, :, None].expand(-1, -1, nodes))[:, 0] == 1
    taken = taken & ~is_root & (accept_len > 0)
    slot = torch.where(taken, taken.cumsum(1) - 1, nodes)
    path = torch.full((batch, nodes + 1), -1, dtype=torch.int32, device=token_ids.device)
    path = path.scatter(1, slot, node.int().expand(batch, nodes))[:, :nodes]
    recovered = target_ids.gather(1, last).clamp_min(-1)
    output = torch.where(node == accept_len, recovered, -1)
    output = torch.where(path >= 0, token_ids.gather(1, path.clamp_min(0).long()), output)
    return VerifyResult(
        accept_len[:, 0].int(), path.contiguous(), output.to(token_ids.dtype).contiguous()
    )


@jit()
def longest_path(token, parent, want, ancestors, real, i, NODES: tl.constexpr):
    """(accepted drafts or -1 for an idle request, the last accepted node, its ancestor word).

    `want` is the target's token after each node's parent, negative where there is none; `real`
    marks the request's nodes and i is 0..NODES - 1.
    """
    wide = i.to(tl.int64)
    precedes = (parent >= 0) & (parent < i)
    matches = real & ((i == 0) | (precedes & (want >= 0) & (token == want)))
    matching = tl.sum(matches.to(tl.int64) << wide, 0)

    ancestors = tl.where(i == 0, tl.full((NODES,), 1, tl.int64), ancestors)
    members = tl.sum(((ancestors[:, None] >> wide[None, :]) & 1).to(tl.int32), 1)
    well_formed = ((ancestors & 1) != 0) & (((ancestors >> wide) & 1) != 0)
    accepted = real & well_formed & ((matching & ancestors) == ancestors)

    # Path length above the reversed index: the maximum is the longest, then the lowest. An idle
    # request keeps NODES - 1, which reads as length -1 and node 0.
    key = tl.max(tl.where(accepted, members * NODES, 0) + (NODES - 1 - i), 0)
    last = NODES - 1 - key % NODES
    return key // NODES - 1, last, tl.sum(tl.where(i == last, ancestors, 0), 0)


@jit(do_not_specialize=["N"])
def _verify_greedy_kernel(
    token_ids,  # [B, N] int32 or int64
    parent_idx,  # [B, N] int32
    target_ids,  # [B, N], dtype of token_ids
    ancestor_bits,  # [B, N] int64
    num_rows,  # [B] int32 or None
    accept_len,  # [B] int32
    accept_path,  # [B, N] int32
    output_ids,  # [B, N], dtype of token_ids
    N,
    NODES: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    base = request * N
    i = tl.arange(0, NODES)
    rows = N
    if num_rows is not None:
        rows = tl.minimum(tl.load(num_rows + request), N)
    real = i < rows

    token = tl.load(token_ids + base + i, mask=real, other=-1)
    parent = tl.load(parent_idx + base + i, mask=real, other=-1)
    precedes = real & (parent >= 0) & (parent < i)
    want = tl.load(target_ids + base + parent, mask=precedes, other=-1)
    ancestors = tl.load(ancestor_bits + base + i, mask=real, other=0)
    length, last, best = longest_path(token, parent, want, ancestors, real, i, NODES)

    taken = (((best >> i.to(tl.int64)) & 1) != 0) & (i > 0) & (length > 0)
    slot = tl.cumsum(taken.to(tl.int32), 0) - 1
    tl.store(accept_path + base + slot, i, mask=taken)
    tl.store(output_ids + base + slot, token, mask=taken)

    # The stores above fill the slots below `length`, these the rest.
    beyond = (i >= length) & (i < N)
    recovered = tl.maximum(tl.load(target_ids + base + last), -1)
    tail = tl.where(i == length, recovered, -1)
    tl.store(accept_path + base + i, tl.full((NODES,), -1, tl.int32), mask=beyond)
    tl.store(output_ids + base + i, tail, mask=beyond)
    tl.store(accept_len + request, length)


def _empty(
    token_ids: torch.Tensor,
    parent_idx: torch.Tensor,
    target_ids: torch.Tensor,
    ancestor_bits: torch.Tensor,
    num_rows: torch.Tensor | None,
) -> VerifyResult:
    return VerifyResult(
        parent_idx.new_empty(parent_idx.shape[0]),
        torch.empty_like(parent_idx),
        torch.empty_like(token_ids),
    )


def _triton(token_ids: torch.Tensor, *inputs: torch.Tensor | None) -> VerifyResult:
    out = _empty(token_ids, *inputs)
    batch, nodes = token_ids.shape
    launch(
        _verify_greedy_kernel, (batch,), token_ids.device, token_ids, *inputs, *out, nodes,
        NODES=64, num_warps=2,
    )  # fmt: skip
    return out


def _launch_native(token_ids: torch.Tensor, *inputs: torch.Tensor | None) -> VerifyResult:
    out = _empty(token_ids, *inputs)
    module = _native.module
    run = (
        module.verify_greedy_int64 if token_ids.dtype == torch.int64 else module.verify_greedy_int32
    )
    pointers = [_native.address(tensor) for tensor in (token_ids, *inputs, *out)]
    run(*pointers, *token_ids.shape, *_native.device_and_stream(token_ids))
    return out


def _check(
    token_ids: torch.Tensor,
    parent_idx: torch.Tensor,
    target_ids: torch.Tensor,
    ancestor_bits: torch.Tensor,
    num_rows: torch.Tensor | None,
) -> torch.device:
    op, device, shape = "verify_greedy", token_ids.device, token_ids.shape
    check_nodes(op, "token_ids", token_ids)
    check_tensor(op, "token_ids", token_ids, shape, (torch.int32, torch.int64), device)
    check_tensor(op, "parent_idx", parent_idx, shape, (torch.int32,), device)
    check_tensor(op, "target_ids", target_ids, shape, (token_ids.dtype,), device)
    check_tensor(op, "ancestor_bits", ancestor_bits, shape, (torch.int64,), device)
    if num_rows is not None:
        check_tensor(op, "num_rows", num_rows, shape[:1], (torch.int32,), device)
    return device


_OP = register(
    "verify_greedy",
    "(Tensor token_ids, Tensor parent_idx, Tensor target_ids, Tensor ancestor_bits,"
    " Tensor? num_rows, str backend)"
    " -> (Tensor accept_len, Tensor accept_path, Tensor output_ids)",
    check=_check,
    fake=_empty,
    torch=verify_greedy_ref,
    cpp=_launch_native,
    triton=_triton,
    cuda=_launch_native,
)


def verify_greedy(
    token_ids: torch.Tensor,
    parent_idx: torch.Tensor,
    target_ids: torch.Tensor,
    ancestor_bits: torch.Tensor,
    num_rows: torch.Tensor | None = None,
    *,
    backend: str = "auto",
) -> VerifyResult:
    """Longest accepted path and the tokens to emit; a chain is a tree whose parents are i - 1.

    Args:
        token_ids: [B, N] int32 or int64, token of each node, N <= 64.
        parent_idx: [B, N] int32, -1 for node 0, a lower index elsewhere.
        target_ids: [B, N], dtype of token_ids: the target's token after each node; a negative
            one is invalid, see the module.
        ancestor_bits: [B, N] int64 from `tree_mask` of the same parents.
        num_rows: [B] int32, nodes of each tree, the rest is padding; None means N.
        backend: see `xspec_kernels`.

    Raises:
        ValueError: a shape, dtype or device is wrong, or a tensor is not contiguous.
    """
    return VerifyResult(*_OP(token_ids, parent_idx, target_ids, ancestor_bits, num_rows, backend))
