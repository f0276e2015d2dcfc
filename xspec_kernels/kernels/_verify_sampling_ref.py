"""The definition of verify_sampling where drafts were drawn, request by request, child by child."""

from __future__ import annotations

import torch

from xspec_kernels.kernels.sample_tokens import Law, draw, law_weights
from xspec_kernels.kernels.verify_greedy import VerifyResult

ONE = float(1 << 40)


def _probabilities(weights: torch.Tensor) -> torch.Tensor:
    """Weights [V] with sum T -> floor(2^40 w / T)."""
    return (weights.double() * (ONE / weights.sum().double())).long()


def _try_children(
    children: list[tuple[int, int]], law: torch.Tensor, q: torch.Tensor, uniforms: list[float]
) -> tuple[int | None, torch.Tensor]:
    """(the node that is accepted or None, the law then).

    Args:
        children: (node, token) in order.
        law, q: int64 [V], probabilities in units of 2^-40.
    """
    p, left, elder = law, int(q.sum()), set()
    for node, token in children:
        if not 0 <= token < len(p):
            continue
        total, mass = float(p.sum()), float(p[token])
        drawn = 0 if token in elder else int(q[token])
        if drawn:
            scaled = (q.double() * (ONE / left)).long()
            bound = float(scaled[token]) * total
            mass *= ONE
        else:
            bound = total
        if uniforms[node] * bound < mass:
            return node, p
        if drawn:
            p = ((p.double() * (ONE / total)).long() - scaled).clamp_min(0)
        else:
            p = p.index_fill(0, torch.tensor([token], device=p.device), 0)
        if not p.any():
            return None, law
        left -= drawn
        elder.add(token)
    return None, p


def _walk_ref(
    tokens: list[int],
    parents: list[int],
    logits: torch.Tensor,
    uniforms: torch.Tensor,
    draft: torch.Tensor,
    law: Law,
) -> tuple[list[int], list[int]]:
    """(accepted nodes, emitted tokens) of one request; logits and draft are [N, V]."""
    path, node, numbers = [], 0, uniforms.tolist()
    while True:
        weights = law_weights(logits[node : node + 1], law)[0]
        if not weights.any():
            return path, [*(tokens[i] for i in path), -1]
        children = [(i, tokens[i]) for i in range(node + 1, len(tokens)) if parents[i] == node]
        q = (draft[node] * ONE).long()
        accepted, p = _try_children(children, _probabilities(weights), q, numbers)
        if accepted is None:
            last = draw(p[None], uniforms[:1]).item()
            return path, [*(tokens[i] for i in path), last]
        path.append(accepted)
        node = accepted


def rejection_ref(
    logits: torch.Tensor,
    token_ids: torch.Tensor,
    parent_idx: torch.Tensor,
    uniforms: torch.Tensor,
    num_rows: torch.Tensor | None,
    draft_probs: torch.Tensor,
    law: Law,
) -> VerifyResult:
    """The definition, request by request and child by child."""
    batch, nodes = token_ids.shape
    sizes = [nodes] * batch if num_rows is None else num_rows.clamp(0, nodes).tolist()
    paths, outputs = [], []
    for b, rows in enumerate(sizes):
        tree = (token_ids[b, :rows].tolist(), parent_idx[b, :rows].tolist())
        tensors = (logits[b], uniforms[b], draft_probs[b])
        path, emitted = _walk_ref(*tree, *tensors, law) if rows else ([], [])
        paths.append(path + [-1] * (nodes - len(path)))
        outputs.append(emitted + [-1] * (nodes - len(emitted)))
    output_ids = token_ids.new_tensor(outputs)
    accept_path = parent_idx.new_tensor(paths)
    count = (accept_path >= 0).sum(1).int()
    idle = parent_idx.new_tensor(sizes) == 0
    return VerifyResult(torch.where(idle, -1, count), accept_path, output_ids)
