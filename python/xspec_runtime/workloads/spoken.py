"""A draft's tokens as the target's: the same ones, or translated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..drafters.base import Drafter
from ..drafters.draft_model import ModelDrafter
from ..drafters.translated import TranslatedDrafter, mode_for, respelled, table
from ..vocab import UNMAPPED, load_tokenizer, translate

SAME = "same"
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt"),
)
# Tokens of a draft with a vocabulary of its own per token of the target's, at most, that its cache
# has room for; an answer that takes more is drafted up to there.
SPREAD = 2
_HOW = {"ids": "token by token, up to the first without a counterpart", "text": "as text, cut anew"}


@dataclass(frozen=True)
class Spoken:
    """How what a draft says becomes the target's tokens.

    Attributes:
        draft, target: their tokenizers.
        method: `SAME`, or one of `translated.MODES`.
        mapped: share of the draft's ids that have a counterpart.
        assumed: the draft's folder has no tokenizer; it was taken to have the target's.
    """

    draft: PreTrainedTokenizerBase
    target: PreTrainedTokenizerBase
    method: str
    mapped: float = 1.0
    assumed: bool = False

    @property
    def direct(self) -> bool:
        """Whether the draft's ids are the target's."""
        return self.method == SAME

    def wrap(self, drafter: Drafter, limit: int) -> Drafter:
        """`drafter` for the target; `limit` as in `TranslatedDrafter`."""
        if self.direct:
            return drafter
        return TranslatedDrafter(drafter, self.draft, self.target, self.method, limit)

    def heard(self, tokens: list[int], draft_ends: Sequence[int], ends: Sequence[int]) -> list[int]:
        """A whole answer of the draft in the target's tokens."""
        if self.direct:
            return tokens
        closed = tokens[-1:] if tokens[-1] in draft_ends else []
        said = tokens[: len(tokens) - len(closed)]
        if self.method == "ids":
            out = translate(said, table(self.draft, self.target))
        else:
            out = respelled(said, self.draft, self.target)
        return [*out, *ends[:1]] if closed else out

    def facts(self) -> dict[str, object]:
        """For a result file."""
        return {"draft_tokens": self.method, "draft_ids_mapped": round(self.mapped, 4)}

    def describe(self) -> str:
        """A line to read; empty where there is nothing to say."""
        if self.assumed:
            return "the draft's folder has no tokenizer: taken to have the target's"
        if self.direct:
            return ""
        return (
            f"the draft has another vocabulary: {self.mapped:.1%} of its ids have a counterpart "
            f"in the target's; drafts are translated {_HOW[self.method]}"
        )


def spoken_by(
    draft: Path,
    target: PreTrainedTokenizerBase,
    sizes: tuple[int, int],
    texts: Sequence[str],
) -> Spoken:
    """How the tokens of the model in `draft` become those of `target`.

    Args:
        sizes: rows of the draft's and of the target's embedding.
        texts: in the kind of language that will be decoded; tells which method suits.

    Raises:
        ValueError: the draft has no tokenizer and another number of tokens than the target, its
            tokenizer knows more tokens than its model, or it shares none with the target's.
    """
    if not any((draft / name).is_file() for name in TOKENIZER_FILES):
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"{draft} holds no tokenizer, and its model has {sizes[0]} tokens where the target "
                f"has {sizes[1]}: its drafts cannot be read"
            )
        return Spoken(target, target, SAME, assumed=True)
    own = load_tokenizer(str(draft))
    known = max(own.get_vocab().values(), default=-1) + 1
    if known > sizes[0]:
        raise ValueError(
            f"the tokenizer in {draft} has {known} tokens, the model there only {sizes[0]}"
        )
    there = table(own, target)
    mapped = sum(i != UNMAPPED for i in there) / max(1, len(own.get_vocab()))
    if not mapped:
        raise ValueError(f"the vocabulary of {draft} shares no token with the target's")
    back = table(target, own)
    if all(i == j for t in (there, back) for i, j in enumerate(t)):
        # Rows that no token names are never meant, but a smaller table could not look them up.
        return Spoken(own, target, SAME if sizes[0] == sizes[1] else "ids")
    return Spoken(own, target, mode_for(own, target, texts), mapped)


@dataclass(frozen=True)
class SpokenDraft:
    """A draft model that makes fresh drafters.

    Attributes:
        capacity: KV rows.
        limit: of an answer, see `TranslatedDrafter`.
    """

    model: PreTrainedModel
    spoken: Spoken
    capacity: int
    limit: int

    def own(self, gamma: int, siblings: int = 0) -> ModelDrafter:
        """A fresh drafter in the draft's vocabulary."""
        return ModelDrafter(self.model, gamma, siblings, capacity=self.capacity)

    def drafter(self, gamma: int, siblings: int = 0) -> Drafter:
        """A fresh drafter in the target's."""
        return self.spoken.wrap(self.own(gamma, siblings), self.limit)


def _positions(model: PreTrainedModel) -> int:
    return model.config.get_text_config().max_position_embeddings


def longest_prompt(lengths: Sequence[int], added: int, model: PreTrainedModel, whose: str) -> int:
    """The longest of the prompts.

    Raises:
        ValueError: one is too long for the model, called `whose`, with `added` tokens behind it.
    """
    for i, length in enumerate(lengths):
        if length + added > _positions(model):
            raise ValueError(
                f"prompt {i} has {length} tokens; with {added} new ones that is more than the "
                f"{whose}'s {_positions(model)} positions"
            )
    return max(lengths)


def draft_of(
    model: PreTrainedModel,
    spoken: Spoken,
    lengths: Sequence[int],
    gamma: int,
    max_new_tokens: int,
    capacity: int,
) -> SpokenDraft:
    """The draft with room for its prompts and answers, which other tokens may make longer.

    Args:
        lengths: of its own prompts.
        capacity: that suffices for the target's.

    Raises:
        ValueError: a prompt is too long for it.
    """
    if spoken.direct:
        return SpokenDraft(model, spoken, capacity, capacity)
    longest = longest_prompt(lengths, gamma + 1, model, "draft")
    limit = min(SPREAD * max_new_tokens, _positions(model) - longest - gamma)
    return SpokenDraft(model, spoken, longest + max(limit, max_new_tokens) + gamma + 1, limit)
