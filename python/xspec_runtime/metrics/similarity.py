"""How alike predicted vectors are to the target's. Similarity is no acceptance: vectors with a
cosine above 0.9 still name different tokens often.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

PUBLISHED_TAUS = (0.80, 0.85, 0.90, 0.95)


def cosine(predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Similarity of vectors ``[..., D]``, in float32: ``[...]`` from -1 to 1.

    Raises:
        ValueError: the shapes differ.
    """
    if predicted.shape != target.shape:
        raise ValueError(
            f"vectors must have one shape, got {list(predicted.shape)} and {list(target.shape)}"
        )
    return F.cosine_similarity(predicted.float(), target.float(), dim=-1)


def accept_at(
    similarity: torch.Tensor, tau: float, lengths: Sequence[int] | None = None
) -> float | None:
    """Accept@tau, a similarity: share of positions above `tau`; None without positions.

    Args:
        similarity: ``[B, L]``.
        lengths: valid positions of each row, by default all.

    Raises:
        ValueError: the lengths do not fit.
    """
    valid = _valid(similarity, lengths)
    held = similarity[valid] > tau
    return held.float().mean().item() if held.numel() else None


def consecutive_similar(
    similarity: torch.Tensor, tau: float, lengths: Sequence[int] | None = None
) -> list[int]:
    """Positions above `tau` from the first on, up to the first that is not: one number a row.
    Arguments and errors as of `accept_at`.
    """
    held = (similarity > tau) & _valid(similarity, lengths)
    return held.int().cumprod(-1).sum(-1).tolist()


def published_similarity(
    similarity: torch.Tensor, lengths: Sequence[int] | None = None
) -> dict[str, float | None]:
    """Mean and Accept@tau under the keys of the published training histories: ``cos_sim`` and
    ``accept_80`` ... ``accept_95``. Arguments and errors as of `accept_at`.
    """
    kept = similarity[_valid(similarity, lengths)]
    mean = kept.float().mean().item() if kept.numel() else None
    rates = {f"accept_{tau * 100:.0f}": accept_at(similarity, tau, lengths)
             for tau in PUBLISHED_TAUS}  # fmt: skip
    return {"cos_sim": mean, **rates}


def _valid(similarity: torch.Tensor, lengths: Sequence[int] | None) -> torch.Tensor:
    if similarity.dim() != 2:
        raise ValueError(f"similarity must be [B, L], got {list(similarity.shape)}")
    rows, width = similarity.shape
    if lengths is None:
        return torch.ones_like(similarity, dtype=torch.bool)
    if len(lengths) != rows or any(not 0 <= length <= width for length in lengths):
        raise ValueError(f"lengths must be {rows} numbers from 0 to {width}, got {list(lengths)}")
    limits = torch.tensor(list(lengths), device=similarity.device)
    return torch.arange(width, device=similarity.device) < limits[:, None]
