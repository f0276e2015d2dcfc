"""What states that resemble the target's are worth in tokens, and where the rest is lost.

Similarity is no acceptance: a verify accepts tokens, from the first on. Everything here is counted
on single steps from true states; `chains` has those of several.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ...metrics.similarity import accept_at, consecutive_similar, cosine
from .. import alignment
from ..scoring.steps import ROWS, StateAdapter, level_of, predict, wanted
from ..training.states import States

TAUS = (0.80, 0.85, 0.90, 0.92, 0.95, 0.98, 0.99)
BASE = "B1"  # reads what the target says; the levels that read the draft alone are compared with it


@dataclass(frozen=True)
class Compared:
    """What an adapter predicts beside what there was, ``[N, P]`` each; column j is the target's
    token `first` + j.

    Attributes:
        similarity: cosine of the predicted state and the target's.
        right: the token that the adapter proposes is the target's.
        through_head: so is the one that the target's frozen head makes of the predicted state;
            the same but for EAGLE, which has a head of its own.
        among: by k, the target's token is among the k likeliest.
        there: there is such a token, and a state to predict it from; first in every row.
    """

    first: int
    similarity: torch.Tensor
    right: torch.Tensor
    through_head: torch.Tensor
    among: Mapping[int, torch.Tensor]
    there: torch.Tensor

    @property
    def lengths(self) -> list[int]:
        """Positions of every row that count."""
        return self.there.sum(1).tolist()

    def placed(self, values: torch.Tensor, width: int) -> torch.Tensor:
        """Columns ``[N, P]`` as ``[N, width]`` by position in the target's answer; False where
        nothing is predicted.
        """
        shifted = F.pad(values, (self.first, 0))[:, :width]
        return F.pad(shifted, (0, width - shifted.shape[1]))


@torch.inference_mode()
def compare(
    adapter: StateAdapter,
    states: States,
    head: torch.Tensor,
    hide_draft: bool = False,
    progress: Callable[[int, int], None] = lambda done, count: None,
) -> Compared:
    """Every state that `adapter` predicts from true ones.

    Args:
        head: the target's language-model head ``[V, D]``.
        hide_draft: zeros in place of the draft's states.
        progress: called with the answers that are done, and all.
    """
    was_training = adapter.training
    adapter.eval()
    parts = []
    for rows in torch.arange(len(states)).split(ROWS):
        batch = states.rows(rows)
        if hide_draft:
            batch = batch.hide(torch.ones(len(rows), dtype=torch.bool))
        predicted, logits = predict(adapter, batch, head)
        target, ids, there = wanted(adapter, batch, predicted.shape[1])
        said = logits.argmax(-1)
        best = logits.topk(min(10, logits.shape[-1])).indices == ids[..., None]
        own_head = level_of(adapter) == alignment.EAGLE
        through = (predicted @ head.T).argmax(-1) if own_head else said
        parts.append((cosine(predicted, target), said == ids, through == ids,
                      best[..., :5].any(-1), best.any(-1), there))  # fmt: skip
        progress(int(rows[-1]) + 1, len(states))
    adapter.train(was_training)
    similarity, right, through, of_5, of_10, there = map(torch.cat, zip(*parts, strict=True))
    first = alignment.state_position(level_of(adapter), 0)
    return Compared(
        first, similarity, right & there, through & there, {5: of_5 & there, 10: of_10 & there},
        there,
    )  # fmt: skip


def cosine_curve(
    compared: Compared, taus: Sequence[float] = TAUS
) -> list[dict[str, float | int | None]]:
    """What a cosine above each `tau` says about the token; None where no state is above it.

    Returns:
        Of every tau: ``share`` of states above it and their ``count``; ``token_match``, the share
        of these whose token is right through the frozen head, and ``token_match_below``, that of
        the other states; ``runs`` of states above it within the answers, their mean length ``run``,
        and how many tokens are right from the start of a run on (``run_right``); ``consecutive``
        states above tau from the answer's first on, and the same with a right token each,
        ``consecutive_right``, means over answers.
    """
    points = []
    for tau in taus:
        high = (compared.similarity > tau) & compared.there
        right = high & compared.through_head
        starts = high & ~F.pad(high, (1, 0))[:, :-1]
        count, runs = int(high.sum()), int(starts.sum())
        points.append({
            "tau": tau,
            "share": accept_at(compared.similarity, tau, compared.lengths),
            "count": count,
            "token_match": _share(right, high),
            "token_match_below": _share(compared.through_head & ~high, compared.there & ~high),
            "runs": runs,
            "run": count / runs if runs else None,
            "run_right": run_lengths(right)[starts].float().mean().item() if runs else None,
            "consecutive": _mean(consecutive_similar(compared.similarity, tau, compared.lengths)),
            "consecutive_right": _mean(right.int().cumprod(1).sum(1).tolist()),
        })  # fmt: skip
    return points


def correlation(compared: Compared) -> float | None:
    """Pearson's, of the cosine and the right token; None where one of them is constant."""
    alike = compared.similarity[compared.there]
    right = compared.through_head[compared.there].float()
    if right.numel() < 2 or not right.std() > 0 or not alike.std() > 0:
        return None
    return torch.corrcoef(torch.stack([alike, right]))[0, 1].item()


