"""How a request samples: its law, and uniforms that belong to positions of its answer.

The number that decides a position depends on the seed and on that position alone. So the answer is
a function of the prompt, the law and the seed: not of the drafts, of where rounds began, or of what
runs beside it. Speculative decoding gives the tokens of plain sampling, outside draws that fall
within the logits' rounding of the border between two tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from xspec_kernels import VerifyResult, sample_tokens, verify_sampling

from ..config import SpecConfig

if TYPE_CHECKING:
    from .greedy import TreeRows

SAMPLING_OPS = ("sample_tokens", "verify_sampling")
_STEP = np.uint64(0x9E3779B97F4A7C15)
_WORD = (1 << 64) - 1


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finalizer (Steele, Lea, Flood, doi:10.1145/2660193.2660195) of uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@dataclass(frozen=True, slots=True)
class Sampling:
    """Sampling of one request.

    Attributes:
        temperature, top_k, top_p: see `xspec_kernels.sample_tokens`.
        seed: an integer, of which the low 64 bits count.
        stream: tells the requests of one call apart.
    """

    temperature: float
    top_k: int
    top_p: float
    seed: int
    stream: int = 0
    _key: np.ndarray = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        seed, stream = (np.array([x & _WORD], np.uint64) for x in (self.seed, self.stream))
        object.__setattr__(self, "_key", _mix(_mix(seed + _STEP) + stream * _STEP + _STEP))

    @classmethod
    def of(cls, config: SpecConfig, seed: int | None = None, stream: int = 0) -> Sampling | None:
        """What `config` asks for, None where it is greedy; `seed` instead of its own."""
        if config.temperature == 0:
            return None
        chosen = config.seed if seed is None else seed
        return cls(config.temperature, config.top_k, config.top_p, chosen, stream)

    @property
    def law(self) -> dict[str, float]:
        """The keywords of the ops."""
        return {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}

    def uniforms(self, first: int, count: int) -> np.ndarray:
        """float64 ``[count]`` in [0, 1): of the answer's tokens from number `first` on."""
        at = np.arange(first + 1, first + 1 + count, dtype=np.uint64)
        return (_mix(self._key + at * _STEP) >> np.uint64(11)) * 2.0**-53


class Draws(NamedTuple):
    """The uniforms of one decision on B requests, which share a law.

    Attributes:
        uniforms: float64 ``[B, D]``, column d decides what follows a node of depth d.
        law: the keywords of the ops.
        backend: of the ops.
    """

    uniforms: torch.Tensor
    law: dict[str, float]
    backend: str

    @classmethod
    def of(
        cls,
        requests: Sequence[tuple[Sampling, int]],
        count: int,
        device: torch.device,
        backend: str,
    ) -> Draws:
        """For up to `count` rows of each request: (how it samples, tokens it has)."""
        numbers = np.stack([sampling.uniforms(known, count) for sampling, known in requests])
        return cls(torch.from_numpy(numbers).to(device), requests[0][0].law, backend)

    def tokens(self, logits: torch.Tensor) -> torch.Tensor:
        """int64 ``[B]`` from logits ``[B, V]`` after the roots; -1 where they are NaN."""
        uniforms = self.uniforms[:, 0].contiguous()
        return sample_tokens(logits.contiguous(), uniforms, **self.law, backend=self.backend)

    def verify(self, logits: torch.Tensor, laid: TreeRows) -> VerifyResult:
        """The accepted paths of trees, from logits ``[B, N, V]``."""
        depth = laid.depth.clamp(0, self.uniforms.shape[1] - 1).long()
        return verify_sampling(
            logits.contiguous(), laid.tokens, laid.parents, laid.bits,
            self.uniforms.gather(1, depth), laid.num_rows, **self.law, backend=self.backend,
        )  # fmt: skip

    def request(self, number: int) -> Draws:
        """Those of one request."""
        return self._replace(uniforms=self.uniforms[number : number + 1])

    def after(self, depth: int) -> Draws:
        """Those from `depth` on."""
        return self._replace(uniforms=self.uniforms[:, depth:])
