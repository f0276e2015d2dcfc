"""Drafts that stay on the device: adapter_tail behind verify_tail, and a target that follows it."""

from __future__ import annotations

import pytest
import torch

from adapter_cases import Given, shaken
from conftest import INTERPRETED
from op_cases import bits_of, int32
from test_graphs import use_tape
from tiny import VOCAB, prompt, reference, tiny_llama
from xspec_kernels import (
    TOKENS,
    AdapterFeed,
    TailResult,
    adapter_forward,
    adapter_tail,
    verify_tail,
)
from xspec_runtime.adapters.token_adapter import TokenAdapter, TokenAdapterConfig
from xspec_runtime.config import SpecConfig
from xspec_runtime.drafters.adapter import AdapterDrafter
from xspec_runtime.drafters.base import ON_DEVICE, Request
from xspec_runtime.drafters.graph_adapter import AdapterFollower, GraphAdapterDrafter
from xspec_runtime.engine import SpeculativeDecoder
from xspec_runtime.targets.llama import LlamaTarget

PROMPT, NODES, GAMMA, NONE = 7, 6, 4, -1
compiled_only = pytest.mark.skipif(INTERPRETED, reason="plain calls on torch")


@pytest.fixture
def case(op_backend):
    if op_backend.name == "cuda":
        pytest.skip("no CUDA C++ kernels for these ops")
    return op_backend


def feed_of(fed: torch.Tensor, drafted: int, ahead: int = 1) -> AdapterFeed:
    words = int32([PROMPT, drafted, -9], fed.device)
    drafts = torch.full((GAMMA,), -77, device=fed.device)
    return AdapterFeed(fed, words[:1], words[1:2], words[2:], drafts, ahead)


class TailCase:
    """A chain of which the first `accepted` drafts are right, behind `known` tokens."""

    def __init__(self, known: int, accepted: int, device: str) -> None:
        self.known, self.accepted, self.device = known, accepted, device
        self.tokens = torch.randint(0, 70, (1, NODES), device=device)
        self.targets = torch.cat([self.tokens[:, 1:], self.tokens[:, :1]], 1)
        if 0 <= accepted < NODES - 1:
            self.targets[0, accepted] = (self.tokens[0, accepted + 1] + 1) % 70
        self.seqlens = int32([PROMPT + known - 1], device)
        self.root = torch.tensor([-5], device=device)

    def tail(self, backend: str) -> TailResult:
        """Idle where nothing is accepted, not even the root."""
        parents = list(range(-1, NODES - 1))
        word = torch.zeros(1, dtype=torch.int64, device=self.device)
        return verify_tail(
            self.targets, torch.zeros_like(self.targets, dtype=torch.int32), self.tokens,
            int32([parents], self.device), torch.tensor([bits_of(parents, NODES)]).to(self.device),
            [torch.zeros(1, 1, 128, 4, device=self.device)], self.seqlens, self.root, word,
            torch.zeros(1, TOKENS + NODES, dtype=torch.int64, device=self.device),
            int32([0 if self.accepted < 0 else NODES], self.device), backend=backend,
        )  # fmt: skip

    @property
    def said(self) -> list[int]:
        """What the round emitted."""
        return self.targets[0, : self.accepted + 1].tolist()


@pytest.mark.parametrize("accepted", [0, NODES - 1] if INTERPRETED else [-1, 0, 2, NODES - 1])
@pytest.mark.parametrize(
    ("known", "drafted"),
    [(3, 20), (18, 20)] if INTERPRETED else [(1, 0), (3, 20), (8, 11), (18, 20)],
)
def test_tokens_said_are_read_and_drafted_from(known, drafted, accepted, case, seed):
    given, round_ = Given("token", 20, layers=1), TailCase(known, accepted, case.device)
    network, fed = given.network(case.device), given.fed.to(case.device)
    expected = fed.tolist()
    expected[known : known + accepted + 1] = round_.said
    expected = expected[:20]
    feed = feed_of(fed, drafted)
    adapter_tail(network, feed, round_.tail(case.name), round_.tokens[0], round_.root,
                 round_.seqlens, backend=case.name)  # fmt: skip
    after = known + accepted + 1
    rows = min(max(after, drafted), 20)
    assert fed.tolist() == expected and feed.num_rows.item() == rows
    ids = adapter_forward(network, torch.tensor(expected[:rows]), backend="torch").ids.tolist()
    want = [ids[place] if place < rows else NONE for place in range(after - 1, after - 1 + GAMMA)]
    assert feed.drafts.tolist() == want


