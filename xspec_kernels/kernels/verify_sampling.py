"""verify_sampling: the path of a draft tree that is accepted where the target samples.

Lossless: what is emitted follows the target's law, that of `sample_tokens`, whatever was drafted.

Drafts that are given, whoever proposed them (`draft_probs` None). The token after every node is
drawn from the target with that node's own uniform, and a draft is accepted iff it is that token. If
uniforms belong to positions, the answer is the one that plain sampling gives with the same
uniforms, and no draft can change it (Daliri et al., arXiv:2408.07978). A draft is accepted with the
target's probability of it, the most a proposal without randomness can have.

Drafts that were drawn (`draft_probs`). The children of a node were drawn one after another from its
row q, without replacement. They are tried in their order; the law p starts as the target's:

    accept x with probability min(1, p(x) / q(x))
    else     p <- max(p - q, 0) / sum, then q <- q without x / sum

and where no child is left, the token is drawn from p (recursive rejection: Leviathan et al.,
arXiv:2211.17192, Miao et al., SpecInfer, arXiv:2305.09781, Jeon et al., arXiv:2402.14160). A child
whose q is 0 was not drawn: it is taken as given, accepted with p(x), or else removed from p.

Probabilities are integers in units of 2^-40, so every backend decides alike. Their rounding leaves
less than V 2^-39 of the law's mass where it should not be; where it leaves p empty after a
rejection, which exact arithmetic excludes, the token is drawn from the target's own law.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from xspec_kernels import _native
from xspec_kernels._dispatch import check_nodes, check_tensor, register
from xspec_kernels.kernels._sampling_triton import launch_sample
from xspec_kernels.kernels._verify_sampling_ref import rejection_ref
from xspec_kernels.kernels._verify_sampling_triton import launch_rejection
from xspec_kernels.kernels.sample_tokens import (
    Law,
    check_logits,
    check_uniforms,
    draw,
    law_weights,
)
from xspec_kernels.kernels.verify_greedy import VerifyResult, verify_greedy

_OP_NAME = "verify_sampling"


class _Inputs(NamedTuple):
    """What the implementations take, in the order of the schema; see `verify_sampling`."""

    logits: torch.Tensor
    token_ids: torch.Tensor
    parent_idx: torch.Tensor
    ancestor_bits: torch.Tensor
    uniforms: torch.Tensor
    num_rows: torch.Tensor | None
    draft_probs: torch.Tensor | None
    temperature: float
    top_k: int
    top_p: float

    def law(self) -> Law:
        """Raises ValueError where a number is out of range."""
        return Law.of(_OP_NAME, self.logits.shape[2], self.temperature, self.top_k, self.top_p)

    def check_values(self) -> None:
        """Raise ValueError for numbers on the CPU that are no probabilities."""
        check_uniforms(_OP_NAME, self.uniforms)
        if self.draft_probs is None or self.draft_probs.device.type != "cpu":
            return
        least, most = self.draft_probs.aminmax()
        if not 0 <= least <= most <= 1:
            raise ValueError(
                f"{_OP_NAME}: draft_probs lie in {least.item()}..{most.item()}, expected 0..1"
            )

    def follow(self, ids: torch.Tensor, backend: str) -> VerifyResult:
        """The longest path along the tokens `ids` that every row drew."""
        target_ids = ids.view(self.token_ids.shape).to(self.token_ids.dtype)
        return verify_greedy(
            self.token_ids, self.parent_idx, target_ids, self.ancestor_bits, self.num_rows,
            backend=backend,
        )  # fmt: skip


def verify_sampling_ref(*given: Any) -> VerifyResult:
    """The definition: every row's token and `verify_greedy`, or the rejections in sequence."""
    x = _Inputs(*given)
    x.check_values()
    if x.draft_probs is not None:
        tree = (x.logits, x.token_ids, x.parent_idx, x.uniforms, x.num_rows)
        return rejection_ref(*tree, x.draft_probs, x.law())
    weights = law_weights(x.logits.flatten(0, 1), x.law())
    return x.follow(draw(weights, x.uniforms.flatten()), "torch")


def _cpp(*given: Any) -> VerifyResult:
    """Looks at no more rows than the path has."""
    x = _Inputs(*given)
    x.check_values()
    out, logits = _empty(*x), x.logits.float()
    tensors = (logits, *x[1:7], *out)
    module = _native.module
    wide = x.token_ids.dtype == torch.int64
    run = module.verify_sampling_int64 if wide else module.verify_sampling_int32
    run(*(_native.address(tensor) for tensor in tensors), *logits.shape, *x.law())
    return out


