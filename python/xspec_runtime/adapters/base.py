"""What adapters have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Protocol

from torch import nn

PAD = 0  # stands for a hidden draft, and for what lies behind a short one


class Proposer(Protocol):
    """An adapter at work on one request after the other."""

    def begin(self, draft: Sequence[int]) -> None:
        """A request starts; `draft` is the draft's text, empty where it is hidden."""

    def chain(
        self, context: Sequence[int], count: int, floor: float
    ) -> tuple[list[int], list[float]]:
        """At most `count` tokens that may follow `context`, and the probability of each path.

        `context` is the target's answer so far, at least one token. The chain ends behind the first
        path less likely than `floor`.
        """


class Adapter(Protocol):
    """A trained network; `kind` names its class in a checkpoint."""

    kind: str
    config: AdapterConfig

    def proposer(self) -> Proposer:
        """A fresh proposer on these weights."""


class AdapterConfig:
    """Base of the configurations: frozen data classes whose values are sizes, shares or flags."""

    vocab_size: int
    width: int
    heads: int
    dropout: float

    def __post_init__(self) -> None:
        """Raises `ValueError` naming the first value out of range."""
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "bool":
                good, wanted = isinstance(value, bool), "true or false"
            elif field.type == "float":
                number = isinstance(value, (int, float)) and not isinstance(value, bool)
                good, wanted = number and 0 <= value < 1, "from 0 to below 1"
            else:
                high = 128 if field.name.endswith("layers") else 2**20
                good, wanted = type(value) is int and 1 <= value <= high, f"an int in 1..{high}"
            if not good:
                raise ValueError(f"{field.name} must be {wanted}, got {value!r}")
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of {self.heads} heads, got {self.width}")


def encoder_layer(
    config: AdapterConfig, intermediate: int, norm_first: bool = False
) -> nn.TransformerEncoderLayer:
    """Attention and feed-forward of these sizes, with GELU."""
    return nn.TransformerEncoderLayer(
        config.width, config.heads, intermediate, config.dropout, activation="gelu",
        batch_first=True, norm_first=norm_first,
    )  # fmt: skip


def path_chain(
    tokens: Sequence[int], probabilities: Sequence[float], floor: float
) -> tuple[list[int], list[float]]:
    """Tokens and path probabilities up to the first path below `floor`, that one included."""
    scores, score = [], 1.0
    for probability in probabilities:
        score *= probability
        scores.append(score)
        if score < floor:
            break
    return list(tokens[: len(scores)]), scores
