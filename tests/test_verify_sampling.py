"""Sampling: one law on every backend, that of transformers, whatever is drafted."""

from __future__ import annotations

import math
import random

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from conftest import INTERPRETED
from op_cases import bits_of, chain, greedy_oracle, int32, padded, random_tree
from sampling_cases import DRAFTS, LAWS, LEVEL, Toy, p_value, warped
from xspec_kernels import sample_tokens, verify_greedy, verify_sampling
from xspec_kernels.kernels import _sampling_triton, _verify_sampling_triton
from xspec_kernels.kernels.sample_tokens import Law, law_weights, token_weights

pytestmark = pytest.mark.usefixtures("poisoned")
compiled_only = pytest.mark.skipif(INTERPRETED, reason="not about a kernel")
# The interpreter takes milliseconds for every step of a kernel.
VOCABS = [40] if INTERPRETED else [1, 2, 7, 64, 150]
TREE = [-1, 0, 0, 1, 1, 3]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Small rows have several blocks."""
    for module in (_sampling_triton, _verify_sampling_triton):
        monkeypatch.setattr(module, "BLOCK", 32)


def rows(seed: int, vocab: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Logits [6, V]: ordinary rows, equal values, -inf, a NaN, an infinite maximum."""
    logits = 4 * torch.randn(6, vocab, generator=torch.Generator().manual_seed(seed))
    logits[1] = logits[1].round()
    logits[2, 1:] = torch.where(logits[2, 1:] < 0, -math.inf, logits[2, 1:])
    logits[3, seed % vocab] = math.nan
    logits[4, seed % vocab] = math.inf
    return logits.to(dtype)


def uniforms(seed: int, *shape: int) -> torch.Tensor:
    make = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, dtype=torch.float64, generator=make)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_tokens_equal_the_reference(law, dtype, op_backend):
    if INTERPRETED and dtype == torch.bfloat16 and law != "all":
        pytest.skip("the law begins with float32")
    for vocab in VOCABS:
        logits, numbers = rows(vocab, vocab, dtype), uniforms(vocab, 6)
        want = sample_tokens(logits, numbers, **LAWS[law], backend="torch")
        logits, numbers = logits.to(op_backend.device), numbers.to(op_backend.device)
        got = sample_tokens(logits, numbers, **LAWS[law], backend=op_backend.name)
        assert got.tolist() == want.tolist()
        assert got[3:5].tolist() == [-1, -1] and (got[[0, 1, 2, 5]] >= 0).all()


@compiled_only
def test_large_vocabularies_equal_the_reference(seed):
    for vocab in (5000, 32001):
        logits = torch.randn(3, vocab) * torch.tensor([[0.01], [1.0], [8.0]])
        for law in LAWS.values():
            numbers = uniforms(seed, 3)
            want = sample_tokens(logits, numbers, **law, backend="torch")
            assert sample_tokens(logits, numbers, **law).tolist() == want.tolist()


@compiled_only
def test_weights_are_exponentials(seed):
    distance = torch.cat((torch.rand(20000) * 32, torch.tensor([0.0, 29.99, 30.0, math.inf])))
    weights = token_weights(-distance, torch.zeros(1)).double()
    exact = 2.0**40 * torch.exp(-distance.double())
    assert ((weights - exact).abs() <= 3e-7 * exact + 1).all()
    assert weights[20000].item() == 2**40 and not weights[-2:].any()


@compiled_only
@pytest.mark.parametrize("law", LAWS)
def test_law_is_that_of_transformers(law, seed):
    logits = 3 * torch.randn(40, 500)
    numbers = Law.of("test", 500, **({"temperature": 1.0, "top_k": 0, "top_p": 1.0} | LAWS[law]))
    weights = law_weights(logits, numbers).double()
    got, want = weights / weights.sum(-1, keepdim=True), warped(logits, **LAWS[law])
    assert not got[want == 0].any() and got[want > 1e-10].all()
    # A score of 16 is rounded to 1e-6, here once more than there.
    assert (got - want).abs().max() < 1e-6


@compiled_only
def test_each_warper_keeps_the_same_set(seed):
    """One at a time and in transformers' order, over many values; ties at the edge are kept."""
    logits = torch.randn(60, 90)
    logits[:20] = (2 * logits[:20]).round() / 2
    for temperature in (0.3, 1.0, 2.5):
        for top_k in (0, 1, 7, 89, 90, 200):
            for top_p in (1.0, 0.999, 0.9, 0.3, 1e-3):
                scores = TemperatureLogitsWarper(temperature)(None, logits)
                if top_k:
                    scores = TopKLogitsWarper(top_k)(None, scores)
                if top_p < 1:
                    scores = TopPLogitsWarper(top_p)(None, scores)
                kept = law_weights(logits, Law.of("test", 90, temperature, top_k, top_p)) > 0
                theirs = scores.isfinite()
                assert torch.equal(kept[20:], theirs[20:]), (temperature, top_k, top_p)
                least = scores.masked_fill(~theirs, math.inf).amin(-1, keepdim=True)
                scaled = logits / temperature
                assert not (theirs & ~kept).any()
                assert (scaled == least)[kept & ~theirs].all()