def _triton(*given: Any) -> VerifyResult:
    x = _Inputs(*given)
    x.check_values()
    if x.draft_probs is None:
        ids = torch.empty_like(x.token_ids, dtype=torch.int64)
        launch_sample(x.logits, x.uniforms, x.num_rows, ids, ids.shape[1], x.law())
        return x.follow(ids, "triton")
    out = _empty(*x)
    tree = (x.logits, x.token_ids, x.parent_idx, x.uniforms, x.num_rows)
    launch_rejection(*tree, x.draft_probs, out, x.law())
    return out


def _empty(*given: Any) -> VerifyResult:
    x = _Inputs(*given)
    return VerifyResult(
        x.parent_idx.new_empty(x.parent_idx.shape[0]),
        torch.empty_like(x.parent_idx),
        torch.empty_like(x.token_ids),
    )


def _check(*given: Any) -> torch.device:
    x = _Inputs(*given)
    op, device, shape = _OP_NAME, x.token_ids.device, x.token_ids.shape
    check_nodes(op, "token_ids", x.token_ids)
    check_tensor(op, "token_ids", x.token_ids, shape, (torch.int32, torch.int64), device)
    check_logits(op, x.logits, shape)
    logits = x.logits
    for name, tensor, expected, dtypes in (
        ("logits", logits, logits.shape, (logits.dtype,)),
        ("parent_idx", x.parent_idx, shape, (torch.int32,)),
        ("ancestor_bits", x.ancestor_bits, shape, (torch.int64,)),
        ("uniforms", x.uniforms, shape, (torch.float64,)),
        ("num_rows", x.num_rows, shape[:1], (torch.int32,)),
        ("draft_probs", x.draft_probs, logits.shape, (torch.float32,)),
    ):
        if tensor is not None:
            check_tensor(op, name, tensor, expected, dtypes, device)
    x.law()
    return device


_OP = register(
    _OP_NAME,
    "(Tensor logits, Tensor token_ids, Tensor parent_idx, Tensor ancestor_bits, Tensor uniforms,"
    " Tensor? num_rows, Tensor? draft_probs, float temperature, int top_k, float top_p,"
    " str backend) -> (Tensor accept_len, Tensor accept_path, Tensor output_ids)",
    check=_check,
    fake=_empty,
    torch=verify_sampling_ref,
    cpp=_cpp,
    triton=_triton,
)


def verify_sampling(
    logits: torch.Tensor,
    token_ids: torch.Tensor,
    parent_idx: torch.Tensor,
    ancestor_bits: torch.Tensor,
    uniforms: torch.Tensor,
    num_rows: torch.Tensor | None = None,
    *,
    draft_probs: torch.Tensor | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    backend: str = "auto",
) -> VerifyResult:
    """Accepted path and tokens to emit, as `verify_greedy` returns them; a chain is a tree whose
    parents are i - 1. A row that has no law (see `sample_tokens`) emits -1.

    Args:
        logits: [B, N, V] float32, float16 or bfloat16, the target's after each node.
        token_ids: [B, N] int32 or int64, token of each node, N <= 64.
        parent_idx: [B, N] int32, -1 for node 0, a lower index elsewhere.
        ancestor_bits: [B, N] int64 from `tree_mask` of the same parents.
        uniforms: [B, N] float64 in [0, 1), independent of the drafts where these are given: that of
            a node draws the token after it. With `draft_probs` all N are independent: that of a
            node decides whether it is accepted, that of node 0 draws the last token.
        num_rows: [B] int32, nodes of each tree, the rest is padding; None means N.
        draft_probs: [B, N, V] float32 in 0..1, row i the law from which the children of node i
            were drawn without replacement; None: drafts are given.
        temperature, top_k, top_p: as in `sample_tokens`.
        backend: see `xspec_kernels`.

    Raises:
        ValueError: a shape, dtype, device or number is wrong, or a tensor is not contiguous.
            Values of `uniforms` and `draft_probs` out of range raise on the CPU; on a GPU they
            give some token.
    """
    return VerifyResult(
        *_OP(
            logits, token_ids, parent_idx, ancestor_bits, uniforms, num_rows, draft_probs,
            temperature, top_k, top_p, backend,
        )
    )  # fmt: skip
