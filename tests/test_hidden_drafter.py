"""Adapters of states as drafters: positions, the target's states, losslessness."""

from __future__ import annotations

import pytest
import torch

from tiny import VOCAB, OracleDrafter, prompt, reference, tiny_llama
from xspec_runtime.adapters import alignment
from xspec_runtime.adapters.alignment import STATE_LEVELS
from xspec_runtime.adapters.eagle import EagleConfig, EagleFusion
from xspec_runtime.adapters.hidden import READS_DRAFT, HiddenAdapter, HiddenAdapterConfig
from xspec_runtime.adapters.scoring.steps import StateAdapter
from xspec_runtime.config import SpecConfig
from xspec_runtime.drafters.base import Drafter, Request
from xspec_runtime.drafters.hidden import DraftStates, HiddenDrafter
from xspec_runtime.drafters.rollout import CachedLayers, StateRollout
from xspec_runtime.engine import SpeculativeDecoder
from xspec_runtime.targets.tapped import TappedTarget

WIDTH, LENGTH, GAMMA = 64, 24, 3
SIZES = {"bottleneck": 8, "wide": 16, "intermediate": 24, "heads": 4, "positions": 64}


def adapter_of(level: str, layers: int = 1, draft_width: int = WIDTH) -> StateAdapter:
    torch.manual_seed(3)
    if level == alignment.EAGLE:
        adapter = EagleFusion(EagleConfig(VOCAB, 32, WIDTH, draft_width, layers, 4, 64))
    else:
        config = HiddenAdapterConfig(level, WIDTH, draft_width, layers=layers, **SIZES)
        adapter = HiddenAdapter(config)
    return adapter.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def model():
    return tiny_llama(5)


@pytest.fixture(scope="module")
def ids():
    return prompt(5)


@pytest.fixture(scope="module")
def answer(model, ids) -> list[int]:
    return reference(model, ids, LENGTH)


@pytest.fixture(scope="module")
def states(model, ids, answer) -> torch.Tensor:
    """True states of the answer; state i predicts token i."""
    whole = torch.cat([ids, torch.tensor([answer[:-1]])], 1)
    with torch.inference_mode():
        return model.model(whole).last_hidden_state[0, ids.shape[1] - 1 :]


def generate(target, drafter, ids):
    decoder = SpeculativeDecoder(target, drafter, SpecConfig(GAMMA + 1, LENGTH, ()))
    return decoder.generate({"input_ids": ids}, Request(draft_inputs={"input_ids": ids}))


def drafter_of(level, model, target, **values) -> HiddenDrafter:
    head = model.get_output_embeddings().weight
    draft = DraftStates(model, (), LENGTH, 128)
    return HiddenDrafter(adapter_of(level), GAMMA, head, draft, target.states, **values)


