"""Toy laws whose outputs can be enumerated, and the test of counts against them."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch

from op_cases import bits_of
from xspec_kernels import VerifyResult, verify_sampling

LAWS = {
    "all": {},
    "cool": {"temperature": 0.6},
    "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.7},
    "joined": {"temperature": 1.7, "top_k": 4, "top_p": 0.85},
}
# Chance that a correct op fails one test; seeds are fixed, so it either does or never will.
LEVEL = 1e-4
# Drawn from the draft's law; its likeliest tokens, accepted where they are the token that was drawn
# from the target; and these as tokens of which the rejected ones are taken out of the law.
DRAFTS = ("drawn", "given", "listed")


def p_value(counts: torch.Tensor, law: torch.Tensor) -> float:
    """Chi-square test of how often each outcome came up; outcomes of few expected counts are one.

    0.0 where something came up that cannot.
    """
    expected = law.double() * counts.sum()
    if counts[law == 0].any():
        return 0.0
    rare = (expected < 8) & (law > 0)
    seen, want = counts[expected >= 8].double(), expected[expected >= 8]
    if rare.any():
        seen = torch.cat((seen, counts[rare].sum().double()[None]))
        want = torch.cat((want, expected[rare].sum()[None]))
    statistic = ((seen - want) ** 2 / want).sum()
    freedom = torch.tensor((len(want) - 1) / 2, dtype=torch.float64)
    return torch.special.gammaincc(freedom, statistic / 2).item()


def warped(logits: torch.Tensor, temperature=1.0, top_k=0, top_p=1.0) -> torch.Tensor:
    """transformers' probabilities, float64, of logits ``[R, V]``."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    scores = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    return scores.double().softmax(-1)


class Toy(NamedTuple):
    """A target whose next token depends on the last one, and drafts for it.

    Attributes:
        logits: float32 ``[V, V]``, row t is what follows token t.
        draft: float32 ``[V, V]``, the law drafts are drawn from likewise.
        parents: of the trees that are drafted.
    """

    logits: torch.Tensor
    draft: torch.Tensor
    parents: list[int]

    @classmethod
    def of(cls, seed: int, parents: list[int], vocab: int = 5) -> Toy:
        make = torch.Generator().manual_seed(seed)
        logits = 1.2 * torch.randn(vocab, vocab, generator=make)
        other = logits + 1.2 * torch.randn(vocab, vocab, generator=make)
        return cls(logits, other.softmax(-1), parents)

    def trees(self, batch: int, make: torch.Generator, drafts: str) -> torch.Tensor:
        """Tokens int64 ``[batch, N]``, all roots 0, of the `DRAFTS`: siblings drawn one after
        another without replacement, or the draft's likeliest tokens."""
        tokens = torch.zeros(batch, len(self.parents), dtype=torch.int64)
        for parent in sorted(set(self.parents) - {-1}):
            children = [i for i, p in enumerate(self.parents) if p == parent]
            law, count = self.draft[tokens[:, parent]], len(children)
            tokens[:, children] = (
                law.multinomial(count, generator=make)
                if drafts == "drawn"
                else law.topk(count).indices
            )
        return tokens

    def verify(
        self, tokens: torch.Tensor, make: torch.Generator, drafts: str, **law
    ) -> VerifyResult:
        batch, nodes = tokens.shape
        probabilities = {"drawn": 1.0, "listed": 0.0}.get(drafts)
        return verify_sampling(
            self.logits[tokens],
            tokens,
            torch.tensor([self.parents] * batch, dtype=torch.int32),
            torch.tensor([bits_of(self.parents, nodes)] * batch),
            torch.rand(batch, nodes, generator=make, dtype=torch.float64),
            draft_probs=None if probabilities is None else probabilities * self.draft[tokens],
            **law,
        )

    def counts(self, outputs: torch.Tensor, length: int, make: torch.Generator, **law):
        """How often each sequence of `length` came up, int64 ``[V ** length]``; outputs that are
        shorter go on as the target does."""
        probabilities = warped(self.logits, **law)
        words = torch.zeros(len(outputs), dtype=torch.int64)
        last = torch.zeros_like(words)
        for column in range(length):
            go_on = probabilities[last].multinomial(1, generator=make)[:, 0]
            given = outputs[:, column] if column < outputs.shape[1] else torch.full_like(last, -1)
            last = torch.where(given >= 0, given, go_on)
            words = words * len(self.logits) + last
        return torch.bincount(words, minlength=len(self.logits) ** length)

    def law(self, length: int, **law) -> torch.Tensor:
        """Probability of each sequence of `length` after token 0."""
        probabilities = warped(self.logits, **law).tolist()
        made = []
        for word in itertools.product(range(len(probabilities)), repeat=length):
            chance, last = 1.0, 0
            for token in word:
                chance, last = chance * probabilities[last][token], token
            made.append(chance)
        return torch.tensor(made, dtype=torch.float64)
