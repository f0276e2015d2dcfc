"""A drafter with a vocabulary of its own: its drafts in the target's tokens."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from ..vocab import UNMAPPED, compare, translate
from .base import Drafter, DraftTree, Request

MODES = ("ids", "text")


class TranslatedDrafter:
    """Any drafter, for a target with another tokenizer; what it proposes is verified as always.

    With "ids", a draft token becomes the target's token that spells the same, and a path ends where
    there is none. With "text", every path is spelled out and cut into the target's tokens; its last
    one is kept only where the text could not go on within it.

    The drafter reads the verified text in its own tokens, which may change near the end as the text
    grows: it must take contexts that differ from the last one in more than what was appended, as
    `ModelDrafter` does.

    Args:
        draft, target: tokenizers of the drafter and of the target.

    Raises:
        ValueError: `mode` is unknown, or the vocabularies share nothing.
    """

    def __init__(
        self,
        drafter: Drafter,
        draft: PreTrainedTokenizerBase,
        target: PreTrainedTokenizerBase,
        mode: str = "ids",
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
        self.name = drafter.name
        self.drafter = drafter
        self.draft, self.target, self.mode = draft, target, mode
        self._to_target = compare(draft, target).left_to_right
        self._to_draft = compare(target, draft).left_to_right
        if all(i == UNMAPPED for i in self._to_target):
            raise ValueError("the draft's vocabulary shares no token with the target's")

    def begin(self, request: Request) -> None:
        """Start the request; the prompt's text is told in the drafter's tokens."""
        self.drafter.begin(Request(self._own(request.prompt_ids), request.draft_inputs))

    def propose(self, context: Sequence[int], rows: int) -> DraftTree:
        """At most `rows` rows in the target's tokens."""
        own = self._own(context)
        if not own:
            return DraftTree.root(context[-1])
        tree = self.drafter.propose(own, rows)
        if self.mode == "ids":
            return self._mapped(tree, context[-1])
        return self._spelled(tree, own, context).best(rows)

    def end(self, answer: Sequence[int]) -> None:
        """End the request in the drafter."""
        self.drafter.end(self._own(answer))

    def _own(self, tokens: Sequence[int]) -> list[int]:
        """The target's tokens in the drafter's: one by one where all have a counterpart."""
        own = translate(tokens, self._to_draft)
        if len(own) == len(tokens):
            return own
        return self.draft.encode(self.target.decode(list(tokens)), add_special_tokens=False)

    def _mapped(self, tree: DraftTree, root: int) -> DraftTree:
        out, place = DraftTree.root(root), {0: 0}
        for i in range(1, len(tree)):
            parent = place.get(tree.parent_idx[i])
            token = translate(tree.tokens[i : i + 1], self._to_target)
            if parent is not None and token:
                place[i] = out.add(parent, token[0], tree.scores[i])
        return out

    def _spelled(self, tree: DraftTree, own: list[int], context: Sequence[int]) -> DraftTree:
        out = DraftTree.root(context[-1])
        known = self.draft.decode(own)
        parents = set(tree.parent_idx)
        for leaf in (i for i in range(1, len(tree)) if i not in parents):
            path = [leaf]
            while tree.parent_idx[path[-1]] > 0:
                path.append(tree.parent_idx[path[-1]])
            path.reverse()
            text = self.draft.decode([*own, *(tree.tokens[i] for i in path)])
            if not text.startswith(known):
                continue
            self._add(out, self._cut(text[len(known) :], context), tree.scores[leaf])
        return out

    def _cut(self, text: str, context: Sequence[int]) -> list[int]:
        """`text`, which follows `context`, in the target's tokens; the last of them is left out
        where more text could change it.
        """
        before = self.target.decode(list(context))
        whole = self.target.encode(before + text, add_special_tokens=False)
        if whole[: len(context)] != list(context):
            return []
        tokens = whole[len(context) :]
        return tokens if text[-1:].isspace() or text[-1:] in ".,;:!?" else tokens[:-1]

    @staticmethod
    def _add(tree: DraftTree, tokens: Sequence[int], score: float) -> None:
        node = 0
        for token in tokens:
            child = tree.child(node, token)
            if child is None:
                child = tree.add(node, token, min(score, tree.scores[node]))
            elif score > tree.scores[child]:
                tree.scores[child] = min(score, tree.scores[node])
            node = child
