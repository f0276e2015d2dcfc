"""Two tokenizers compared by what their tokens spell, and ids of one as ids of the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

__all__ = ["UNMAPPED", "Comparison", "compare", "load_tokenizer", "render", "same_ids", "translate"]

UNMAPPED = -1
_ROLES = ("bos", "eos", "pad", "unk")
_SHOWN = 12


@dataclass(frozen=True, slots=True)
class Comparison:
    """How two vocabularies agree.

    Attributes:
        left_size, right_size: tokens of each.
        shared: tokens that spell the same; `same_id` of them have the same id too.
        only_left, only_right: the other tokens, in order of their ids.
        left_to_right: for each left id the right one that spells the same, or `UNMAPPED`.
    """

    left_size: int
    right_size: int
    shared: int
    same_id: int
    only_left: list[str]
    only_right: list[str]
    left_to_right: list[int]

    @property
    def identical(self) -> bool:
        """Whether every left id means the same on the right: drafts need no translation."""
        return self.same_id == self.left_size

    def as_dict(self) -> dict[str, object]:
        """For JSON; ids that differ are listed as pairs, those that agree are not."""
        moved = [[i, j] for i, j in enumerate(self.left_to_right) if j not in (UNMAPPED, i)]
        return {
            "schema": "xspec.vocab/1",
            "left_size": self.left_size,
            "right_size": self.right_size,
            "shared": self.shared,
            "same_id": self.same_id,
            "identical": self.identical,
            "only_left": self.only_left,
            "only_right": self.only_right,
            "moved": moved,
        }


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a local folder, or of the embedded pair for "mini".

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds no tokenizer that can be read.
    """
    if name == "mini":
        from .models import mini

        return mini.load_tokenizer()
    if not Path(name).is_dir():
        raise FileNotFoundError(f"tokenizer folder not found: {name}")
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"{name} holds no tokenizer that can be read: {reason}") from None


def compare(left: PreTrainedTokenizerBase, right: PreTrainedTokenizerBase) -> Comparison:
    """Match tokens by the bytes they stand for, special ones by their role or their text.

    Where two right tokens spell the same, the one with the left id counts, else the first.
    """
    ours, theirs = _spellings(left), _spellings(right)
    ids: dict[object, list[int]] = {}
    for i, spelling in sorted(theirs.items()):
        ids.setdefault(spelling, []).append(i)
    table = [UNMAPPED] * (max(ours, default=-1) + 1)
    for i, spelling in ours.items():
        if found := ids.get(spelling):
            table[i] = i if i in found else found[0]
    known = set(ours.values())
    return Comparison(
        len(ours),
        len(theirs),
        sum(spelling in ids for spelling in ours.values()),
        sum(table[i] == i for i in ours),
        [str(left.convert_ids_to_tokens(i)) for i in sorted(ours) if table[i] == UNMAPPED],
        [str(right.convert_ids_to_tokens(i)) for i in sorted(theirs) if theirs[i] not in known],
        table,
    )


def translate(tokens: Iterable[int], table: Sequence[int]) -> list[int]:
    """`tokens` through `table`, up to the first that has no counterpart."""
    out = []
    for token in tokens:
        if not 0 <= token < len(table) or table[token] == UNMAPPED:
            break
        out.append(table[token])
    return out


def same_ids(
    left: PreTrainedTokenizerBase, right: PreTrainedTokenizerBase, texts: Sequence[str]
) -> float:
    """Share of `texts` that both turn into the same ids, special tokens left out."""
    encoded = [[t.encode(text, add_special_tokens=False) for t in (left, right)] for text in texts]
    return sum(a == b for a, b in encoded) / len(encoded)


def render(found: Comparison, names: tuple[str, str]) -> str:
    """A few lines to read."""
    lines = [
        f"{names[0]}: {found.left_size} tokens; {names[1]}: {found.right_size}",
        f"spelled the same: {found.shared}, with the same id: {found.same_id}",
    ]
    for name, only in zip(names, (found.only_left, found.only_right), strict=True):
        more = "" if len(only) <= _SHOWN else ", ..."
        lines.append(f"only in {name}: {len(only)}  {', '.join(map(repr, only[:_SHOWN]))}{more}")
    verdict = "no translation is needed" if found.identical else "drafts need translation"
    return "\n".join([*lines, f"ids of {names[0]} as ids of {names[1]}: {verdict}"])


def _spellings(tokenizer: PreTrainedTokenizerBase) -> dict[int, object]:
    """What each id stands for: bytes, or for a special token its role or its text."""
    roles: dict[int, object] = {}
    for role in _ROLES:
        if (i := getattr(tokenizer, f"{role}_token_id")) is not None:
            roles.setdefault(i, role)
    special = {*tokenizer.all_special_tokens, *(t.content for t in _added(tokenizer))}
    spell = _spelling_of(tokenizer)
    return {
        i: roles.get(i, token if token in special else spell(token))
        for token, i in tokenizer.get_vocab().items()
    }


def _added(tokenizer: PreTrainedTokenizerBase):
    return [token for token in tokenizer.added_tokens_decoder.values() if token.special]


def _spelling_of(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], bytes]:
    """How the tokenizer writes bytes: GPT-2's letters for bytes, or SentencePiece's."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and "ByteLevel" in str(backend.pre_tokenizer) + str(backend.decoder):
        byte_of = {letter: byte for byte, letter in bytes_to_unicode().items()}
        return lambda token: (
            bytes(byte_of[letter] for letter in token)
            if all(letter in byte_of for letter in token)
            else token.encode()
        )

    def sentencepiece(token: str) -> bytes:
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes.fromhex(token[3:5])
        return token.replace("\u2581", " ").encode()

    return sentencepiece
