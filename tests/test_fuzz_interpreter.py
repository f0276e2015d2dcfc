"""Random cases of tree_attention and skinny_linear as Triton kernels, in Triton's interpreter."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from attention_cases import Round
from fuzz_cases import (
    NAN,
    Attention,
    Linear,
    attention_op,
    attentions,
    fuzz,
    linears,
    seeded,
)
from linear_cases import (
    EPILOGUES,
    EPS,
    arrive,
    cut,
    epilogue,
    flips,
    operands,
    oracle,
    row_norm,
)
from op_cases import int32
from test_skinny_linear import HALF_ULP
from test_tree_attention import errors, make
from xspec_kernels import norm_act, skinny_linear
from xspec_kernels.kernels import _tree_attention_triton as kernels
from xspec_kernels.kernels.tree_attention import tree_attention_ref
from xspec_kernels.workspace import Workspace

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("poisoned")]


@fuzz(180)
@given(
    first=attentions(290, 12, [32, 64], light=True),
    second=st.none() | st.integers(0, 40),
    spare=st.integers(0, 2),
    blocks=st.sampled_from([16, 64]),
)
def test_tree_attention(first, second, spare, blocks):
    """A ragged batch against float64, with NaN wherever nothing is to be read."""
    rng = seeded(first.seed)
    cases = [first] if second is None else [first, first._replace(n=second, nodes=3)]
    trees = [case.round(rng).tree for case in cases]
    case = make(
        rng, trees, [one.n for one in cases], (first.kv_heads * first.group, first.kv_heads),
        first.head_dim, first.dtype, first.width, max(len(tree.row) for tree in trees) + spare,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        tuned = kernels.Config(blocks, 16, 4)
        patch.setattr(kernels, "config", lambda *_: tuned)
        out = case.run("triton")
    ours, theirs = errors(case, out)
    # Torch's error can be 0 by chance; one rounding of the largest value is always granted.
    assert (
        ours.max()
        <= 2 * theirs.max() + torch.finfo(first.dtype).eps * case.v.nan_to_num().abs().max()
    )
    for b, tree in enumerate(trees):
        assert not out[b, len(tree.row) :].any()


def reference(whole: Round, width: int) -> torch.Tensor:
    depth, path_slot = whole.tree.tables(width)
    k, v = (x.transpose(0, 1)[None] for x in (whole.k, whole.v))
    tables = depth[None], path_slot[None], int32([whole.n])
    return tree_attention_ref(whole.q[None], k, v, *tables)[0]


# A node at the last depth whose far end is the first of the round's own slots.
DEEPEST = Attention(31, 33, 1, 1, 1, 32, 32, torch.float32, 0)


@fuzz(122)
@given(case=attentions(290, 10, [32], light=True), keep=st.integers(1, 10), reused=st.booleans())
@example(case=DEEPEST, keep=1, reused=False)
@example(case=DEEPEST._replace(n=95, group=2, dtype=torch.bfloat16), keep=9, reused=True)
def test_attention_holds_the_law(case: Attention, keep, reused):
    """A node among siblings full of garbage, and alone or in a chain that begins anywhere on its
    path: the same bits, and those of attention."""
    rng = seeded(case.seed)
    whole = case.round(rng)
    depth, _ = whole.tree.tables(case.width)
    deepest = whole.tree.row.index(int(depth.argmax()))
    path = whole.tree.path(rng.choice([deepest, rng.randrange(case.nodes)]))
    attention = attention_op("triton", reused, spare=rng.randint(0, 40))
    littered = whole.with_garbage(path, rng.choice([NAN, math.inf, 6e4]))
    row = littered.run(attention, case.width)[path[-1]]
    error = (row.float() - reference(whole, case.width)[path[-1]].float()).abs().max()
    assert error <= 3 * torch.finfo(case.dtype).eps * whole.v.abs().max() + 2e-6
    chain = whole.rows_of(path, min(keep, len(path))).run(attention, case.width)
    assert torch.equal(chain[-1], row)


def launch(case: Linear, x, w, rows, given, workspace=None, count=None):
    own = {name: part[rows] if name == "residual" else part for name, part in given.items()}
    if norm := given.get("norm"):
        own["norm"] = norm._replace(squares=norm.squares[:, rows].contiguous())
    return skinny_linear(x[rows], w, count, workspace=workspace, backend="triton", **own)


@fuzz(210)
@given(
    case=linears(70, 70, EPILOGUES, 5), bound=st.integers(0, 75), tma=st.booleans(),
    parts=st.sampled_from([0, 0, 1, 3, 40]),
)  # fmt: skip
def test_skinny_linear(case: Linear, bound, tma, parts):
    """Against float64, splits arriving in any order in a used workspace, rows bounded on the
    device; then some of the rows, shuffled and among garbage, by their bits."""
    rng = seeded(case.seed)
    x, w = operands(case.M, case.N, case.K, case.dtype)
    given = epilogue(case.epilogue, case.M, case.N, case.dtype)
    every, rows = list(range(case.M)), min(bound, case.M)
    workspace = Workspace("cpu")
    with pytest.MonkeyPatch.context() as patch:
        cut(patch, case.block_n, case.split_k, tma)
        allowed, taken = 1e-5, x
        if parts:
            norm = row_norm(x, parts)
            taken = norm_act(x, norm.weight, EPS, backend="torch")
            allowed = 1e-5 + flips(taken, w)
            if "gate" in case.epilogue:
                allowed = 16 * allowed.unflatten(1, (-1, 2)).sum(2)
        want = oracle(taken, w, **given)
        if parts:
            given["norm"] = norm
        whole = launch(case, x, w, every, given, workspace)
        error = (whole.double() - want).abs()
        assert whole.dtype == case.dtype
        assert bool((error <= 1.01 * HALF_ULP[case.dtype] * want.abs() + allowed).all())

        arrive(patch, rng.sample(range(case.split_k), case.split_k))
        workspace.buffer("linear.partial", (1,), torch.float32)
        workspace._storage["linear.partial"].fill_(NAN)
        some = launch(case, x, w, every, given, workspace, int32([bound]))
        assert torch.equal(some[:rows], whole[:rows])
        assert bool(some[rows:].isnan().all()), "rows that do not count are not written"

        moved = rng.sample(every, rng.randint(1, case.M))
        garbage = torch.full_like(x, rng.choice([NAN, math.inf]))
        garbage[moved[0]] = x[moved[0]]
        got = launch(case, garbage, w, moved, given, workspace)
        assert torch.equal(got[0], whole[moved[0]])
        assert not workspace.semaphores("linear.semaphore", 1).any()
        assert not workspace._storage["linear.semaphore"].any()
