"""Adapters of states as drafters: positions, the target's states, losslessness."""

from __future__ import annotations

import pytest
import torch

from tiny import VOCAB, OracleDrafter, prompt, reference, tiny_llama
from xspec_runtime.adapters import alignment
from xspec_runtime.adapters.alignment import STATE_LEVELS
from xspec_runtime.adapters.eagle import EagleConfig, EagleFusion
from xspec_runtime.adapters.hidden import HiddenAdapter, HiddenAdapterConfig
from xspec_runtime.config import SpecConfig
from xspec_runtime.drafters.base import Drafter, Request
from xspec_runtime.drafters.hidden import DraftStates, HiddenDrafter
from xspec_runtime.engine import SpeculativeDecoder
from xspec_runtime.targets.tapped import TappedTarget

WIDTH, LENGTH, GAMMA = 64, 24, 3
SIZES = {"bottleneck": 8, "wide": 16, "intermediate": 24, "heads": 4, "positions": 64}


def adapter_of(level: str) -> HiddenAdapter | EagleFusion:
    torch.manual_seed(3)
    if level == alignment.EAGLE:
        adapter = EagleFusion(EagleConfig(VOCAB, 32, WIDTH, WIDTH, 1, 4, 64))
    else:
        adapter = HiddenAdapter(HiddenAdapterConfig(level, WIDTH, WIDTH, **SIZES))
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


def perfect(level: str, states: torch.Tensor) -> HiddenAdapter:
    """An adapter that gives the very states it has to predict."""
    adapter = adapter_of(level)

    def forward(draft=None, target=None, mask=None):
        positions = (draft if target is None else target).shape[1]
        return states[None, alignment.target_position(0) if target is not None else 0 :][
            :, :positions
        ]

    adapter.forward = forward
    return adapter


@pytest.mark.parametrize("level", ["L1", "L4", "L5", "L5F", "B1"])
@pytest.mark.parametrize("shift", [0, 1, -1])
def test_one_position_off_accepts_little(level, shift, model, ids, answer, states, monkeypatch):
    """A perfect adapter has every draft accepted, and hardly any once positions are shifted."""
    target = TappedTarget(model, 128)
    head = model.get_output_embeddings().weight
    padded = torch.cat([torch.zeros(2, WIDTH), states, torch.zeros(GAMMA + 2, WIDTH)])
    adapter = perfect(level, padded[2 + shift :])
    source = DraftStates(model, (), LENGTH, 128)
    drafter = HiddenDrafter(adapter, GAMMA, head, source, target.states)
    out = generate(target, drafter, ids)
    assert out.tokens == answer
    if shift == 0:
        assert all(r.accepted == r.rows - 1 for r in out.rounds)
    else:
        assert sum(r.accepted for r in out.rounds) <= len(out.rounds) // 2


@pytest.mark.parametrize("level", ["L5F", "B1", "EAGLE"])
def test_nothing_of_the_future_is_read(level, model, ids, answer, states):
    asked: list[int] = []

    def source(known: int) -> torch.Tensor:
        asked.append(known)
        return states[:known]

    drafter = drafter_of(level, model, TappedTarget(model, 128))
    drafter._target = source
    drafter.begin(Request(draft_inputs={"input_ids": ids}))
    for known in (1, 4, 5):
        drafter.propose(answer[:known], GAMMA + 1)
    assert asked == ([] if level == "EAGLE" else [1, 4, 5])


def test_chains_end_with_the_positions_an_adapter_tells_apart(model, ids):
    target = TappedTarget(model, 128)
    for level in ("B1", "EAGLE"):
        drafter = drafter_of(level, model, target)
        drafter._target = lambda known: torch.randn(known, WIDTH)
        drafter.begin(Request(draft_inputs={"input_ids": ids}))
        lengths = [len(drafter.propose([7] * n, 4)) - 1 for n in (60, 63, 64, 65, 70)]
        assert lengths == [3, 2, 1, 0, 0]


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