@pytest.mark.parametrize("accepted", [-1, 0, 2])
@pytest.mark.parametrize("ahead", [0, 1])
def test_states_of_the_accepted_path_are_read(ahead, accepted, case, seed):
    known, drafted = 3, 9
    given, round_ = Given("L4", 12), TailCase(known, accepted, case.device)
    given.fed[drafted:] = torch.nan
    network, fed = given.network(case.device), given.fed.to(case.device)
    hidden = torch.randn(NODES, fed.shape[1], device=case.device)
    expected = fed.clone()
    # The root's row predicted the first token of the round.
    expected[known : known + accepted + 1] = hidden[: accepted + 1]
    feed = feed_of(fed, drafted, ahead)
    adapter_tail(network, feed, round_.tail(case.name), hidden, round_.root, round_.seqlens,
                 backend=case.name)  # fmt: skip
    assert torch.equal(fed.nan_to_num(7), expected.nan_to_num(7))
    ids = adapter_forward(network, expected[:drafted], backend="torch").ids.tolist()
    first = known + accepted + 1 - ahead
    assert feed.drafts.tolist() == (ids[first : first + GAMMA] + [NONE] * GAMMA)[:GAMMA]


def test_wrong_inputs_are_named(seed):
    given, round_ = Given("token", 20, layers=1), TailCase(2, 1, "cpu")
    network, tail = given.network(), round_.tail("torch")
    state = (round_.root, round_.seqlens)
    with pytest.raises(ValueError, match="a TokenNetwork and fed of shape"):
        adapter_tail(network, feed_of(torch.zeros(9, 64), 9), tail, round_.tokens[0], *state)
    with pytest.raises(ValueError, match="rows has shape"):
        adapter_tail(network, feed_of(given.fed, 9), tail, round_.tokens[0, 1:], *state)
    with pytest.raises(ValueError, match="ahead is 2"):
        adapter_tail(network, feed_of(given.fed, 9, 2), tail, round_.tokens[0], *state)


# The drafter.

NEW, POSITIONS = 20, 16


def adapter_of(**values) -> TokenAdapter:
    torch.manual_seed(1)
    config = TokenAdapterConfig(VOCAB, 64, 1, 2, 64, POSITIONS, **values)
    return shaken(TokenAdapter(config))


def generate(target, drafter, ids, seen=None):
    """Rounds as (tokens emitted, accepted)."""
    decoder = SpeculativeDecoder(target, drafter, SpecConfig(6, NEW, ()))
    trees = [] if seen is None else seen
    out = decoder.generate(
        {"input_ids": ids}, Request(), on_round=lambda tree, *_: trees.append(tree)
    )
    return out.tokens, [(r.emitted, r.accepted) for r in out.rounds]


@compiled_only
@pytest.mark.parametrize("mode", ["plain", "tape"])
@pytest.mark.parametrize("hide", [False, True])
def test_chains_are_those_of_the_host(hide, mode, seed, monkeypatch):
    """An adapter that is often right: the draft's text is the answer, and it repeats what it
    reads."""
    if mode == "tape":
        use_tape(monkeypatch)
    model = tiny_llama(seed)
    target = LlamaTarget(model, 96, graphs=True)
    adapter = adapter_of()
    accepted = []
    # More than one request, and one after another that stays far from the adapter's positions.
    for i in range(3):
        ids = prompt(seed + i)
        truth = reference(model, ids, NEW)
        text = truth[:5] + [3] * 4 + truth[9:]
        answered = [adapter_says(adapter, text, truth) if not hide else adapter]
        options = {"hide_draft": True} if hide else {"text": lambda request, text=text: text}
        host = AdapterDrafter(answered[0], 4, **options)
        ours = GraphAdapterDrafter(answered[0], 4, target, **options)
        theirs = generate(LlamaTarget(model, 96, graphs=True), host, ids)
        seen = []
        mine = generate(target, ours, ids, seen)
        assert mine == theirs and mine[0] == truth
        assert all(token <= ON_DEVICE for tree in seen for token in tree.tokens[1:])
        accepted += [count for _, count in mine[1]]
    assert hide or (max(accepted) >= 3 and 0 in accepted)


