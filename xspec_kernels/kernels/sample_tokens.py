"""sample_tokens: one token a row, drawn from the target's law by inverting its distribution.

The law is that of transformers' warpers in their order: logits / temperature, the `top_k` largest,
then the fewest largest that hold `top_p` of what is left (nucleus: Holtzman et al.,
arXiv:1904.09751). Values that tie with the smallest one kept are kept too.

Everything after the exponential is integer arithmetic, so the order of summation cannot matter and
every backend gives the same token, whatever the size of its blocks:

    score   s = logit * (1 / temperature), float32
    weight  w = floor(2^40 e^(s - max s)), the exponential being ten float32 operations that round
            one by one; no fused multiply-add, no library
    top_k   s >= the k-th largest s
    top_p   s >= the largest v with sum(w : s >= v) >= ceil(top_p * sum(w)); kernels search v by
            halving the interval between the smallest and the largest candidate, without a sort
    token   the first in order of ids at which the running sum of w exceeds floor(u * sum(w))

Against exact arithmetic the law is off by less than float32's softmax is. Draws that share their
uniforms give a speculative decoder the very tokens of plain sampling, see `verify_sampling`.
"""

from __future__ import annotations

from ctypes import c_float
from typing import NamedTuple

import torch

from xspec_kernels import _native
from xspec_kernels._dispatch import check_tensor, register
from xspec_kernels.kernels._sampling_triton import (
    CUTOFF,
    LN2_HI,
    LN2_LO,
    LOG2E,
    ONE_BITS,
    TAYLOR,
    launch_sample,
)

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# Sums of so many weights of at most 2^40 stay below 2^63.
MAX_VOCAB = 1 << 22
MAX_TEMPERATURE = 1e6


class Law(NamedTuple):
    """How logits become probabilities; `inverse` and `top_p` are float32 numbers.

    Attributes:
        inverse: 1 / temperature.
        top_k: 0 keeps all.
        top_p: 1.0 keeps all.
    """

    inverse: float
    top_k: int
    top_p: float

    @classmethod
    def of(cls, op: str, vocab: int, temperature: float, top_k: int, top_p: float) -> Law:
        """Raises ValueError where a number is out of range."""
        if not 1 / MAX_TEMPERATURE <= temperature <= MAX_TEMPERATURE:
            raise ValueError(
                f"{op}: temperature is {temperature}, expected {1 / MAX_TEMPERATURE}.."
                f"{MAX_TEMPERATURE} (0, greedy decoding, is verify_greedy)"
            )
        if top_k < 0:
            raise ValueError(f"{op}: top_k is {top_k}, expected 0 (all) or more")
        if not 0 < top_p <= 1:
            raise ValueError(f"{op}: top_p is {top_p}, expected a number above 0 and up to 1")
        inverse = c_float(1.0 / c_float(temperature).value).value
        return cls(inverse, top_k if top_k < vocab else 0, c_float(top_p).value)


def token_weights(scores: torch.Tensor, best: torch.Tensor) -> torch.Tensor:
    """int64, floor(2^40 e^(scores - best)) for float32 scores up to `best`; 0 from 30 below on."""
    distance = (best - scores).clamp_max(CUTOFF)
    halvings = (distance * LOG2E + 0.5).to(torch.int32)
    whole = halvings.float()
    x = (whole * LN2_HI - distance) + whole * LN2_LO
    power = torch.full_like(x, TAYLOR[0])
    for coefficient in TAYLOR[1:]:
        power = power * x + coefficient
    scale = ((ONE_BITS - halvings) << 23).view(torch.float32)
    return (power * scale).long()


def law_weights(logits: torch.Tensor, law: Law) -> torch.Tensor:
    """int64 [R, V]: each token's weight, 0 where it is not kept; a row that has no law (a NaN, an
    infinite maximum) is all 0.
    """
    scores = logits.float() * law.inverse
    best = scores.amax(-1, keepdim=True)
    valid = best.isfinite()
    scores, best = torch.where(valid, scores, 0), torch.where(valid, best, 0)
    weights = token_weights(scores, best)
    if law.top_k:
        least = scores.topk(law.top_k).values[..., -1:]
        weights = torch.where(scores >= least, weights, 0)
    if law.top_p < 1:
        ranked, order = scores.sort(descending=True)
        mass = weights.gather(-1, order).cumsum(-1)
        need = (mass[..., -1:].double() * law.top_p).ceil().long().clamp_min(1)
        least = ranked.gather(-1, (mass < need).sum(-1, keepdim=True))
        weights = torch.where(scores >= least, weights, 0)
    return torch.where(valid, weights, 0)


