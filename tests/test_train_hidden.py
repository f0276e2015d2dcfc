"""Training of adapters of states: losses, splits, runs that go on, and a test that stays shut."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from running import in_two_processes, xspec
from xspec_runtime.adapters import alignment, load_adapter, save_adapter
from xspec_runtime.adapters.alignment import STATE_LEVELS
from xspec_runtime.adapters.scoring.report import figures_table, score_test
from xspec_runtime.adapters.scoring.steps import level_of, score
from xspec_runtime.adapters.training.hidden import (
    HiddenTraining,
    build,
    train_hidden,
    weighted_loss,
)
from xspec_runtime.adapters.training.runs import adapter_folder, find_run, star, write_run
from xspec_runtime.adapters.training.states import ABSENT, Batch, States, open_states, read_head
from xspec_runtime.extract import StateFolder

WIDTH, DRAFT, VOCAB = 16, 12, 20
SIZES = {"heads": 2, "positions": 16}
SHORT = HiddenTraining(epochs=3, batch=8, held_out=0.25)


def material(seed: int = 0, count: int = 24) -> tuple[States, torch.Tensor]:
    """Target states that follow one another by a fixed turn; the draft's tell the target's."""
    generator = torch.Generator().manual_seed(seed)
    fixed = torch.Generator().manual_seed(77)
    head = torch.randn(VOCAB, WIDTH, generator=fixed)
    turn = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=fixed))[0]
    told = torch.randn(WIDTH, DRAFT, generator=fixed) / 4
    rows = [torch.randn(count, WIDTH, generator=generator)]
    for _ in range(9):
        rows.append(rows[-1] @ turn)
    target = torch.stack(rows, 1)
    lengths = torch.randint(4, 11, (count, 2), generator=generator)
    there = torch.arange(10) < lengths[:, 1:]
    tokens = (target @ head.T).argmax(-1).masked_fill(~there, ABSENT)
    draft = (target @ told).masked_fill((torch.arange(10) >= lengths[:, :1])[..., None], 0)
    target = target.masked_fill(~there[..., None], 0)
    states = States(draft.half(), target.half(), lengths, tokens, None, f"digest {seed}", "draft")
    return states, head


def write(folder: Path, states: States) -> Path:
    store = StateFolder(folder)
    for i, (draft_length, target_length) in enumerate(states.lengths.tolist()):
        parts = {
            "draft": states.draft[i, :draft_length],
            "target": states.target[i, :target_length],
        }
        store.add(str(i), {name: value.contiguous() for name, value in parts.items()})
    store.pack([str(i) for i in range(len(states))], 10, {"draft": "draft_raw"})
    return folder


def loss_of(adapter, batch: Batch, head, plan=SHORT) -> float:
    with torch.no_grad():
        total, weight = weighted_loss(adapter.eval(), batch, head, plan)
    return float(total / weight)


@pytest.mark.parametrize("level", STATE_LEVELS)
def test_the_token_a_state_predicts(level):
    ahead = level in ("L5F", "B1", "EAGLE")
    assert alignment.state_position(level, 4) == (5 if ahead else 4)
    rows = torch.arange(1, 6)[None]
    wanted = [2, 3, 4, 5, 0] if ahead else [1, 2, 3, 4, 5]
    assert alignment.state_labels(level, rows, 5)[0].tolist() == wanted
    known, expected = 2, "bcd" if ahead else "cde"
    assert alignment.continuation("abcdef", known, 3, level) == expected


def test_an_unknown_level_is_named():
    with pytest.raises(ValueError, match=r"L1, L2.*'L6'"):
        alignment.state_position("L6", 0)


@pytest.mark.parametrize("level", STATE_LEVELS)
def test_what_lies_behind_an_answer_changes_no_loss(level):
    states, head = material()
    adapter = build(level, states, VOCAB, SIZES if level != "EAGLE" else SIZES | {"width": 16})
    rows = torch.arange(6)
    batch = states.rows(rows)
    noise = Batch(
        torch.where(batch.has_draft[..., None], batch.draft, 9.0)
        if level in ("L1", "L2", "L3", "L4", "L5")
        else batch.draft,
        torch.where(batch.has_target[..., None], batch.target, 9.0),
        batch.has_draft,
        batch.has_target,
        batch.tokens,
    )
    plan = HiddenTraining(weights={"kl": 0.3, "ce": 0.7})
    assert loss_of(adapter, noise, head, plan) == pytest.approx(loss_of(adapter, batch, head, plan))
    # Parts of a batch add up to the whole.
    with torch.no_grad():
        parts = [weighted_loss(adapter, states.rows(part), head, plan) for part in rows.split(4)]
    total, weight = (float(sum(column)) for column in zip(*parts, strict=True))
    assert total / weight == pytest.approx(loss_of(adapter, batch, head, plan), rel=1e-4)


def test_every_term_and_the_decay_count():
    states, head = material()
    adapter = build("L4", states, VOCAB, SIZES)
    batch = states.rows(torch.arange(6))
    single = {
        name: loss_of(adapter, batch, head, HiddenTraining(weights={**none, name: 1.0}))
        for none in [dict.fromkeys(("mse", "cos", "kl", "ce"), 0.0)]
        for name in none
    }
    assert len({round(value, 4) for value in single.values()}) == 4 and min(single.values()) > 0
    published = single["mse"] + 0.5 * single["cos"]
    assert loss_of(adapter, batch, head) == pytest.approx(published, rel=1e-4)
    assert loss_of(adapter, batch, head, HiddenTraining(decay=0.5)) != pytest.approx(published)


@pytest.mark.parametrize("level", ["L1", "B1", "EAGLE"])
def test_training_teaches(level):
    states, head = material(count=64)
    plan = HiddenTraining(epochs=8, batch=8, rate=5e-3, held_out=0.2, hidden_share=0.0)
    sizes = {"EAGLE": {"width": 32, "layers": 1}}.get(level, {"bottleneck": 32, "intermediate": 64})
    _, history = train_hidden(level, states, head, plan, SIZES | sizes)
    first, last = history[0], history[-1]
    assert last["val_loss"] < 0.9 * first["val_loss"]
    assert last["token_match"] > first["token_match"] and last["tokens"] > 50


def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path):
    states, head = material()
    whole, history = train_hidden("L5", states, head, SHORT, SIZES)

    def stop(step: int, steps: int, loss: float) -> None:
        assert steps == 9
        if step == 5:
            raise KeyboardInterrupt

    state = tmp_path / "state.pt"
    with pytest.raises(KeyboardInterrupt):
        train_hidden("L5", states, head, SHORT, SIZES, state, stop)
    seen = []
    again, resumed = train_hidden(
        "L5", states, head, SHORT, SIZES, state, lambda step, *_: seen.append(step)
    )
    assert seen[0] == 4 and resumed == history
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    with pytest.raises(ValueError, match="other answers or options"):
        train_hidden("L4", states, head, SHORT, SIZES, state)
    folds, tokens = [list(range(20)), list(range(20, 24))], states.tokens.clamp(max=0)
    for other in ({"folds": folds}, {"tokens": tokens}):
        with pytest.raises(ValueError, match="other answers or options"):
            train_hidden("L5", replace(states, **other), head, SHORT, SIZES, state)
    with pytest.raises(ValueError, match="other answers or options"):
        train_hidden("L5", states, head.flip(0), SHORT, SIZES, state)
    state.write_bytes(b"no run")
    with pytest.raises(ValueError, match="damaged"):
        train_hidden("L5", states, head, SHORT, SIZES, state)


def test_training_stops_early_and_keeps_the_best():
    states, head = material()
    plan = HiddenTraining(epochs=40, batch=8, rate=1.0, patience=2, held_out=0.25)
    adapter, history = train_hidden("L1", states, head, plan, SIZES)
    losses = [row["val_loss"] for row in history]
    assert len(history) < 40 and len(history) - 1 - losses.index(min(losses)) == 2
    _, held = states.split(0.25)
    assert loss_of(adapter, states.rows(held), head) == pytest.approx(min(losses), rel=1e-5)


def test_splits_keep_drives_together():
    states, _ = material()
    train, held = states.split(0.2)
    assert held.tolist() == list(range(19, 24)) and train.tolist() == list(range(19))
    folds = [list(range(0, 24, 3)), list(range(1, 24, 3)), list(range(2, 24, 3))]
    by_drive = States(**{**vars(states), "folds": folds})
    train, held = by_drive.split(0.1)
    assert held.tolist() == folds[2] and sorted(train.tolist()) == sorted(folds[0] + folds[1])
    with pytest.raises(ValueError, match="share"):
        states.split(1.0)


def test_scores_count_what_they_say():
    states, head = material(count=12)
    rows = torch.arange(12)
    adapter = build("B1", states, VOCAB, SIZES)
    nexts = states.target.float()[:, 1:]
    adapter.forward = lambda draft, target: torch.nn.functional.pad(nexts, (0, 0, 0, 1))
    found = score(adapter, states, rows, head)
    assert found["token_match"] == 1.0 and found["cos_sim"] == pytest.approx(1.0, abs=1e-3)
    assert found["tokens"] == int((states.lengths[:, 1] - 1).sum())
    assert found["consecutive_tokens"] == pytest.approx(found["tokens"] / 12)
    assert found["consecutive_90"] == pytest.approx(found["tokens"] / 12)
    adapter.forward = lambda draft, target: -torch.nn.functional.pad(nexts, (0, 0, 0, 1))
    wrong = score(adapter, states, rows, head)
    assert wrong["token_match"] < 0.2 and wrong["accept_80"] == 0


def _small_run() -> list[float]:
    states, head = material()
    plan = HiddenTraining(epochs=2, batch=5, held_out=0.25, hidden_share=0.4)
    losses: list[float] = []
    sizes = SIZES | {"bottleneck": 8, "dropout": 0.0}
    train_hidden("L1", states, head, plan, sizes, None, lambda *at: losses.append(at[2]))
    return losses


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_two_processes_have_the_loss_of_one(tmp_path):
    found = in_two_processes(_small_run, tmp_path)
    assert found[0] == found[1]
    assert found[0] == pytest.approx(_small_run(), rel=1e-4)


@pytest.mark.parametrize("level", STATE_LEVELS)
def test_checkpoints_come_back(level, tmp_path):
    states, _ = material()
    adapter = build(level, states, VOCAB, SIZES | ({"width": 16} if level == "EAGLE" else {}))
    save_adapter(adapter, tmp_path)
    again = load_adapter(tmp_path, VOCAB)
    assert again.config == adapter.config and level_of(again) == level
    for name, value in adapter.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, rtol=1e-3, atol=1e-3)
    if level == "EAGLE":
        with pytest.raises(ValueError, match="vocabulary of 20"):
            load_adapter(tmp_path, VOCAB + 1)
    config = json.loads((tmp_path / "config.json").read_text())
    for bad in ({"dropout": "x"}, {"heads": 7}, {"positions": 0}):
        (tmp_path / "config.json").write_text(json.dumps(config | bad))
        with pytest.raises(ValueError):
            load_adapter(tmp_path)


def test_runs_are_found_and_starred(tmp_path):
    states, head = material()
    plan = HiddenTraining(epochs=1, batch=8, held_out=0.25)
    adapter, history = train_hidden("L1", states, head, plan, {"bottleneck": 4})
    for name, finished in (("a", "2026-01-02"), ("b", "2026-01-01")):
        record = {"command": "c", "level": "L1", "finished": finished, "train_answers": 18}
        write_run(
            tmp_path / name, adapter, history, record | {"val_answers": 6, "split": "the last"}
        )
        kept = {path.name for path in (tmp_path / name).iterdir()}
        assert kept == {"best", "results.json", "RESULTS.md", "loss.png", "acceptance.png"}
    assert find_run(tmp_path, "L1") == tmp_path / "a" / "best"
    with pytest.raises(FileNotFoundError, match="starred"):
        find_run(tmp_path, "L1", "starred")
    assert star(tmp_path / "b") == "L1"
    assert find_run(tmp_path, "L1") == find_run(tmp_path, "L1", "starred") == tmp_path / "b/best"
    assert adapter_folder("latest", tmp_path, "L1") == tmp_path / "a" / "best"
    assert adapter_folder(str(tmp_path / "b"), tmp_path, "L1") == tmp_path / "b" / "best"
    for own in (tmp_path / "b", tmp_path / "b/best"):
        assert adapter_folder("", own, "") == adapter_folder("", own, "L1") == tmp_path / "b/best"
    assert adapter_folder("latest", tmp_path, "") == tmp_path / "a/best"
    with pytest.raises(ValueError, match="is of L1, expected L4"):
        adapter_folder("", tmp_path / "b", "L4")
    write_run(tmp_path / "c", adapter, history, record | {"level": "L2", "val_answers": 6,
                                                          "split": "the last"})  # fmt: skip
    with pytest.raises(ValueError, match="runs of L1, L2: --level"):
        adapter_folder("", tmp_path, "")
    shutil.rmtree(tmp_path / "c")
    star(tmp_path / "a")
    assert not (tmp_path / "b" / "starred").exists()
    with pytest.raises(FileNotFoundError, match="L2"):
        find_run(tmp_path, "L2")
    with pytest.raises(FileNotFoundError):
        star(tmp_path)


@pytest.fixture
def opened(monkeypatch):
    """Folders of states that were read."""
    from xspec_runtime.adapters.training import states as module

    seen: list[Path] = []
    read = module.read_states
    monkeypatch.setattr(module, "read_states", lambda folder: seen.append(folder) or read(folder))
    return seen


def test_training_never_opens_the_test(tmp_path, opened, capsys):
    states, head = material()
    train = write(tmp_path / "data/train", states)
    test = write(tmp_path / "data/test", material(1)[0])
    (test / "chunk_00000.safetensors").chmod(0)
    save_file({"lm_head.weight": head}, tmp_path / "head.safetensors")
    target = ["--target", tmp_path / "head.safetensors"]
    sizes = ["--num-heads", 2, "--ffn-dim", 16, "--num-epochs", 2, "--val-split", 0.25]
    options = ["--states", train, "--output-dir", tmp_path / "runs/l4", *target, *sizes]
    assert xspec("train", "hidden", *options, "--level", "L9") == 2
    assert "level must be one of L1, " in capsys.readouterr().err and not opened
    assert xspec("train", "hidden", *options) == 0
    assert opened == [train] and not (tmp_path / "runs/l4/state.pt").exists()
    record = json.loads((tmp_path / "runs/l4/results.json").read_text())
    assert record["level"] == "L4" and len(record["history"]) == 2 and record["draft"]
    (test / "chunk_00000.safetensors").chmod(0o600)
    figures = tmp_path / "figures.json"
    options = ["--run", tmp_path / "runs", "--level", "L4", *target, "--json", figures]
    assert xspec("score", test, *options) == 0
    assert opened == [train, test]
    found = json.loads(figures.read_text())
    assert found["shown"]["answers"] == 24 and found["shown"] != found["hidden"]
    capsys.readouterr()
    assert xspec("score", train, *options) == 2
    assert "trained the adapter" in capsys.readouterr().err.replace("\n", " ")
    assert xspec("star", tmp_path / "runs/l4") == 0


def test_a_score_of_other_widths_is_refused():
    states, head = material()
    adapter = build("L1", states, VOCAB, {"bottleneck": 4})
    other = States(**{**vars(states), "draft": states.draft[..., :8]})
    with pytest.raises(ValueError, match="width 12"):
        score_test(adapter, {}, other, head)
    assert figures_table(score_test(adapter, {}, states, head)).row_count == 9


def test_bad_material_is_named(tmp_path):
    states, head = material()
    folder = write(tmp_path / "states", states)
    read = open_states(folder, head)
    assert torch.equal(read.tokens, states.tokens) or (
        (read.tokens == states.tokens).float().mean() > 0.99
    )
    with pytest.raises(ValueError, match="width 16"):
        open_states(folder, head[:, :8])
    rows = [{"egpt_tokens": [3], "vl_tokens": [3] * n} for n in states.lengths[:, 1].tolist()]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("\n".join(map(json.dumps, rows)))
    assert open_states(folder, head, pairs).tokens.max() == 3
    pairs.write_text("\n".join(map(json.dumps, rows[1:])))
    with pytest.raises(ValueError, match="lengths differ"):
        open_states(folder, head, pairs)
    with pytest.raises(FileNotFoundError):
        read_head(str(tmp_path / "none"))
    save_file({"other": head}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="no language-model head"):
        read_head(str(tmp_path / "x.safetensors"))
    for bad in ({"epochs": 0}, {"rate": 0}, {"decay": 2}, {"held_out": 0}, {"weights": {"x": 1}}):
        with pytest.raises(ValueError):
            HiddenTraining(**bad)
    with pytest.raises(ValueError, match="no such size"):
        build("L4", states, VOCAB, {"depth": 3})
