"""Trained adapters of states as arms of the end-to-end comparison of the embedded pair."""

from __future__ import annotations

import pytest
import torch

from xspec_runtime.adapters.hidden import HiddenAdapter, HiddenAdapterConfig
from xspec_runtime.adapters.mini.hidden import constant_drafter, state_arms
from xspec_runtime.adapters.mini.states import DRAFT, write_scene_states
from xspec_runtime.adapters.training.runs import write_run
from xspec_runtime.adapters.training.states import ABSENT, open_states, read_head
from xspec_runtime.e2e import Options
from xspec_runtime.models import mini
from xspec_runtime.workloads import MiniPair

SIZES = {"bottleneck": 8, "intermediate": 16}
HISTORY = [{"epoch": 1, **dict.fromkeys(
    ("train_loss", "val_loss", "token_match", "consecutive_tokens", "cos_sim", "accept_90",
     "match_above_90"), 0.5)}]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Untrained adapters in the folders that training writes."""
    folder = tmp_path_factory.mktemp("runs")
    for level in ("L4", "B1"):
        torch.manual_seed(1)
        adapter = HiddenAdapter(HiddenAdapterConfig(level, 192, 128, **SIZES))
        record = {"command": "c", "level": level, "train_answers": 1, "val_answers": 1,
                  "split": "s", "draft": DRAFT, "finished": "1"}  # fmt: skip
        write_run(folder / level, adapter, HISTORY, record)
    return folder


def options(runs, **values) -> Options:
    return Options("c", gamma=3, max_new_tokens=12, adapters=runs, threads=1, **values)


def test_arms_answer_as_the_target_does(runs):
    pair = MiniPair(options(runs).settings())
    combined = ["l4_b1", "l4_b1_hidden", "tree_l4", "tree_l4_hidden"]
    assert pair.state_arms == ["constant", "l4", "l4_hidden", "b1", *combined]
    tasks = pair.scene_tasks(1)
    workload = pair.workload(tasks)
    plain = workload.arms["target"]().run(tasks[0])
    for name in pair.state_arms:
        outcome = workload.arms[name]().run(tasks[0])
        assert outcome.tokens == plain.tokens and any(r.rows > 1 for r in outcome.rounds), name


def test_levels_are_chosen_and_missing_ones_named(runs, tmp_path):
    assert state_arms(None) == []
    assert state_arms(runs, "B1") == ["constant", "b1"]
    for folder, chosen, error, match in (
        (None, "L4", ValueError, "needs --adapters"),
        (runs, "L9", ValueError, "'L9'"),
        (runs, "L1", FileNotFoundError, "L1"),
        (tmp_path, "", FileNotFoundError, "no run"),
    ):
        with pytest.raises(error, match=match):
            state_arms(folder, chosen)
    pair = MiniPair(options(runs, engine="llama").settings())
    with pytest.raises(ValueError, match="--engine transformers"):
        pair.decoder("b1")


def test_the_constant_string_is_the_commonest_token():
    drafter = constant_drafter([[1, 2, 3], [1, 5, 3], [4, 5]])
    assert drafter.propose([9], 6).tokens == [9, 5, 3]


def test_scene_states_are_those_of_decoding(tmp_path):
    """State i is the one that predicted token i when the model answered by itself."""
    write_scene_states(tmp_path, 2)
    states = open_states(tmp_path, read_head("mini"))
    assert states.draft_name == DRAFT and states.draft.shape[2] == 128
    draft_head = mini.load(DRAFT).get_output_embeddings().weight
    for row, (draft_length, length) in enumerate(states.lengths.tolist()):
        tokens = states.tokens[row]
        assert (tokens[length:] == ABSENT).all() and tokens[length - 1] == mini.EOS
        said = (states.draft[row, :draft_length].float() @ draft_head.T).argmax(-1)
        assert mini.EOS not in said[:-1] and said[-1] == mini.EOS
    with pytest.raises(ValueError, match="seeds from 0"):
        write_scene_states(tmp_path, 5, mini.TEST_SEED - 2)