def adapter_says(adapter: TokenAdapter, text: list[int], truth: list[int]) -> TokenAdapter:
    """The adapter with a head that gives the answer's next token at most places: what its rows are
    for this text is solved for."""
    ids = torch.tensor([text[:POSITIONS]])
    rows = {}
    hook = adapter.norm.register_forward_hook(lambda m, i, out: rows.update(out=out[0]))
    adapter(ids)
    hook.remove()
    wanted = torch.nn.functional.one_hot(torch.tensor(truth[1 : POSITIONS + 1]), VOCAB).float()
    wanted[6] = wanted[7]
    adapter.head.weight.copy_(torch.linalg.lstsq(rows["out"], wanted).solution.T)
    adapter.head.bias.zero_()
    return adapter


@compiled_only
@pytest.mark.parametrize("mode", ["plain", "tape"])
def test_an_adapter_may_read_the_answer(mode, seed, monkeypatch):
    if mode == "tape":
        use_tape(monkeypatch)
    model, ids = tiny_llama(seed), prompt(seed)
    truth, adapter = reference(model, ids, NEW), adapter_of(token_bias=True)
    text = [5, 9, 0, 7, 8, 11, 12]
    target = LlamaTarget(model, 96, graphs=True)
    drafter = GraphAdapterDrafter(adapter, 4, target, lambda request: text, reads_answer=True)
    drafts = []

    def after(tree, verdict, answer) -> None:
        """What the adapter makes of the answer behind this round."""
        known = [*answer, *verdict.tokens][:POSITIONS]
        fed = (known + [*text, *[0] * POSITIONS][len(known) :])[:POSITIONS]
        best = adapter(torch.tensor([fed]))[0].argmax(-1).tolist()
        place = len(answer) + len(verdict.tokens) - 1
        drafts.append((drafter._follower.drafts.tolist(), (best[place:] + [NONE] * 4)[:4]))

    decoder = SpeculativeDecoder(target, drafter, SpecConfig(6, NEW, ()))
    out = decoder.generate({"input_ids": ids}, Request(), on_round=after)
    assert out.tokens == truth and len(drafts) > 4
    assert [mine for mine, _ in drafts] == [theirs for _, theirs in drafts]


@compiled_only
def test_other_rounds_in_between(seed, monkeypatch):
    """A request of another drafter, or none, leaves the next one as by a fresh drafter, and the
    adapter does not run behind it.
    """
    followed, follow = [], AdapterFollower.follow
    monkeypatch.setattr(
        AdapterFollower, "follow", lambda *given: followed.append(1) or follow(*given)
    )
    model = tiny_llama(seed)
    target, ids = LlamaTarget(model, 96, graphs=True), prompt(seed)
    drafter = GraphAdapterDrafter(adapter_of(), 4, target, hide_draft=True)
    first = generate(target, drafter, ids)
    rounds = len(first[1])
    assert len(followed) == rounds
    assert generate(target, None, prompt(seed + 1))[0] == reference(model, prompt(seed + 1), NEW)
    assert len(followed) == rounds
    assert generate(target, drafter, ids) == first and len(followed) == 2 * rounds


@compiled_only
def test_nothing_is_proposed_where_no_drafts_follow(seed):
    """A sampling request is verified op by op, where a draft on the device is a row of NaN."""
    target = LlamaTarget(tiny_llama(seed), 96, graphs=True)
    drafter = GraphAdapterDrafter(adapter_of(), 4, target, hide_draft=True)
    config, given = SpecConfig(6, NEW, (), temperature=0.8), {"input_ids": prompt(seed)}
    plain = SpeculativeDecoder(target, None, config).generate(given)
    out = SpeculativeDecoder(target, drafter, config).generate(given, Request())
    assert out.tokens == plain.tokens and {r.rows for r in out.rounds} == {1}


@compiled_only
@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"gamma": 64}, "gamma must be in 1..63"),
        ({"hide_draft": False}, "needs a draft's text"),
        ({"target": False}, "needs a target with graphs"),
        ({"adapter": TokenAdapterConfig(99, 64, 1, 2, 64, 8)}, "the target has 128 tokens"),
    ],
)
def test_what_cannot_draft_is_refused(values, words):
    target = LlamaTarget(tiny_llama(0), 96, graphs=values.pop("target", True))
    adapter = TokenAdapter(values.pop("adapter", TokenAdapterConfig(VOCAB, 64, 1, 2, 64, 8)))
    given = {"gamma": 4, "hide_draft": True} | values
    with pytest.raises(ValueError, match=words):
        GraphAdapterDrafter(adapter.eval(), target=target, **given)
