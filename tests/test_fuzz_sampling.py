"""Random verifies where the target samples: every backend against the definition."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import INTERPRETED
from fuzz_cases import NAN, SEEDS, SIZES, SPREADS, fuzz, grow, seeded
from op_cases import bits_of, int32, padded
from test_verify_sampling import check as check_verify
from xspec_kernels import sample_tokens

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.skipif(INTERPRETED, reason="test_verify_sampling has the interpreter's cases"),
]


class Law(NamedTuple):
    """Keywords of the ops."""

    temperature: float
    top_k: int
    top_p: float


LAWS = st.builds(
    Law,
    temperature=st.sampled_from([1e-6, 0.1, 0.7, 1.0, 1.0, 3.0, 1e6]),
    top_k=st.sampled_from([0, 0, 1, 2, 5, 40, 10**6]),
    top_p=st.sampled_from([1.0, 1.0, 1 - 1e-9, 0.95, 0.5, 0.1, 1e-9]),
)


class Verify(NamedTuple):
    """A batch of trees of up to `nodes` nodes over a vocabulary; laws and drafts of every kind."""

    batch: int
    nodes: int
    spread: int
    vocab: int
    scale: float
    rounded: bool
    ragged: bool
    damaged: bool
    seed: int

    def logits(self, *shape: int) -> torch.Tensor:
        made = self.scale * torch.randn(*shape, self.vocab)
        if self.rounded:
            made = made.bfloat16()
        if self.damaged:
            made[torch.rand(made.shape) < 0.5 / self.vocab] = NAN
            made[torch.rand(made.shape) < 0.2] = -torch.inf
        return made

    def inputs(self) -> list[torch.Tensor | None]:
        rng = seeded(self.seed)
        sizes = [rng.randint(0, self.nodes) if self.ragged else self.nodes] * self.batch
        trees = [grow(rng, size, self.spread) for size in sizes]
        shape = (self.batch, self.nodes)
        logits = self.logits(*shape)
        near = logits.float().nan_to_num(0, 0, -1e9) / max(self.scale, 1)
        draft = (near + torch.randn(near.shape)).softmax(-1)
        kind = torch.rand(*shape, 1)
        draft = torch.where(kind < 0.3, near.softmax(-1), draft)
        draft = torch.where(kind > 0.8, draft * (draft > 0.5), draft)
        tokens = draft.flatten(0, 1) + 1e-3
        return [
            logits,
            tokens.multinomial(1).view(shape),
            int32([padded(tree, self.nodes, 0) for tree in trees]),
            torch.tensor([bits_of(tree, self.nodes) for tree in trees]),
            torch.rand(shape, dtype=torch.float64),
            int32(sizes) if self.ragged else None,
            draft,
        ]


CASES = st.builds(
    Verify,
    batch=st.integers(1, 3),
    nodes=SIZES,
    spread=SPREADS,
    vocab=st.integers(1, 8) | st.sampled_from([31, 64, 300]),
    scale=st.sampled_from([0.0, 1e-3, 1.0, 4.0, 300.0]),
    rounded=st.booleans(),
    ragged=st.booleans(),
    damaged=st.booleans(),
    seed=SEEDS,
)


@fuzz(40)
@given(case=CASES, law=LAWS)
def test_verify_sampling(case, law, op_backend):
    if op_backend.name == "torch":
        pytest.skip("the definition itself")
    check_verify(op_backend, case.inputs(), law._asdict())


@fuzz(100)
@given(case=CASES, law=LAWS, edge=st.sampled_from([None, 0.0, 1 - 2.0**-53]))
def test_sample_tokens(case, law, edge, op_backend):
    if op_backend.name == "torch":
        pytest.skip("the definition itself")
    seeded(case.seed)
    logits, numbers = case.logits(case.nodes), torch.rand(case.nodes, dtype=torch.float64)
    if edge is not None:
        numbers.fill_(edge)
    want = sample_tokens(logits, numbers, **law._asdict(), backend="torch")
    logits, numbers = logits.to(op_backend.device), numbers.to(op_backend.device)
    got = sample_tokens(logits, numbers, **law._asdict(), backend=op_backend.name).cpu()
    assert torch.equal(got, want)
    kept = logits.float().cpu().gather(1, got.clamp_min(0)[:, None])[:, 0] > -torch.inf
    assert (kept | (got < 0)).all()