def test_token_is_where_the_running_sum_passes(op_backend):
    device = op_backend.device
    chances = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25])
    numbers = [0.0, 0.2499, 0.2501, 0.7499, 0.7501, 1 - 2.0**-53]
    numbers = torch.tensor(numbers, dtype=torch.float64, device=device)
    logits = chances.log().expand(6, -1).contiguous().to(device)
    got = sample_tokens(logits, numbers, backend=op_backend.name)
    assert got.tolist() == [1, 1, 3, 3, 4, 4]


@pytest.mark.parametrize("law", [{"top_k": 2}, {"top_p": 0.5}])
def test_ties_at_the_edge_are_kept(law, op_backend):
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 0.0]] * 8, device=op_backend.device)
    # 3.0 holds 0.52 of the four, and 0.47 where it has a tie beside it.
    if "top_p" in law:
        logits[:, 4] = 3.0
    numbers = ((torch.arange(8) + 0.5) / 8).double().to(op_backend.device)
    got = sample_tokens(logits, numbers, **law, backend=op_backend.name)
    assert set(got.tolist()) == ({1, 2, 3} if "top_k" in law else {1, 4})


def case(rng: random.Random, batch: int, nodes: int, vocab: int, ragged: bool) -> list:
    """[logits, tokens, parents, bits, uniforms, num_rows, draft laws] with rows that are damaged,
    equal laws, children that were not drawn, and duplicates."""
    make = torch.Generator().manual_seed(rng.randrange(2**31))
    sizes = [rng.randint(0, nodes) if ragged else nodes for _ in range(batch)]
    trees = [random_tree(rng, size)[:size] for size in sizes]
    logits = 1.5 * torch.randn(batch, nodes, vocab, generator=make)
    draft = (logits + torch.randn(logits.shape, generator=make)).softmax(-1)
    kind = torch.rand(batch, nodes, 1, generator=make)
    draft = torch.where(kind < 0.2, logits.softmax(-1), draft)
    draft = torch.where(kind > 0.9, 0, draft)
    draft[..., 0] = 0
    if rng.random() < 0.3:
        logits[0, rng.randrange(nodes), 0] = math.nan
    return [
        logits,
        torch.randint(-1, vocab, (batch, nodes), generator=make),
        int32([padded(tree, nodes, 0) for tree in trees]),
        torch.tensor([bits_of(tree, nodes) for tree in trees]),
        torch.rand(batch, nodes, generator=make, dtype=torch.float64),
        int32(sizes) if ragged else None,
        draft.contiguous(),
    ]


