"""Drafts that exist before the target's prefill: what rides in it, what seeds the rounds after it.

With `SpecConfig.prefill_fused` "fast" a chain of drafts follows the prompt in the prefill pass
itself, so that pass verifies it for the price of a few rows. Its matrix products then have another
height than a bare prefill's, and rounding may tip a near tie; `count_mismatches` says how often.
With "exact" the prefill is untouched, and the drafts only seed the trees of the rounds that follow.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter

import torch
from transformers import PreTrainedConfig

from xspec_kernels import ranges

from .config import SpecConfig
from .drafters.base import Drafter, DraftTree, OpeningDrafter, PricingDrafter, Request

# What a row of text behind the prompt holds in inputs that have one entry a prompt row.
_BEHIND_PROMPT = {"attention_mask": 1, "token_type_ids": 0, "mm_token_type_ids": 0}
_PLACEHOLDER = re.compile(r"^(image|video|audio|event)\w*_token_(id|index)$")
# Chance that one more token of a draft without scores is right; 0.81 on recorded answers of a 7B
# pair.
PRIOR = 0.8


class DraftedText:
    """A draft's own answer, followed for as long as the target's answer agrees with it."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens = list(tokens)
        self._agreed = 0

    def chain(self, context: Sequence[int], rows: int) -> DraftTree | None:
        """What follows `context` in the draft, as a chain of at most `rows`; None once it differs.

        `context` only grows from call to call.
        """
        known = len(context)
        if known >= len(self.tokens) or self.tokens[self._agreed : known] != list(
            context[self._agreed :]
        ):
            self.tokens.clear()
            return None
        self._agreed = known
        rest = self.tokens[known : known + rows - 1]
        return DraftTree.chain(context[-1], rest, [PRIOR ** (i + 1) for i in range(len(rest))])


@dataclass(slots=True)
class Opening:
    """What is known of a draft's answer before the target's prefill.

    Attributes:
        riding: the drafts that ride in the prefill.
        text: the drafts that seed later trees, if any.
        begun: the drafter was asked, so its request has begun.
        begin_ms: what that took.
    """

    riding: list[int]
    text: DraftedText | None = None
    begun: bool = False
    begin_ms: float = 0.0

    @classmethod
    def of(
        cls,
        drafter: Drafter | None,
        request: Request | None,
        config: SpecConfig,
        drafted: Sequence[int],
    ) -> Opening:
        """Use `drafted`, or ask the drafter, as `config.prefill_fused` says.

        Args:
            request: what the drafter begins with; may be None without one.
        """
        # A prefill emits one token more than it accepts.
        limit = min(config.rows, config.max_new_tokens) - 1
        if config.prefill_fused == "off" or limit < 1:
            return cls([])
        text = DraftedText(drafted) if drafted else None
        if config.prefill_fused == "exact":
            return cls([], text)
        if text is None and isinstance(drafter, OpeningDrafter):
            start = perf_counter()
            drafter.begin(request)
            with ranges.range_("draft.propose", limit):
                riding = drafter.opening(limit)
            return cls(riding, None, True, 1e3 * (perf_counter() - start))
        riding = list(drafted[:limit])
        return cls(drafter.admit(riding) if isinstance(drafter, PricingDrafter) else riding, text)


def placeholder_ids(config: PreTrainedConfig) -> set[int]:
    """Token ids that a model replaces by media features: drafted, they would break its prefill."""
    names = {*config.to_dict(), *vars(config)}
    values = [getattr(config, name, None) for name in names if _PLACEHOLDER.match(name)]
    return {value for value in values if isinstance(value, int)}


def check_drafted(drafted: Sequence[int], vocab_size: int) -> None:
    """Raise `ValueError` unless the target can embed every drafted id."""
    if drafted and not 0 <= min(drafted) <= max(drafted) < vocab_size:
        raise ValueError(
            f"drafted ids must be in 0..{vocab_size - 1}, got {min(drafted)}..{max(drafted)}"
        )


def usable(drafted: Sequence[int], limit: int, placeholders: set[int]) -> list[int]:
    """The drafts that may ride: at most `limit`, none from the first placeholder on."""
    kept: list[int] = []
    for token in drafted[: max(limit, 0)]:
        if token in placeholders:
            break
        kept.append(token)
    return kept


def extend_inputs(
    inputs: Mapping[str, torch.Tensor], drafted: Sequence[int]
) -> dict[str, torch.Tensor]:
    """`inputs` with rows for `drafted` behind the prompt.

    Raises:
        ValueError: an input has one entry a prompt row and no known continuation.
    """
    ids = inputs["input_ids"]
    length = ids.shape[1]
    extended = dict(inputs)
    for name, value in inputs.items():
        if name == "input_ids":
            more = torch.tensor([list(drafted)], dtype=ids.dtype, device=ids.device)
        elif not isinstance(value, torch.Tensor) or value.shape[-1:] != ids.shape[1:]:
            continue
        elif name == "position_ids":
            more = value[..., -1:] + 1 + torch.arange(len(drafted), device=value.device)
        elif name in _BEHIND_PROMPT:
            more = value.new_full((*value.shape[:-1], len(drafted)), _BEHIND_PROMPT[name])
        else:
            raise ValueError(
                f'prefill_fused="fast" cannot extend {name} (shape {tuple(value.shape)}, a prompt '
                f'of {length} rows) by drafted rows; use "exact"'
            )
        extended[name] = torch.cat([value, more], -1)
    return extended


@dataclass(frozen=True, slots=True)
class Mismatches:
    """How two ways to decode differ.

    Attributes:
        answers, different_answers: pairs compared, and those that are not equal.
        tokens: tokens of the reference answers.
        different_tokens: positions with another token, or with a token on one side only.
    """

    answers: int
    different_answers: int
    tokens: int
    different_tokens: int


def count_mismatches(pairs: Iterable[tuple[Sequence[int], Sequence[int]]]) -> Mismatches:
    """Compare (reference, other) answers token by token."""
    answers = different_answers = tokens = different_tokens = 0
    for reference, other in pairs:
        same = sum(a == b for a, b in zip(reference, other, strict=False))
        wrong = max(len(reference), len(other)) - same
        answers += 1
        different_answers += wrong > 0
        tokens += len(reference)
        different_tokens += wrong
    return Mismatches(answers, different_answers, tokens, different_tokens)