def draw(weights: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """int64 [R] from weights [R, V]: the token that each uniform falls on, -1 where all are 0."""
    total = weights.sum(-1)
    target = (uniforms * total.double()).long().clamp(min=0).minimum(total - 1)
    ids = (weights.cumsum(-1) <= target[:, None]).sum(-1)
    return torch.where(total > 0, ids, -1)


def check_uniforms(op: str, uniforms: torch.Tensor) -> None:
    """Raise ValueError where the CPU holds a number outside [0, 1); a GPU is not waited for."""
    if uniforms.device.type == "cpu" and not ((uniforms >= 0) & (uniforms < 1)).all():
        wrong = uniforms[~((uniforms >= 0) & (uniforms < 1))][0].item()
        raise ValueError(f"{op}: uniforms hold {wrong}, expected numbers in [0, 1)")


def sample_tokens_ref(
    logits: torch.Tensor, uniforms: torch.Tensor, temperature: float, top_k: int, top_p: float
) -> torch.Tensor:
    """The definition, on whole rows."""
    check_uniforms("sample_tokens", uniforms)
    law = Law.of("sample_tokens", logits.shape[1], temperature, top_k, top_p)
    return draw(law_weights(logits, law), uniforms)


def _cpp(
    logits: torch.Tensor, uniforms: torch.Tensor, temperature: float, top_k: int, top_p: float
) -> torch.Tensor:
    check_uniforms("sample_tokens", uniforms)
    law = Law.of("sample_tokens", logits.shape[1], temperature, top_k, top_p)
    ids = _empty(logits)
    wide = logits.float()
    pointers = [_native.address(tensor) for tensor in (wide, uniforms, ids)]
    _native.module.sample_tokens(*pointers, *logits.shape, *law)
    return ids


def _triton(
    logits: torch.Tensor, uniforms: torch.Tensor, temperature: float, top_k: int, top_p: float
) -> torch.Tensor:
    check_uniforms("sample_tokens", uniforms)
    law = Law.of("sample_tokens", logits.shape[1], temperature, top_k, top_p)
    ids = _empty(logits)
    launch_sample(logits, uniforms, None, ids, 1, law)
    return ids


def _empty(logits: torch.Tensor, *rest: object) -> torch.Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.int64)


def check_logits(op: str, logits: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless `logits` is [*shape, V] with a usable V."""
    vocab = logits.shape[-1] if logits.dim() else 0
    if not 1 <= vocab <= MAX_VOCAB:
        raise ValueError(
            f"{op}: logits has shape {list(logits.shape)}, expected a vocabulary of 1..{MAX_VOCAB}"
        )
    check_tensor(op, "logits", logits, (*shape, vocab), FLOATS, logits.device)


def _check(
    logits: torch.Tensor, uniforms: torch.Tensor, temperature: float, top_k: int, top_p: float
) -> torch.device:
    op, rows = "sample_tokens", logits.shape[:1]
    check_logits(op, logits, rows)
    check_tensor(op, "uniforms", uniforms, rows, (torch.float64,), logits.device)
    Law.of(op, logits.shape[-1], temperature, top_k, top_p)
    return logits.device


_OP = register(
    "sample_tokens",
    "(Tensor logits, Tensor uniforms, float temperature, int top_k, float top_p, str backend)"
    " -> Tensor",
    check=_check,
    fake=_empty,
    torch=sample_tokens_ref,
    cpp=_cpp,
    triton=_triton,
)


def sample_tokens(
    logits: torch.Tensor,
    uniforms: torch.Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    backend: str = "auto",
) -> torch.Tensor:
    """The token of each row that its uniform falls on: [R] int64, the same on every backend; -1 for
    a row that holds a NaN or whose largest logit is infinite.

    Args:
        logits: [R, V] float32, float16 or bfloat16.
        uniforms: [R] float64 in [0, 1), one number a row.
        temperature: from 1e-6 to 1e6.
        top_k: tokens kept, ties with the last of them included; 0 keeps all.
        top_p: share of the probability that is kept, above 0; 1.0 keeps all.
        backend: see `xspec_kernels`.

    Raises:
        ValueError: a shape, dtype, device or number is wrong, or a tensor is not contiguous. A
            uniform outside [0, 1) raises on the CPU; on a GPU it gives some token.
    """
    return _OP(logits, uniforms, temperature, top_k, top_p, backend)
