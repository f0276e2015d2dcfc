"""The round: draft -> verify -> accept -> commit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from time import perf_counter

import torch
from transformers import LogitsProcessorList

from xspec_kernels import ranges

from .config import SpecConfig
from .drafters.base import Drafter, DraftTree, Request
from .targets.transformers import TransformersTarget, Verdict


@dataclass(slots=True)
class Round:
    """One verify: its rows, what it gave, and where its milliseconds went."""

    rows: int
    accepted: int
    emitted: int
    propose_ms: float
    forward_ms: float
    accept_ms: float
    commit_ms: float

    @property
    def verify_ms(self) -> float:
        """All but the proposal."""
        return self.forward_ms + self.accept_ms + self.commit_ms


@dataclass(slots=True)
class Generation:
    """An answer and how it came about.

    Attributes:
        tokens: emitted ids; the end-of-sequence token is the last one if it was reached.
        rounds: one entry per verify.
        prefill_ms: until the first token (time to first token).
        begin_ms: the drafter's own preparation, counted in `decode_ms`.
        decode_ms: from the first token to the last.
        near_ties: steps whose two best logits lay within 2 ulp.
    """

    tokens: list[int]
    rounds: list[Round] = field(default_factory=list)
    prefill_ms: float = 0.0
    begin_ms: float = 0.0
    decode_ms: float = 0.0
    near_ties: int = 0

    @property
    def total_ms(self) -> float:
        return self.prefill_ms + self.decode_ms

    @property
    def tokens_per_verify(self) -> float:
        """Tokens after the first one per verify; 0 if there was no verify."""
        return (len(self.tokens) - 1) / len(self.rounds) if self.rounds else 0.0


class SpeculativeDecoder:
    """Greedy decoding of `target`, drafted by `drafter`; without one, plain decoding.

    The tokens equal plain decoding by the same target object outside near ties.
    """

    def __init__(
        self,
        target: TransformersTarget,
        drafter: Drafter | None = None,
        config: SpecConfig | None = None,
    ) -> None:
        self.target = target
        self.drafter = drafter
        self.config = config or SpecConfig()

    def generate(
        self,
        inputs: Mapping[str, torch.Tensor],
        request: Request | None = None,
        logits_processor: LogitsProcessorList | None = None,
        on_tokens: Callable[[list[int]], None] | None = None,
        on_round: Callable[[DraftTree, Verdict, list[int]], None] | None = None,
    ) -> Generation:
        """Answer one prompt.

        Args:
            inputs: what the target's forward takes, `input_ids` ``[1, L]`` among it.
            request: what the drafter may know; by default the prompt's ids.
            logits_processor: transformers' processors, applied to every row with its own prefix.
            on_tokens: called with the tokens of every round as soon as they are final.
            on_round: called with the tree, the verdict and the answer before the round.
        """
        target, drafter, config = self.target, self.drafter, self.config
        start = perf_counter()
        with ranges.range_("target.prefill", inputs["input_ids"].shape[-1]):
            verdict = target.prefill(inputs, logits_processor)
        answer = Generation(self._cut(verdict.tokens, 0), near_ties=verdict.near_ties)
        first = perf_counter()
        answer.prefill_ms = 1e3 * (first - start)
        if on_tokens:
            on_tokens(answer.tokens[:])
        if drafter:
            drafter.begin(request or Request(inputs["input_ids"][0].tolist()))
        answer.begin_ms = 1e3 * (perf_counter() - first)

        while not self._done(answer.tokens):
            clock = perf_counter()
            # With one token left, the target's own next token ends the answer.
            budget = config.max_new_tokens - len(answer.tokens)
            if drafter and config.rows > 1 and budget > 1:
                with ranges.range_("draft.propose", config.rows):
                    tree = drafter.propose(answer.tokens, config.rows)
            else:
                tree = DraftTree.root(answer.tokens[-1])
            proposed = perf_counter()
            rows = len(tree)
            with ranges.range_("verify" if rows > 1 else "target.decode", rows):
                with ranges.range_("verify.forward", rows):
                    logits = target.forward(tree)
                forwarded = perf_counter()
                with ranges.range_("verify.accept", rows):
                    verdict = target.accept(tree, logits, answer.tokens)
                verified = perf_counter()
                with ranges.range_("verify.commit", verdict.accepted):
                    target.commit(verdict)
                committed = perf_counter()
            if on_round:
                on_round(tree, verdict, answer.tokens)
            emitted = self._cut(verdict.tokens, len(answer.tokens))
            answer.tokens += emitted
            answer.near_ties += verdict.near_ties
            if on_tokens:
                on_tokens(emitted)
            answer.rounds.append(
                Round(
                    rows,
                    verdict.accepted,
                    len(emitted),
                    1e3 * (proposed - clock),
                    1e3 * (forwarded - proposed),
                    1e3 * (verified - forwarded),
                    1e3 * (committed - verified),
                )
            )
        if drafter:
            drafter.end(answer.tokens)
        answer.decode_ms = 1e3 * (perf_counter() - first)
        return answer

    def _cut(self, tokens: list[int], emitted: int) -> list[int]:
        """Drop what follows an end-of-sequence token or exceeds the budget."""
        tokens = tokens[: self.config.max_new_tokens - emitted]
        for i, token in enumerate(tokens):
            if token in self.config.eos_token_ids:
                return tokens[: i + 1]
        return tokens

    def _done(self, tokens: list[int]) -> bool:
        return len(tokens) >= self.config.max_new_tokens or tokens[-1] in self.config.eos_token_ids
