"""tree_mask: parents of a draft tree -> ancestor bits, depth and path slots of every node.

B requests, N <= 64 nodes, one slot a node. Node 0 is the root (parent -1) and every other node's
parent precedes it: parent_idx[b, i] < i. The order makes a path ascend in slot, which verify_greedy
and kv_commit rely on, so a tree that breaks it is reported as broken.

A broken tree (status != 0) still gives outputs that are in range: every node is its own root, so
nothing but the root can be accepted. The kernel uses pointer jumping, six doublings for 64 nodes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from xspec_kernels import _native
from xspec_kernels._dispatch import check_nodes, check_tensor, register
from xspec_kernels._triton import jit, launch, tl

TOO_DEEP, BAD_PARENT, CYCLE = 1, 2, 4


class TreeMask(NamedTuple):
    """What every row of a draft tree may attend to; padding rows hold bits 0, depth 0, path -1.

    Attributes:
        ancestor_bits: [B, N] int64, bit j of row i is set iff node j is i or an ancestor of i.
        depth: [B, N] int32, edges between the root and the node.
        path_slot: [B, N, max_depth] int32, the ancestor at each depth, the node itself last,
            then -1.
        status: [B] int32, 0, or the sum of 1 (a node at depth >= max_depth), 2 (a parent that
            does not precede its child, or a root whose parent is not -1) and 4 (a cycle).
    """

    ancestor_bits: torch.Tensor
    depth: torch.Tensor
    path_slot: torch.Tensor
    status: torch.Tensor


def tree_mask_ref(
    parent_idx: torch.Tensor, num_rows: torch.Tensor | None, max_depth: int
) -> TreeMask:
    """The definition: walk up one generation at a time."""
    batch, nodes = parent_idx.shape
    node = torch.arange(nodes, device=parent_idx.device).expand(batch, nodes)
    rows = (
        node.new_full((batch, 1), nodes) if num_rows is None else num_rows[:, None].clamp_max(nodes)
    )
    real = node < rows
    parent = parent_idx.long()
    link = torch.where(real & (parent >= 0) & (parent < rows), parent, -1)

    bits = torch.where(real, 1 << node, 0)
    depth = torch.zeros_like(node)
    above = link
    for _ in range(nodes):
        has = above >= 0
        bits = bits | torch.where(has, 1 << above.clamp_min(0), 0)
        depth = depth + has
        above = torch.where(has, link.gather(1, above.clamp_min(0)), -1)

    endless = above >= 0
    misplaced = torch.where(node == 0, parent != -1, (parent < 0) | (parent >= node))
    status = (
        TOO_DEEP * (~endless & (depth >= max_depth)).any(1)
        + BAD_PARENT * (real & misplaced).any(1)
        + CYCLE * endless.any(1)
    )
    broken = (status != 0)[:, None]
    bits = torch.where(broken & real, 1 << node, bits)
    depth = torch.where(broken, 0, depth)

    member = (bits[:, :, None] >> node[:, None, :]) & 1 == 1
    column = torch.where(member, depth[:, None, :].expand_as(member), max_depth)
    path = node.new_full((batch, nodes, max_depth + 1), -1)
    path = path.scatter(2, column, node[:, None, :].expand_as(member))[:, :, :max_depth]
    return TreeMask(bits, depth.int(), path.int().contiguous(), status.int())


@jit(do_not_specialize=["N"])
def _tree_mask_kernel(
    parent_idx,  # [B, N] int32
    num_rows,  # [B] int32 or None
    ancestor_bits,  # [B, N] int64
    depth_out,  # [B, N] int32
    path_slot,  # [B, N, DEPTH] int32
    status_out,  # [B] int32
    N,
    NODES: tl.constexpr,
    DEPTH: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, NODES)
    rows = N
    if num_rows is not None:
        rows = tl.minimum(tl.load(num_rows + request), N)
    real = i < rows
    parent = tl.load(parent_idx + request * N + i, mask=real, other=-1)
    misplaced = tl.where(i == 0, parent != -1, (parent < 0) | (parent >= i))
    link = tl.where(real & (parent >= 0) & (parent < rows), parent, -1)

    # After step s, `bits` and `depth` cover 2^s generations and `above` is the 2^s-th ancestor.
    own = tl.full((NODES,), 1, tl.int64) << i.to(tl.int64)
    bits = own
    depth = tl.where(link >= 0, 1, 0)
    above = link
    for _ in tl.static_range(6):
        has = above >= 0
        source = tl.maximum(above, 0)
        bits = bits | tl.where(has, tl.gather(bits, source, 0), 0)
        depth = depth + tl.where(has, tl.gather(depth, source, 0), 0)
        above = tl.where(has, tl.gather(above, source, 0), -1)

    endless = above >= 0
    status = tl.max(tl.where((depth >= DEPTH) & (above < 0), 1, 0), 0)
    status = status | tl.max(tl.where(real & misplaced, 2, 0), 0)
    status = status | tl.max(tl.where(endless, 4, 0), 0)
    tl.store(status_out + request, status)

    bits = tl.where(real, tl.where(status != 0, own, bits), 0)
    depth = tl.where(status != 0, 0, depth)
    inside = i < N
    tl.store(ancestor_bits + request * N + i, bits, mask=inside)
    tl.store(depth_out + request * N + i, depth, mask=inside)

    # Ancestor j of row i goes to column depth[j]; the -1 fill covers exactly the other columns, so
    # the two stores never meet and need no barrier.
    line = path_slot + (request * N + i) * DEPTH
    member = ((bits[:, None] >> i[None, :].to(tl.int64)) & 1) != 0
    tl.store(
        line[:, None] + depth[None, :], tl.broadcast_to(i[None, :], (NODES, NODES)), mask=member
    )
    column = tl.arange(0, DEPTH)
    beyond = (column[None, :] > depth[:, None]) | (i >= rows)[:, None]
    fill = tl.full((NODES, DEPTH), -1, tl.int32)
    tl.store(line[:, None] + column[None, :], fill, mask=inside[:, None] & beyond)


def _empty(parent_idx: torch.Tensor, num_rows: torch.Tensor | None, max_depth: int) -> TreeMask:
    return TreeMask(
        torch.empty_like(parent_idx, dtype=torch.int64),
        torch.empty_like(parent_idx),
        parent_idx.new_empty((*parent_idx.shape, max_depth)),
        parent_idx.new_empty(parent_idx.shape[0]),
    )


def _triton(parent_idx: torch.Tensor, num_rows: torch.Tensor | None, max_depth: int) -> TreeMask:
    out = _empty(parent_idx, num_rows, max_depth)
    batch, nodes = parent_idx.shape
    launch(
        _tree_mask_kernel, (batch,), parent_idx.device, parent_idx, num_rows, *out, nodes,
        NODES=64, DEPTH=max_depth, num_warps=2,
    )  # fmt: skip
    return out


def _launch_native(
    parent_idx: torch.Tensor, num_rows: torch.Tensor | None, max_depth: int
) -> TreeMask:
    out = _empty(parent_idx, num_rows, max_depth)
    pointers = [_native.address(tensor) for tensor in (parent_idx, num_rows, *out)]
    _native.module.tree_mask(
        *pointers, *parent_idx.shape, max_depth, *_native.device_and_stream(parent_idx)
    )
    return out


def _check(parent_idx: torch.Tensor, num_rows: torch.Tensor | None, max_depth: int) -> torch.device:
    device = parent_idx.device
    check_nodes("tree_mask", "parent_idx", parent_idx)
    check_tensor("tree_mask", "parent_idx", parent_idx, parent_idx.shape, (torch.int32,), device)
    if num_rows is not None:
        check_tensor(
            "tree_mask", "num_rows", num_rows, parent_idx.shape[:1], (torch.int32,), device
        )
    if max_depth not in (32, 64):
        raise ValueError(f"tree_mask: max_depth is {max_depth}, expected 32 or 64")
    return device


_OP = register(
    "tree_mask",
    "(Tensor parent_idx, Tensor? num_rows, int max_depth, str backend)"
    " -> (Tensor ancestor_bits, Tensor depth, Tensor path_slot, Tensor status)",
    check=_check,
    fake=_empty,
    torch=tree_mask_ref,
    cpp=_launch_native,
    triton=_triton,
    cuda=_launch_native,
)


def tree_mask(
    parent_idx: torch.Tensor,
    num_rows: torch.Tensor | None = None,
    *,
    max_depth: int = 32,
    backend: str = "auto",
) -> TreeMask:
    """Ancestors, depths and paths of the nodes of B draft trees.

    Args:
        parent_idx: [B, N] int32, contiguous, N <= 64; -1 for node 0, a lower index elsewhere.
        num_rows: [B] int32, nodes of each tree, the rest is padding; None means N.
        max_depth: 32 or 64, columns of `path_slot`; depths reach max_depth - 1.
        backend: see `xspec_kernels`.

    Raises:
        ValueError: a shape, dtype or device is wrong. Broken trees do not raise, see `status`.
    """
    return TreeMask(*_OP(parent_idx, num_rows, max_depth, backend))
