"""What surrounds the target's forward pass in a round, as one CUDA graph."""

from __future__ import annotations

import random
from collections.abc import Mapping

import torch

from xspec_kernels import kv_commit, tree_mask, verify_greedy

from .cases import random_tree
from .clock import captured

BATCH, NODES, SLOTS, CACHES = 3, 22, 64, 4


def check_rounds(
    backends: Mapping[str, str], device: str, seed: int, replays: int
) -> dict[str, object]:
    """Capture one round, then replay it on new trees, tokens and caches.

    Args:
        backends: op -> backend.

    Returns:
        `replays` and `mismatch`: the first output whose bits are not the reference's, or None.
    """
    rng = random.Random(f"{seed} rounds")
    static = [x.to(device) for x in _inputs(rng)]
    replay = captured(lambda: _round(static, backends), device)
    for number in range(replays):
        fresh = _inputs(rng)
        for x, y in zip(static, fresh, strict=True):
            x.copy_(y)
        got = replay()
        want = _round(fresh, dict.fromkeys(backends, "torch"))
        for name in want:
            if not torch.equal(got[name].cpu(), want[name]):
                return {"replays": number + 1, "mismatch": f"{name} in replay {number}"}
    return {"replays": replays, "mismatch": None}


def _inputs(rng: random.Random) -> list[torch.Tensor]:
    """parent_idx, num_rows, token_ids, target_ids, cache_seqlens, then the caches, on the CPU."""
    draw = torch.Generator().manual_seed(rng.randrange(2**31))
    rows = [rng.randint(0, NODES) for _ in range(BATCH)]
    parents = torch.tensor([random_tree(rng, NODES) for _ in rows], dtype=torch.int32)
    tokens = torch.randint(0, 2, (2, BATCH, NODES), generator=draw)
    starts = torch.tensor([rng.randint(0, SLOTS - NODES) for _ in rows], dtype=torch.int32)
    caches = torch.randn(CACHES, BATCH, 2, SLOTS, 64, generator=draw).bfloat16()
    return [parents, torch.tensor(rows, dtype=torch.int32), *tokens, starts, *caches]


def _round(tensors: list[torch.Tensor], backends: Mapping[str, str]) -> dict[str, torch.Tensor]:
    parent_idx, num_rows, token_ids, target_ids, starts, *caches = tensors
    mask = tree_mask(parent_idx, num_rows, backend=backends["tree_mask"])
    verdict = verify_greedy(token_ids, parent_idx, target_ids, mask.ancestor_bits, num_rows,
                            backend=backends["verify_greedy"])  # fmt: skip
    lengths = kv_commit(caches, verdict.accept_path, verdict.accept_len, starts,
                        backend=backends["kv_commit"])  # fmt: skip
    named = {f"cache {i}": cache.view(torch.int16) for i, cache in enumerate(caches)}
    return {**mask._asdict(), **verdict._asdict(), "new_seqlens": lengths, **named}
