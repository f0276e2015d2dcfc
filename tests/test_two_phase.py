"""Two adapters in one answer, and a head merged with memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tiny import VOCAB, prompt, reference, tiny_llama
from xspec_runtime.adapters.hidden import HiddenAdapter, HiddenAdapterConfig
from xspec_runtime.adapters.mini.hidden import COMBINED, state_arms, state_drafter
from xspec_runtime.adapters.mini.states import DRAFT
from xspec_runtime.adapters.training.runs import write_run
from xspec_runtime.config import SpecConfig
from xspec_runtime.drafters.base import Drafter, DraftTree, Request
from xspec_runtime.drafters.hidden import HiddenDrafter
from xspec_runtime.drafters.merge import MergedDrafter
from xspec_runtime.drafters.two_phase import SharedStates, TwoPhaseDrafter
from xspec_runtime.e2e import Options
from xspec_runtime.engine import SpeculativeDecoder
from xspec_runtime.targets.transformers import TransformersTarget
from xspec_runtime.workloads import MiniPair

WIDTH, LENGTH, GAMMA = 64, 20, 3
SIZES = {"bottleneck": 8, "intermediate": 16}
FIGURES = ("train_loss", "val_loss", "token_match", "consecutive_tokens", "cos_sim", "accept_90",
           "match_above_90")  # fmt: skip


class Noted:
    """Proposes one token below the root and notes when it was asked."""

    name = "noted"

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.calls: list[object] = []

    def begin(self, request: Request) -> None:
        self.calls.append(request)

    def propose(self, context, rows: int) -> DraftTree:
        self.asked.append(len(context))
        return DraftTree.chain(context[-1], [7] * min(1, rows - 1))

    def end(self, answer) -> None:
        self.calls.append(list(answer))


@pytest.fixture(scope="module")
def model():
    return tiny_llama(5)


@pytest.fixture(scope="module")
def ids():
    return prompt(5)


@pytest.fixture(scope="module")
def answer(model, ids) -> list[int]:
    return reference(model, ids, LENGTH)


def says(text: list[int], source=None) -> HiddenDrafter:
    """L1 that makes `text` of the draft, whatever that is."""
    adapter = HiddenAdapter(HiddenAdapterConfig("L1", VOCAB, VOCAB, bottleneck=4)).eval()
    adapter.forward = lambda draft: 20.0 * torch.eye(VOCAB)[text][None]
    head = torch.eye(VOCAB)
    return HiddenDrafter(adapter, GAMMA, head, source or (lambda r: torch.zeros(1, VOCAB)))


@pytest.mark.parametrize("right", [0, 1, 2, 5, 9])
def test_the_second_takes_over_where_the_draft_leaves_the_target(right, model, ids, answer):
    wrong = [(token + 1) % VOCAB for token in answer]
    first, then = says(answer[:right] + wrong[right:]), Noted()
    drafter = TwoPhaseDrafter(first, then)
    assert isinstance(drafter, Drafter)
    config = SpecConfig(GAMMA + 1, LENGTH, ())
    decoder = SpeculativeDecoder(TransformersTarget(model, 128), drafter, config)
    request = Request()
    out = decoder.generate({"input_ids": ids}, request)
    assert out.tokens == answer
    # While in step, rounds of a whole chain; the round that meets the first wrong token is the last
    # of them. Where the draft is wrong in the first token, which is given, there is none.
    known, rounds = 1, 0
    while right >= known:
        known += min(right - known, GAMMA) + 1
        rounds += 1
    assert [r.rows for r in out.rounds[:rounds]] == [GAMMA + 1] * rounds
    assert then.asked[0] == known and len(then.asked) >= len(out.rounds) - rounds - 1
    assert then.calls == [request, answer]


def test_the_second_takes_over_where_the_draft_ends(answer):
    then = Noted()
    drafter = TwoPhaseDrafter(says(answer[:4]), then)
    drafter.begin(Request())
    assert len(drafter.propose(answer[:1], 1)) == 1
    assert drafter.propose(answer[:1], 9).tokens == answer[:4]
    then.asked.clear()
    assert drafter.propose(answer[:4], 9).tokens == [answer[3], 7]
    assert drafter.propose(answer[:5], 9).tokens == [answer[4], 7]
    assert then.asked == [4, 5]


def test_draft_states_are_computed_once_a_request(answer):
    calls: list[Request] = []

    def source(request: Request) -> torch.Tensor:
        calls.append(request)
        return torch.zeros(1, VOCAB)

    shared = SharedStates(source)
    drafter = TwoPhaseDrafter(says(answer, shared), says(answer, shared), [shared])
    request = Request()
    # The same object asked again is another request.
    for count in (1, 2):
        drafter.begin(request)
        assert len(calls) == count
        drafter.end([])


def test_a_level_that_reads_the_target_is_never_in_step(model):
    adapter = HiddenAdapter(HiddenAdapterConfig("B1", WIDTH, WIDTH, heads=4, **SIZES)).eval()
    head = model.get_output_embeddings().weight
    drafter = HiddenDrafter(adapter, GAMMA, head, target=lambda known: torch.zeros(known, WIDTH))
    drafter.begin(Request())
    assert not drafter.in_step([5])


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Untrained adapters of the embedded pair in the folders that training writes."""
    folder = tmp_path_factory.mktemp("runs")
    for level in ("L4", "L5F", "B1"):
        torch.manual_seed(1)
        adapter = HiddenAdapter(HiddenAdapterConfig(level, 192, 128, **SIZES))
        record = {"command": "c", "level": level, "train_answers": 1, "val_answers": 1,
                  "split": "s", "draft": DRAFT, "finished": "1"}  # fmt: skip
        write_run(folder / level, adapter, [{"epoch": 1, **dict.fromkeys(FIGURES, 0.5)}], record)
    return folder