def run_lengths(held: torch.Tensor) -> torch.Tensor:
    """Of bool ``[N, P]``: how many in a row hold from each position on."""
    out = held.int()
    for i in range(held.shape[1] - 2, -1, -1):
        out[:, i] *= 1 + out[:, i + 1]
    return out


def split_gap(found: Mapping[str, Mapping[str, Compared]]) -> dict[str, Any]:
    """Where the tokens of each level that are not right are lost, as shares that add up to 1.

    All levels are compared on the positions that every one of them predicts. ``unread`` is what a
    level has right with the draft hidden, ``draft`` what showing it adds; a negative part is a
    loss. Of L1 to L5 the rest is split by `BASE`, which reads the target's own states in place of
    the draft's: ``modality`` is what that gains, ``capacity`` what it has wrong as well. L5F and
    EAGLE read both: their rest is ``capacity``; of L5F ``network`` is what its draft-hidden twin,
    which reads what `BASE` reads, gains by being the larger network.

    Args:
        found: level -> ``shown`` and, where it reads a draft, ``hidden``.

    Returns:
        ``positions`` compared, and ``levels``: name -> part -> share; ``modality`` is None, and
        ``capacity`` all the rest, where `BASE` is missing.
    """
    width = max(c.first + c.there.shape[1] for pair in found.values() for c in pair.values())
    shared = torch.stack(
        [c.placed(c.there, width) for pair in found.values() for c in pair.values()]
    ).all(0)
    if not shared.any():
        return {"positions": 0, "levels": {}}
    share = {
        level: {
            name: c.placed(c.right, width)[shared].float().mean().item() for name, c in pair.items()
        }
        for level, pair in found.items()
    }
    base = share.get(BASE, {}).get("shown")
    levels = {level: _parts(level, rates, base) for level, rates in share.items()}
    return {"positions": int(shared.sum()), "levels": levels}


def _parts(level: str, rates: Mapping[str, float], base: float | None) -> dict[str, float | None]:
    shown = rates["shown"]
    unread = rates.get("hidden", shown)
    parts: dict[str, float | None] = {"unread": unread}
    if "hidden" in rates:
        parts["draft"] = shown - unread
    if level == "L5F" and base is not None:
        parts |= {"unread": base, "network": unread - base}
    if level in alignment.AHEAD:
        return parts | {"capacity": 1 - shown}
    if base is None:
        return parts | {"modality": None, "capacity": 1 - shown}
    return parts | {"modality": base - shown, "capacity": 1 - base}


def _share(held: torch.Tensor, of: torch.Tensor) -> float | None:
    count = int(of.sum())
    return int(held.sum()) / count if count else None


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
