"""Drafters of the target's own family, and the cascade: a small draft, a model between, the target.

Speculating on the speculation: the small draft's chain is verified by a middle model, whose
corrected chain the target verifies. Which tokens are emitted is the target's decision alone.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from xspec_kernels import ranges

from .base import Drafter, DraftTree, Request
from .draft_model import ModelDrafter


class FamilyDrafter(ModelDrafter):
    """A `ModelDrafter` that reads what the target reads (`Request.target_inputs`), media included:
    the target with fewer bits or layers, or a smaller model with its processor.
    """

    def begin(self, request: Request) -> None:
        super().begin(Request(request.prompt_ids, request.target_inputs))


class MiddleModel(FamilyDrafter):
    """A causal model of the target's vocabulary that corrects chains of another drafter."""

    @torch.inference_mode()
    def check(self, context: Sequence[int], drafts: Sequence[int]) -> list[tuple[int, float]]:
        """`drafts` behind `context` as far as this model says the same, and what it says then.

        Returns:
            Tokens, each with its probability after those before it; at least one.
        """
        pending = self._rewind(context)
        fed = [*pending, *drafts]
        rows = len(drafts) + 1
        self.cache.check_room(len(fed))
        with ranges.range_("draft.decode", len(fed)):
            logits = self.model(
                input_ids=torch.tensor([fed], device=self.model.device),
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=rows,
            ).logits[0]
            best = logits.softmax(-1).max(-1)
            tokens, probabilities = best.indices.tolist(), best.values.tolist()
        same = 0
        while same < len(drafts) and drafts[same] == tokens[same]:
            same += 1
        self.cache.advance(len(pending) + same)
        self._fed += [*pending, *drafts[:same]]
        return list(zip(tokens[: same + 1], probabilities[: same + 1], strict=True))


class CascadeDrafter:
    """A chain that `draft` proposed and `middle` corrected, piece by piece, until it is full.

    The draft is shown the chain so far, which the target may reject later: it must take contexts
    that differ from the last one in more than what was appended, as `ModelDrafter` does.

    Args:
        step: tokens of the draft that the middle model checks at once.
        floor: the chain ends where the middle model's probability of it falls below this.
        ends: tokens that end an answer, and the chain.
    """

    def __init__(
        self,
        draft: Drafter,
        middle: MiddleModel,
        step: int,
        floor: float = 0.0,
        ends: Sequence[int] = (),
        name: str = "cascade",
    ) -> None:
        if step < 1:
            raise ValueError(f"step must be at least 1, got {step}")
        self.name = name
        self.draft, self.middle = draft, middle
        self.step, self.floor, self.ends = step, floor, frozenset(ends)

    def begin(self, request: Request) -> None:
        """Start the request in both models."""
        self.draft.begin(request)
        self.middle.begin(request)

    def propose(self, context: Sequence[int], rows: int) -> DraftTree:
        """A chain of at most `rows` nodes; scores are the middle model's."""
        tree, known, score = DraftTree.root(context[-1]), list(context), 1.0
        while len(tree) < rows and score >= self.floor and not (self.ends & set(known[-1:])):
            # The middle model adds a token of its own.
            wanted = min(self.step, rows - len(tree) - 1)
            drafts = best_path(self.draft.propose(known, wanted + 1)) if wanted else []
            for token, probability in self.middle.check(known, drafts):
                score *= probability
                tree.add(len(tree) - 1, token, score)
                known.append(token)
                if token in self.ends:
                    break
        return tree

    def end(self, answer: Sequence[int]) -> None:
        """End the request in both models."""
        self.draft.end(answer)
        self.middle.end(answer)


def best_path(tree: DraftTree) -> list[int]:
    """Tokens below the root along the children of highest score."""
    tokens, node = [], 0
    while children := [i for i, parent in enumerate(tree.parent_idx) if parent == node]:
        node = max(children, key=lambda i: (tree.scores[i], -i))
        tokens.append(tree.tokens[node])
    return tokens


def skip_layers(model: PreTrainedModel) -> PreTrainedModel:
    """A model that runs every second decoder layer of `model`, the first and the last among them;
    both share their weights.

    Raises:
        ValueError: the model has fewer than three decoder layers.
    """
    total = len(model.get_decoder().layers)
    if total < 3:
        raise ValueError(f"a model of {total} decoder layers has none to skip")
    skipped = copy.deepcopy(model, {id(p): p for p in (*model.parameters(), *model.buffers())})
    decoder = skipped.get_decoder()
    kept = sorted({*range(0, total, 2), total - 1})
    decoder.layers = nn.ModuleList(decoder.layers[i] for i in kept)
    for place, layer in enumerate(decoder.layers):
        layer.self_attn.layer_idx = place
    for config in {id(c): c for c in (decoder.config, skipped.config.get_text_config())}.values():
        config.num_hidden_layers = len(kept)
        if kinds := getattr(config, "layer_types", None):
            config.layer_types = [kinds[i] for i in kept]
    return skipped