def test_combinations_are_named_and_those_that_make_none_refused(runs):
    for chosen, arms in (
        ("L4+B1", ["l4_b1", "l4_b1_hidden"]),
        ("TREE+B1", ["tree_b1"]),
        ("L4+L5F,TREE+L4+B1", ["l4_l5f", "l4_l5f_hidden", "tree_l4_b1", "tree_l4_b1_hidden"]),
    ):
        assert state_arms(runs, chosen) == ["constant", *arms]
    every = state_arms(runs)
    assert {"l4_b1", "l4_l5f_hidden", "tree_l4"} < set(every)
    assert not any("eagle" in arm for arm in every) and "TREE+EAGLE" in COMBINED
    for chosen in ("B1+L4", "L4+L5", "B1+L5F", "L4+", "L4+B1+L5F", "TREE", "TREE+", "L4+TREE"):
        with pytest.raises(ValueError, match=r"TREE\+ one or two of L1 to EAGLE; got"):
            state_arms(runs, chosen)
    with pytest.raises(FileNotFoundError, match="EAGLE"):
        state_arms(runs, "L4+EAGLE")


def test_combined_arms_answer_as_the_target_does(runs):
    options = Options("c", gamma=3, rows=9, max_new_tokens=12, adapters=runs, threads=1,
                      adapter_level="L4+L5F,TREE+B1,TREE+L4+B1")  # fmt: skip
    pair = MiniPair(options.settings())
    tasks = pair.scene_tasks(1)
    workload = pair.workload(tasks)
    plain = workload.arms["target"]().run(tasks[0])
    for name in pair.state_arms:
        arm = workload.arms[name]()
        outcome = arm.run(tasks[0])
        assert outcome.tokens == plain.tokens and any(r.rows > 1 for r in outcome.rounds), name
        tree = name.startswith("tree_")
        assert arm.decoder.config.rows == (9 if tree else 4)
        assert isinstance(arm.decoder.drafter, MergedDrafter) == tree


def test_two_phases_on_one_draft_run_it_once(runs):
    pair = MiniPair(Options("c", adapters=runs).settings())
    loaded: list[str] = []

    def draft(name: str):
        loaded.append(name)
        return pair._raw_draft

    drafter = state_drafter("l4_l5f", 3, runs, "", draft, pair._tapped)
    assert loaded == [DRAFT] and drafter.first._draft is drafter.then._draft
    hidden = state_drafter("l4_l5f_hidden", 3, runs, "", draft, pair._tapped)
    assert loaded == [DRAFT] and hidden.first._draft is None and hidden.then._draft is None