@pytest.mark.parametrize("seed", range(3))
def test_the_target_keeps_the_states_of_what_it_committed(seed, model, ids, answer, states):
    target = TappedTarget(model, 128)
    out = generate(target, OracleDrafter(answer, seed), ids)
    assert out.tokens == answer and any(r.accepted for r in out.rounds)
    torch.testing.assert_close(target.states(LENGTH), states, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(target.states(3), states[:3], rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match="has committed"):
        target.states(10 * LENGTH)


@pytest.mark.parametrize("fast", [True, False])
def test_states_of_the_draft_predict_its_tokens(fast, model, ids, answer, states):
    source = DraftStates(model, (), LENGTH, 128)
    if not fast:
        source._text._steps, source._text._fast = source._text._step, None
    found = source(Request(draft_inputs={"input_ids": ids}))
    torch.testing.assert_close(found, states, rtol=1e-4, atol=1e-4)
    assert model.get_output_embeddings()(found).argmax(-1).tolist() == answer


@pytest.mark.parametrize("level", STATE_LEVELS)
@pytest.mark.parametrize("hide", [False, True])
def test_answers_are_the_target_s(level, hide, model, ids, answer):
    target = TappedTarget(model, 128)
    drafter = drafter_of(level, model, target, hide_draft=hide)
    assert isinstance(drafter, Drafter)
    assert generate(target, drafter, ids).tokens == answer
    # The next request is drafted for as by a fresh drafter.
    fresh = drafter_of(level, model, target, hide_draft=hide)
    chains = []
    for each in (drafter, fresh):
        each.begin(Request(draft_inputs={"input_ids": ids}))
        chains.append([each.propose(answer[:n], GAMMA + 1) for n in (1, 2)])
    assert chains[0] == chains[1]


def make_perfect(drafter: HiddenDrafter, level: str, states: torch.Tensor) -> None:
    """The adapter gives the very states it has to predict."""
    adapter, first = drafter._adapter, alignment.state_position(level, 0)
    if level in alignment.AHEAD:
        layers = drafter._rollout._layers
        adapter.body.leave = lambda x, into: states[layers.length - 1 + first][None]
    else:
        adapter.forward = lambda draft: states[None, first : first + draft.shape[1]]


@pytest.mark.parametrize("level", ["L1", "L4", "L5", "L5F", "B1"])
@pytest.mark.parametrize("shift", [0, 1, -1])
def test_one_position_off_accepts_little(level, shift, model, ids, answer, states):
    """A perfect adapter has every draft accepted, and hardly any once positions are shifted."""
    target = TappedTarget(model, 128)
    head = model.get_output_embeddings().weight
    padded = torch.cat([torch.zeros(2, WIDTH), states, torch.zeros(GAMMA + 2, WIDTH)])
    source = DraftStates(model, (), LENGTH, 128)
    drafter = HiddenDrafter(adapter_of(level), GAMMA, head, source, target.states)
    make_perfect(drafter, level, padded[2 + shift :])
    out = generate(target, drafter, ids)
    assert out.tokens == answer
    if shift == 0:
        assert all(r.accepted == r.rows - 1 for r in out.rounds)
    else:
        assert sum(r.accepted for r in out.rounds) <= len(out.rounds) // 2


AHEAD = pytest.mark.parametrize("level", ["L5F", "B1", "EAGLE"])


def whole_prefix_chain(adapter, level, head, draft, states, context, count):
    """The chain by the network itself, which reads the whole prefix again in every step."""
    tokens, chances, states = list(context), [], states[: len(context)]
    for _ in range(count):
        beside = torch.zeros(1, len(tokens), draft.shape[1])
        held = draft[: len(tokens)]
        beside[0, : len(held)] = held
        if level == alignment.EAGLE:
            logits = adapter(torch.tensor([tokens]), beside)[0, -1]
        else:
            beside = beside if level in READS_DRAFT else None
            states = torch.cat([states, adapter(beside, states[None])[0, -1:]])
            logits = head @ states[-1]
        best = logits.softmax(-1).max(-1)
        tokens.append(int(best.indices))
        chances.append(float(best.values))
    return tokens[len(context) :], torch.tensor(chances).cumprod(0)


@AHEAD
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("drafted", [0, 9, 40])
@torch.inference_mode()
def test_kept_keys_and_values_change_no_proposal(level, layers, drafted, model):
    """After misses, full acceptances, several prefixes at once and twice the same; draft hidden,
    shorter than the answer, and longer.
    """
    generator = torch.Generator().manual_seed(layers + drafted)
    head = model.get_output_embeddings().weight
    draft = torch.randn(drafted, 48, generator=generator)
    states = torch.randn(40, WIDTH, generator=generator)
    text = torch.randint(0, VOCAB, (40,), generator=generator).tolist()
    adapter = adapter_of(level, layers, 48)
    drafter = HiddenDrafter(adapter, GAMMA, head, lambda request: draft,
                            lambda known: states[:known], hide_draft=drafted == 0)  # fmt: skip
    for lengths in ((1, 2, 6, 7, 7, 11, 12, 30), (5, 8, 9)):
        drafter.begin(Request())
        for known in lengths:
            args = (adapter, level, head, draft, states, text[:known], GAMMA)
            tokens, scores = whole_prefix_chain(*args)
            tree = drafter.propose(text[:known], GAMMA + 1)
            assert tree.tokens[1:] == tokens, known
            torch.testing.assert_close(torch.tensor(tree.scores[1:]), scores, rtol=1e-4, atol=1e-6)
        drafter.end(text)


@AHEAD
def test_a_round_costs_what_was_committed_and_single_rows(level, model, ids, answer, monkeypatch):
    fed: list[int] = []
    feed = CachedLayers.__call__

    def counted(layers, x):
        fed.append(len(x))
        return feed(layers, x)

    monkeypatch.setattr(CachedLayers, "__call__", counted)
    target = TappedTarget(model, 128)
    drafter = drafter_of(level, model, target)
    layers = drafter._rollout._layers
    memory = [rows.data_ptr() for rows in layers._rows]
    for _ in range(2):
        fed.clear()
        out = generate(target, drafter, ids)
        first = fed[::GAMMA]
        new = [1] + [r.emitted for r in out.rounds]
        # The last rounds may be shorter than a chain.
        whole = sum(r.rows == GAMMA + 1 for r in out.rounds)
        assert whole > 4 and first[:whole] == new[:whole]
        assert all(fed[i] == 1 for i in range(whole * GAMMA) if i % GAMMA)
    assert out.tokens == answer
    assert [rows.data_ptr() for rows in layers._rows] == memory
    assert all(len(rows) == SIZES["positions"] for rows in layers._rows)
    # A request that ended, or failed, leaves no row behind.
    assert drafter._rollout._committed == 0 and drafter._known == 0


def test_heads_read_the_rows_that_the_target_computed(model, ids, answer, monkeypatch):
    """To the bit, and the target runs once a round."""
    read: list[torch.Tensor] = []
    computed: list[torch.Tensor] = []
    feed = StateRollout._feed

    def seen(rollout, rows):
        if len(read) == len(computed) - 1:
            read.append(rows)
        return feed(rollout, rows)

    monkeypatch.setattr(StateRollout, "_feed", seen)
    target = TappedTarget(model, 128)
    drafter = drafter_of("B1", model, target)
    hook = model.get_output_embeddings().register_forward_pre_hook(
        lambda module, inputs: computed.append(inputs[0][0].clone())
    )
    out = generate(target, drafter, ids)
    hook.remove()
    assert out.tokens == answer and len(computed) == 1 + len(out.rounds)
    committed = [1] + [r.emitted for r in out.rounds]
    assert len(read) > 5
    for rows, forward, count in zip(read, computed, committed, strict=False):
        assert torch.equal(rows, forward[:count])


@AHEAD
def test_nothing_of_the_future_is_read(level, model, ids, answer, states):
    asked: list[int] = []

    def source(known: int) -> torch.Tensor:
        asked.append(known)
        return states[:known]

    head = model.get_output_embeddings().weight
    drafter = HiddenDrafter(adapter_of(level), GAMMA, head, target=source, hide_draft=True)
    drafter.begin(Request())
    for known in (1, 4, 5):
        drafter.propose(answer[:known], GAMMA + 1)
    assert asked == ([] if level == "EAGLE" else [1, 4, 5])


def test_chains_end_with_the_positions_an_adapter_tells_apart(model):
    head = model.get_output_embeddings().weight
    for level in ("B1", "EAGLE"):
        drafter = HiddenDrafter(adapter_of(level), GAMMA, head, hide_draft=True,
                                target=lambda known: torch.randn(known, WIDTH))  # fmt: skip
        drafter.begin(Request())
        lengths = [len(drafter.propose([7] * n, 4)) - 1 for n in (60, 63, 64, 65, 70)]
        assert lengths == [3, 2, 1, 0, 0]
    with pytest.raises(ValueError, match="at most 64 rows"):
        drafter._rollout._layers(torch.zeros(65, WIDTH))


def test_a_floor_ends_a_chain(model, ids):
    target = TappedTarget(model, 128)
    for level in ("L4", "EAGLE"):
        drafter = drafter_of(level, model, target, floor=0.9999)
        drafter.begin(Request(draft_inputs={"input_ids": ids}))
        assert len(drafter.propose([7], 4)) == 2


def test_what_does_not_fit_is_refused(model, ids):
    head = model.get_output_embeddings().weight
    source = DraftStates(model, (), LENGTH, 128)
    with pytest.raises(ValueError, match="needs the draft's states"):
        HiddenDrafter(adapter_of("L4"), 3, head)
    with pytest.raises(ValueError, match="needs the target's states"):
        HiddenDrafter(adapter_of("B1"), 3, head, source)
    with pytest.raises(ValueError, match="width 64"):
        HiddenDrafter(adapter_of("L4"), 3, head[:, :32], source)
    with pytest.raises(ValueError, match="gamma"):
        HiddenDrafter(adapter_of("L4"), 0, head, source)
    drafter = HiddenDrafter(adapter_of("L4"), 3, head, lambda request: torch.zeros(4, 8))
    with pytest.raises(ValueError, match="width 64"):
        drafter.begin(Request())
