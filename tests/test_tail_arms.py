"""Arms whose drafts stay on the target's device, trained adapters on our own engine, and what is
said of adapters before a model is loaded.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from test_state_arms import HISTORY, SIZES
from xspec_runtime.adapters.checkpoint import save_adapter
from xspec_runtime.adapters.hidden import HiddenAdapter, HiddenAdapterConfig
from xspec_runtime.adapters.mini.pair import TAIL_ARMS
from xspec_runtime.adapters.mini.states import DRAFT
from xspec_runtime.adapters.mini.text import trained_arms
from xspec_runtime.adapters.token_adapter import TokenAdapter, TokenAdapterConfig
from xspec_runtime.adapters.training.runs import star, write_run
from xspec_runtime.drafters.base import ON_DEVICE
from xspec_runtime.drafters.graph_adapter import GraphAdapterDrafter
from xspec_runtime.e2e import Options, run_e2e
from xspec_runtime.files import write_json
from xspec_runtime.models import mini
from xspec_runtime.workloads import MiniPair


def token(width: int, vocab: int = mini.VOCAB) -> TokenAdapter:
    return TokenAdapter(TokenAdapterConfig(vocab, width, 1, 2, 64, 40))


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Untrained adapters in the folders that training writes; L4 is starred."""
    folder = tmp_path_factory.mktemp("runs")
    torch.manual_seed(1)
    config = {level: HiddenAdapterConfig(level, 192, 128, **SIZES) for level in ("L4", "B1")}
    adapters = {level: HiddenAdapter(values) for level, values in config.items()}
    for level, adapter in {"TOKEN": token(64), **adapters}.items():
        record = {"command": "c", "level": level, "train_answers": 1, "val_answers": 1,
                  "split": "s", "draft": DRAFT, "finished": "1"}  # fmt: skip
        write_run(folder / level, adapter, HISTORY, record)
    star(folder / "L4")
    return folder


@pytest.fixture(scope="module")
def pair(runs) -> MiniPair:
    options = Options("c", gamma=3, max_new_tokens=16, adapters=runs, threads=1, engine="llama")
    return MiniPair(options.settings())


def test_drafts_on_the_device_are_those_of_the_host(pair):
    assert pair.tail_arms == list(TAIL_ARMS)
    assert pair.text_arms == ["token", "token_hidden", "token_tail", "token_tail_hidden"]
    task = pair.scene_tasks(1)[0]
    workload = pair.workload([task])
    plain = workload.arms["target"]().run(task).tokens
    accepted = 0
    for name in (*TAIL_ARMS, "token_tail", "token_tail_hidden"):
        arm, tokens = workload.arms[name](), []
        host = workload.arms[name.replace("_tail", "")]().run(task)
        mine = arm.run(task, lambda tree, *_, to=tokens: to.extend(tree.tokens[1:]))
        assert isinstance(arm.decoder.drafter, GraphAdapterDrafter)
        assert mine.tokens == host.tokens == plain, name
        rounds = [[(r.rows, r.accepted) for r in out.rounds] for out in (mine, host)]
        assert rounds[0] == rounds[1], name
        assert max(r.rows for r in mine.rounds) == 4
        assert tokens and max(tokens) <= ON_DEVICE
        accepted += sum(r.accepted for r in mine.rounds)
    assert accepted


def test_a_tail_is_captured_once(pair):
    """The arms of a run are made anew after its warm-up; what was captured serves them too."""
    made = [pair.decoder(name).drafter for name in ("adapter_tail", "adapter_tail", "adapter")]
    assert made[0] is made[1] and not isinstance(made[2], GraphAdapterDrafter)
    assert pair.decoder("ngram").drafter is not pair.decoder("ngram").drafter


def test_levels_that_read_no_state_of_the_target_run_on_our_engine(pair):
    combined = ["l4", "l4_hidden", "tree_l4", "tree_l4_hidden"]
    assert pair.state_arms == ["constant", *combined]
    task = pair.scene_tasks(1)[0]
    workload = pair.workload([task])
    assert workload.notes == ["B1: left out, --engine llama keeps no states of the target"]
    plain = workload.arms["target"]().run(task).tokens
    for name in ("l4", "tree_l4_hidden"):
        arm = workload.arms[name]()
        outcome = arm.run(task)
        assert outcome.tokens == plain and any(r.rows > 1 for r in outcome.rounds), name
        assert arm.decoder.target is pair.target


def test_tails_are_where_kernels_and_engine_fit(runs, tmp_path):
    assert "token_tail" not in trained_arms(runs)[1]
    save_adapter(token(16), shutil.copytree(runs / "TOKEN", tmp_path / "run") / "best")
    assert trained_arms(tmp_path, tails=True)[1] == ["constant", "token", "token_hidden"]
    assert MiniPair(Options("c").settings()).tail_arms == []


def test_starred_levels_alone(runs):
    states, texts = trained_arms(runs, which="starred")
    assert states == ["constant", "l4", "l4_hidden", "tree_l4", "tree_l4_hidden"] and not texts
    with pytest.raises(FileNotFoundError, match="no starred run of B1"):
        trained_arms(runs, "B1", "starred")


@pytest.mark.parametrize(
    ("values", "error", "match"),
    [
        ({"adapter": "bogus"}, ValueError, "--adapter must be latest or starred, got 'bogus'"),
        ({"adapters": None, "adapter": "latest"}, ValueError, "--adapter needs --adapters"),
        ({"adapters": None, "adapter_level": "L4"}, ValueError, "needs --adapters"),
        ({"adapters": Path("/nowhere")}, FileNotFoundError, "adapters not found: /nowhere"),
        ({"adapters": Path("/dev")}, FileNotFoundError, "/dev holds no run of `xspec train`"),
        ({"adapter_level": "L9"}, ValueError, "--adapter-level must be of TOKEN, .* got 'L9'"),
        ({"adapter_level": "L1"}, FileNotFoundError, "no trained run of L1"),
        ({"adapter_level": "PREFIX"}, FileNotFoundError, "no trained run of PREFIX"),
        ({"adapter_level": "L6"}, FileNotFoundError, "no trained run of L6"),
        ({"adapter_level": "TOKEN", "adapter": "starred"}, FileNotFoundError, "no starred run"),
        ({"adapter_level": "B1", "engine": "llama"}, ValueError, "B1 reads the target's states"),
    ],
)
def test_wrong_adapters_are_named_before_a_model_is_loaded(
    values, error, match, runs, tmp_path, monkeypatch
):
    monkeypatch.setattr(mini, "load", lambda *args, **options: pytest.fail("a model is loaded"))
    with pytest.raises(error, match=match):
        run_e2e(Options("c", **({"adapters": runs, "output_dir": tmp_path / "out"} | values)))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["vocabulary", "no config", "no draft"])
def test_damaged_runs_are_named_before_a_model_is_loaded(damage, runs, tmp_path, monkeypatch):
    monkeypatch.setattr(mini, "load", lambda *args, **options: pytest.fail("a model is loaded"))
    run = shutil.copytree(runs / "TOKEN", tmp_path / "run")
    match = "the folder holds no adapter"
    if damage == "vocabulary":
        save_adapter(token(64, 99), run / "best")
        match = "vocabulary of 99 tokens"
    else:
        (run / "best" / "config.json").unlink()
    if damage == "no draft":
        record = json.loads((run / "results.json").read_text())
        write_json(run / "results.json", record | {"level": "L6"})
        match = "tuned draft not found"
    with pytest.raises((ValueError, FileNotFoundError), match=match):
        run_e2e(Options("c", adapters=tmp_path, output_dir=tmp_path / "out"))
