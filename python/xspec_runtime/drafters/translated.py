"""A drafter with a vocabulary of its own: its drafts in the target's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from difflib import SequenceMatcher
from functools import lru_cache

from transformers import PreTrainedTokenizerBase

from ..vocab import UNMAPPED, compare, translate
from .base import Drafter, DraftTree, Request

MODES = ("ids", "text")
# Token by token where at least this share of a text is cut alike: where more is cut otherwise,
# every other token breaks the chain.
ALIKE = 0.8
TAIL = 12  # tokens before a draft that tell how its text is cut


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
        limit: tokens of an answer, in the drafter's vocabulary, that it has room for; none is
            proposed behind them.

    Raises:
        ValueError: `mode` is unknown, or the vocabularies share nothing.
    """

    def __init__(
        self,
        drafter: Drafter,
        draft: PreTrainedTokenizerBase,
        target: PreTrainedTokenizerBase,
        mode: str = "ids",
        limit: int | None = None,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
        self.name = drafter.name
        self.drafter = drafter
        self.draft, self.target, self.mode, self.limit = draft, target, mode, limit
        self._to_target, self._to_draft = table(draft, target), table(target, draft)
        self._special = frozenset(draft.all_special_ids)
        if all(i == UNMAPPED for i in self._to_target):
            raise ValueError("the draft's vocabulary shares no token with the target's")

    def begin(self, request: Request) -> None:
        """Start the request; the prompt's text is told in the drafter's tokens."""
        self.drafter.begin(replace(request, prompt_ids=self._own(request.prompt_ids)))

    def propose(self, context: Sequence[int], rows: int) -> DraftTree:
        """At most `rows` rows in the target's tokens."""
        own = self._own(context)
        if not own or (self.limit is not None and len(own) > self.limit):
            return DraftTree.root(context[-1])
        tree = self.drafter.propose(own, rows)
        if self.mode == "ids":
            return self._mapped(tree, context[-1])
        return self._spelled(tree, own, context).best(rows)

    def end(self, answer: Sequence[int]) -> None:
        """End the request in the drafter."""
        self.drafter.end(self._own(answer))

    def _own(self, tokens: Sequence[int]) -> list[int]:
        """The target's tokens in the drafter's: one by one where they may be and all have a
        counterpart.
        """
        if self.mode == "ids":
            own = translate(tokens, self._to_draft)
            if len(own) == len(tokens):
                return own
        return respelled(tokens, self.target, self.draft)

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
            tokens = [tree.tokens[i] for i in path]
            # What ends an answer has a role, not a spelling.
            spoken = next((i for i, t in enumerate(tokens) if t in self._special), len(tokens))
            text = self.draft.decode([*own, *tokens[:spoken]])
            if not text.startswith(known):
                continue
            closed = spoken < len(tokens)
            cut = self._cut(text[len(known) :], context, closed)
            if closed and cut is not None:
                cut += translate(tokens[spoken : spoken + 1], self._to_target)
            self._add(out, cut or [], tree.scores[leaf])
        return out

    def _cut(self, text: str, context: Sequence[int], closed: bool) -> list[int] | None:
        """`text`, which follows `context`, in the target's tokens; the last of them is left out
        where more text, unless it is `closed`, could change it. None where the text that is known
        would be cut otherwise with it.
        """
        if not text:
            return []
        # The last tokens tell as much as all, unless cutting begins within a word.
        for known in (list(context[-TAIL:]), list(context)):
            whole = self.target.encode(self.target.decode(known) + text, add_special_tokens=False)
            if whole[: len(known)] == known:
                tokens = whole[len(known) :]
                done = closed or text[-1].isspace() or text[-1] in ".,;:!?"
                return tokens if done else tokens[:-1]
        return None

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


@lru_cache(maxsize=8)
def table(left: PreTrainedTokenizerBase, right: PreTrainedTokenizerBase) -> list[int]:
    """For each id of `left` the one of `right` that spells the same, or `UNMAPPED`."""
    return compare(left, right).left_to_right


def respelled(
    tokens: Sequence[int], source: PreTrainedTokenizerBase, to: PreTrainedTokenizerBase
) -> list[int]:
    """The text of `tokens` in the tokens of `to`."""
    return to.encode(source.decode(list(tokens)), add_special_tokens=False)


def mode_for(
    draft: PreTrainedTokenizerBase, target: PreTrainedTokenizerBase, texts: Sequence[str]
) -> str:
    """Which of `MODES` suits two tokenizers: "ids" where both cut `texts` nearly alike."""
    alike = total = 0
    for text in texts:
        own = draft.encode(text, add_special_tokens=False)
        wanted = target.encode(text, add_special_tokens=False)
        found = [table(draft, target)[i] for i in own]
        blocks = SequenceMatcher(None, found, wanted, autojunk=False).get_matching_blocks()
        alike += sum(block.size for block in blocks)
        total += max(len(own), len(wanted))
    return "ids" if alike >= ALIKE * total else "text"