def check(op_backend, inputs: list, law: dict, dtype: torch.dtype = torch.int64) -> None:
    """All outputs equal the reference."""
    inputs = [*inputs[:1], inputs[1].to(dtype), *inputs[2:]]
    got = []
    for name, device in (("torch", "cpu"), (op_backend.name, op_backend.device)):
        *given, draft = [None if x is None else x.to(device) for x in inputs]
        for probabilities in (None, draft):
            found = verify_sampling(*given, draft_probs=probabilities, **law, backend=name)
            got.append([x.cpu() for x in found])
    for mine, theirs in zip(got[2:], got[:2], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
        assert mine[2].dtype == dtype


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("nodes", [1, 3, 14])
def test_verdicts_equal_the_reference(law, nodes, op_backend, rng):
    if op_backend.name == "torch":
        pytest.skip("the reference itself")
    if INTERPRETED and (nodes, law) not in ((1, "all"), (3, "top_k"), (14, "cool"), (3, "joined")):
        pytest.skip("the interpreter takes too long for all")
    for vocab in (40,) if INTERPRETED else (3, 40):
        for ragged in (False, True):
            inputs = case(rng, 2, nodes, vocab, ragged)
            check(op_backend, inputs, LAWS[law], torch.int32 if ragged else torch.int64)


def test_given_drafts_follow_the_drawn_tokens(op_backend, rng):
    """Acceptance is that of a walk along the tokens which every row draws by itself."""
    device = op_backend.device
    logits, tokens, parents, bits, numbers, _, _ = case(rng, 4, 9, 3, False)
    logits = logits.nan_to_num()
    drawn = sample_tokens(logits.flatten(0, 1), numbers.flatten(), backend="torch").view(4, 9)
    args = [x.to(device) for x in (logits, tokens, parents, bits, numbers)]
    got = verify_sampling(*args, backend=op_backend.name)
    for b in range(4):
        tree = (parents[b].tolist(), tokens[b].tolist(), drawn[b].tolist())
        path, emitted = greedy_oracle(*tree)
        assert got.accept_path[b].tolist() == padded(path, 9)
        assert got.output_ids[b].tolist() == padded(emitted, 9)


def test_sharp_laws_decide_as_greedy(op_backend, rng):
    device = op_backend.device
    logits, tokens, parents, bits, numbers, _, _ = case(rng, 2, 5, 3, False)
    logits = logits.nan_to_num()
    args = [x.to(device) for x in (logits, tokens, parents, bits, numbers)]
    want = verify_greedy(tokens, parents, logits.argmax(-1), bits, backend="torch")
    for law in ({"temperature": 1e-6}, {"top_k": 1}, {"top_p": 1e-6}):
        got = verify_sampling(*args, **law, backend=op_backend.name)
        assert torch.equal(got.output_ids.cpu(), want.output_ids)


@pytest.mark.parametrize("drawn", [True, False])
def test_equal_laws_accept_a_drawn_chain(drawn, op_backend):
    """Where the draft's law is the target's, the first child is accepted for sure."""
    device, vocab = op_backend.device, 6
    make = torch.Generator().manual_seed(3)
    logits = torch.randn(8, 4, vocab, generator=make)
    law = logits.softmax(-1)
    tokens = torch.zeros(8, 4, dtype=torch.int64)
    tokens[:, 1:] = law[:, :3].flatten(0, 1).multinomial(1, generator=make).view(8, 3)
    parents, bits = int32([chain(4)] * 8), torch.tensor([bits_of(chain(4), 4)] * 8)
    args = [x.to(device) for x in (logits, tokens, parents, bits, uniforms(1, 8, 4))]
    draft = law.to(device) if drawn else None
    got = verify_sampling(*args, draft_probs=draft, backend=op_backend.name)
    assert (got.accept_len == 3).all() == drawn


def test_rejected_siblings_are_never_emitted(op_backend):
    """Children that were not drawn: the law without them is what is left."""
    device = op_backend.device
    logits = torch.zeros(1, 4, 4, device=device)
    given = [torch.tensor([[0, 0, 1, 2]]), int32([[-1, 0, 0, 0]]), torch.tensor([[1, 3, 5, 9]])]
    given = [x.to(device) for x in given]
    zero = torch.zeros(1, 4, 4, device=device)
    for last in (0.0, 0.5, 0.99):
        numbers = torch.tensor([[last, 0.26, 0.34, 0.51]], dtype=torch.float64, device=device)
        got = verify_sampling(logits, *given, numbers, draft_probs=zero, backend=op_backend.name)
        assert (got.accept_len.item(), got.output_ids[0, 0].item()) == (0, 3)
    for node, number in ((1, 0.24), (2, 0.32), (3, 0.49)):
        numbers = torch.full((1, 4), 0.9, dtype=torch.float64, device=device)
        numbers[0, node] = number
        got = verify_sampling(logits, *given, numbers, draft_probs=zero, backend=op_backend.name)
        assert got.accept_path[0, 0].item() == node


SHAPES = {"chain": chain(4), "siblings": [-1, 0, 0, 0], "tree": TREE}


@compiled_only
@pytest.mark.parametrize("law", ["all", "joined"])
@pytest.mark.parametrize("drafts", DRAFTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_follow_the_law(shape, drafts, law, seed):
    """First token and three in a row, against every sequence's probability."""
    toy, make = Toy.of(7, SHAPES[shape]), torch.Generator().manual_seed(seed)
    tokens = toy.trees(20000, make, drafts)
    got = toy.verify(tokens, make, drafts, **LAWS[law])
    for length in (1, 3):
        counts = toy.counts(got.output_ids, length, make, **LAWS[law])
        assert p_value(counts, toy.law(length, **LAWS[law])) > LEVEL
    assert got.accept_len.float().mean() > 0.3


@compiled_only
@pytest.mark.parametrize("drafts", DRAFTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_same_test_rejects_a_skipped_residual(shape, drafts, seed):
    """As above, but after a rejection the token is drawn as if nothing had been rejected."""
    toy, make = Toy.of(7, SHAPES[shape]), torch.Generator().manual_seed(seed)
    tokens = toy.trees(20000, make, drafts)
    got = toy.verify(tokens, make, drafts)
    last = torch.zeros(len(tokens), dtype=torch.int64)
    accepted = got.accept_len > 0
    ends = got.accept_path.gather(1, (got.accept_len - 1).clamp_min(0)[:, None].long())[:, 0]
    last[accepted] = ends[accepted].long()
    context = tokens.gather(1, last[:, None])[:, 0]
    again = warped(toy.logits)[context].multinomial(1, generator=make)[:, 0]
    inner = torch.tensor([node in toy.parents for node in range(len(toy.parents))])
    at = got.accept_len.long()[:, None]
    broken = got.output_ids.scatter(
        1, at, torch.where(inner[last], again, got.output_ids.gather(1, at)[:, 0])[:, None]
    )
    assert p_value(toy.counts(broken, 3, make), toy.law(3)) < LEVEL**2


def arguments(**changes):
    made = {
        "logits": torch.zeros(2, 4, 5),
        "token_ids": torch.zeros(2, 4, dtype=torch.int64),
        "parent_idx": torch.zeros(2, 4, dtype=torch.int32),
        "ancestor_bits": torch.zeros(2, 4, dtype=torch.int64),
        "uniforms": torch.zeros(2, 4, dtype=torch.float64),
    }
    return made | changes


LAW_ERRORS = [
    ({"temperature": 0.0}, "temperature is 0.0"),
    ({"temperature": -1.0}, "temperature is -1.0"),
    ({"temperature": math.nan}, "temperature is nan"),
    ({"top_k": -1}, "top_k is -1"),
    ({"top_p": 0.0}, "top_p is 0.0"),
    ({"top_p": 1.5}, "top_p is 1.5"),
    ({"top_p": math.nan}, "top_p is nan"),
]


@compiled_only
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *LAW_ERRORS,
        ({"logits": torch.zeros(2, 3, 5)}, r"logits has shape \[2, 3, 5\], expected \[2, 4, 5\]"),
        ({"logits": torch.zeros(2, 4, 0)}, "expected a vocabulary of"),
        ({"logits": torch.zeros(2, 4, 5).double()}, "logits is torch.float64"),
        ({"uniforms": torch.zeros(2, 4)}, "uniforms is torch.float32"),
        ({"uniforms": torch.zeros(2, 5, dtype=torch.float64)}, "uniforms has shape"),
        ({"uniforms": torch.ones(2, 4, dtype=torch.float64)}, "uniforms hold 1.0"),
        ({"uniforms": torch.zeros(2, 4, dtype=torch.float64) - 0.1}, "uniforms hold -0.1"),
        ({"uniforms": torch.full((2, 4), math.nan, dtype=torch.float64)}, "uniforms hold nan"),
        ({"draft_probs": torch.zeros(2, 4, 6)}, "draft_probs has shape"),
        ({"draft_probs": torch.zeros(2, 4, 5) - 0.5}, "draft_probs lie in -0.5"),
        ({"draft_probs": torch.full((2, 4, 5), math.nan)}, "draft_probs lie in nan"),
        ({"parent_idx": torch.zeros(2, 4, dtype=torch.int64)}, "parent_idx is torch.int64"),
        ({"num_rows": torch.zeros(3, dtype=torch.int32)}, r"num_rows has shape \[3\]"),
        ({"token_ids": torch.zeros(2, 65, dtype=torch.int64)}, "token_ids has shape"),
    ],
)
def test_bad_arguments(changes, message):
    for backend in ("auto", "torch"):
        with pytest.raises(ValueError, match=message):
            verify_sampling(**arguments(**changes), backend=backend)


@compiled_only
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *LAW_ERRORS,
        ({"logits": torch.zeros(3)}, "logits has shape"),
        ({"logits": torch.zeros(4, 3).T}, "logits must be contiguous"),
        ({"uniforms": torch.zeros(2, dtype=torch.float64)}, r"expected \[3\]"),
        ({"uniforms": torch.full((3,), 1.0, dtype=torch.float64)}, "uniforms hold 1.0"),
    ],
)
def test_bad_rows(changes, message):
    made = {"logits": torch.zeros(3, 4), "uniforms": torch.zeros(3, dtype=torch.float64)}
    with pytest.raises(ValueError, match=message):
        sample_tokens(**(made | changes))


@compiled_only
def test_opcheck():
    law = (0.7, 2, 0.9, "auto")
    made = arguments()
    one = (made["logits"][0], made["uniforms"][0], *law)
    torch.library.opcheck(torch.ops.xspec.sample_tokens, one)
    inputs = (*made.values(), int32([4, 3]), torch.full((2, 4, 5), 0.2), *law)
    torch.library.opcheck(torch.ops.xspec.verify_sampling, inputs)
