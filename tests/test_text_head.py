"""The text head: what it learns, its steps, file, training state, drafter and command."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from xspec_runtime.adapters.text_head import (
    TextHead,
    TextHeadConfig,
    TextHeadSteps,
    load_text_head,
    save_text_head,
)
from xspec_runtime.adapters.training.head import HeadTraining, train_text_head
from xspec_runtime.commands import app
from xspec_runtime.drafters.base import Request
from xspec_runtime.drafters.text_head import TextHeadDrafter

PLAN = HeadTraining(epochs=4, batch=4, dropout=0.1)


def answers(rng: random.Random, count: int = 24) -> list[list[int]]:
    """The token after 7 or 8 repeats the second one, however far back it stands."""
    made = []
    for _ in range(count):
        kind = rng.choice([100, 200])
        made.append([5, kind, *rng.choices(range(20, 30), k=rng.randint(1, 3)), 7, kind, 9])
    return made


@pytest.fixture
def head(rng) -> TextHead:
    torch.manual_seed(rng.randrange(1000))
    ids = torch.tensor(sorted(rng.sample(range(50), 12)))
    made = TextHead(TextHeadConfig(50, 12, 16), ids).eval()
    made.temperature.fill_(1.3)
    for value in made.parameters():
        value.data.mul_(2.0)
    return made


def test_steps_give_what_the_module_gives(head, rng):
    ids = [rng.choice([*head.ids.tolist(), 49]) for _ in range(9)]
    steps = TextHeadSteps(head)
    states = np.concatenate([steps.start()] * 2)
    for token in ids:
        states = steps.advance(states, [token, token])
    logits = head(head.rows_of(torch.tensor([ids])))[0, -1] / 1.3
    expected = logits.softmax(-1)[1:]
    found, chances = steps.likely(states, 12)
    assert (found[0] == found[1]).all()
    order = {int(token): i for i, token in enumerate(head.ids)}
    for token, chance in zip(found[0].tolist(), chances[0].tolist(), strict=True):
        assert chance == pytest.approx(expected[order[token]].item(), rel=1e-4)
    assert (np.diff(chances[0]) <= 0).all()


def test_trees_are_whole_and_their_scores_are_path_probabilities(head):
    drafter = TextHeadDrafter(head)
    for rows in (1, 2, 7, 40):
        drafter.begin(Request())
        tree = drafter.propose([1, 2, 3], rows)
        assert 1 <= len(tree) <= rows and tree.tokens[0] == 3
        assert all(-1 < tree.parent_idx[i] < i for i in range(1, len(tree)))
        assert len(set(zip(tree.parent_idx, tree.tokens, strict=True))) == len(tree)
        assert all(tree.scores[i] <= tree.scores[tree.parent_idx[i]] for i in range(1, len(tree)))
    assert len(tree) == 40
    steps, state = TextHeadSteps(head), None
    path, node = [], len(tree) - 1
    while node:
        path.insert(0, node)
        node = tree.parent_idx[node]
    state, score = steps.start(), 1.0
    for token in [1, 2, 3]:
        state = steps.advance(state, [token])
    for node in path:
        found, chances = steps.likely(state, 12)
        score *= chances[0][found[0].tolist().index(tree.tokens[node])]
        assert tree.scores[node] == pytest.approx(score, rel=1e-4)
        state = steps.advance(state, [tree.tokens[node]])


def test_calls_that_extend_the_context_equal_a_fresh_one(head, rng):
    context = [rng.choice(head.ids.tolist()) for _ in range(8)]
    one, two = TextHeadDrafter(head), TextHeadDrafter(head)
    for known in (1, 2, 5, 8):
        found = one.propose(context[:known], 12)
    assert found == two.propose(context, 12)
    with pytest.raises(ValueError, match="at least 8 tokens, got 3; call begin first"):
        one.propose(context[:3], 4)
    one.end(context)
    assert one.propose(context[:3], 4) == TextHeadDrafter(head).propose(context[:3], 4)


def test_training_learns_what_a_short_context_cannot_tell(rng):
    plan = HeadTraining(epochs=25, batch=8, dropout=0.0, unknown=0.0, held_out=0.25, rate=1e-2)
    head, score = train_text_head(answers(rng, 60), 300, 32, plan)
    drafter, right = TextHeadDrafter(head), 0
    for kind in (100, 200):
        drafter.begin(Request())
        tree = drafter.propose([5, kind, 22, 27, 7], 2)
        right += tree.tokens[1] == kind
    assert right == 2
    assert score.calibrated_nats <= score.nats and 0.5 < score.top_1 <= 1.0


def test_an_interrupted_run_ends_with_the_same_weights(rng, tmp_path):
    data, state = answers(rng), tmp_path / "run.pt"
    whole, _ = train_text_head(data, 300, 16, PLAN)

    def stop(step: int, steps: int, loss: float) -> None:
        if step == steps // 2 + 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_text_head(data, 300, 16, PLAN, state, stop)
    steps = []
    resumed, _ = train_text_head(
        data, 300, 16, PLAN, state, lambda step, total, loss: steps.append(step)
    )
    assert steps[0] > 1
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    with pytest.raises(ValueError, match="belongs to a run of other answers"):
        train_text_head(data[1:], 300, 16, PLAN, state)
    state.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is damaged"):
        train_text_head(data, 300, 16, PLAN, state)


def test_a_file_keeps_the_head(head, tmp_path):
    path = tmp_path / "head.safetensors"
    save_text_head(head, path)
    loaded = load_text_head(path, 50)
    assert loaded.config == head.config
    assert all(torch.equal(v, head.state_dict()[k]) for k, v in loaded.state_dict().items())
    with pytest.raises(ValueError, match="vocabulary of 50 tokens, the target has 51"):
        load_text_head(path, 51)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h.ids.fill_(3), "ids must rise"),
        (lambda h: h.temperature.fill_(0.0), "temperature 0.0 is out of range"),
        (lambda h: h.bias.data.fill_(float("nan")), "bias holds values that are not finite"),
    ],
)
def test_damaged_files_are_refused(head, tmp_path, change, message):
    path = tmp_path / "head.safetensors"
    change(head)
    save_text_head(head, path)
    with pytest.raises(ValueError, match=message):
        load_text_head(path)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "head.safetensors"
    with pytest.raises(FileNotFoundError, match="text head not found"):
        load_text_head(path)
    path.write_bytes(b"12345678" * 4)
    with pytest.raises(ValueError, match="is not a text head"):
        load_text_head(path)


@pytest.mark.parametrize(
    ("data", "message"),
    [([], "at least two tokens"), ([[1]], "at least two tokens"), ([[1, 9]], "from 0 to 8")],
)
def test_bad_answers(data, message):
    with pytest.raises(ValueError, match=message):
        train_text_head(data, 9)


@pytest.mark.parametrize("bad", [{"epochs": 0}, {"rate": 0.0}, {"held_out": 1.0}, {"batch": 1.5}])
def test_bad_plans(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        HeadTraining(**bad)


def test_command(rng, tmp_path, capsys):
    pairs, out = tmp_path / "pairs.jsonl", tmp_path / "head.safetensors"
    row = '{{"egpt_tokens": [1], "vl_tokens": {}}}\n'
    pairs.write_text("".join(row.format(answer) for answer in answers(rng)))
    options = ["--width", "16", "--num-epochs", "2"]
    app(["train", "head", str(pairs), str(out), *options], standalone_mode=False)
    assert "nats a token" in capsys.readouterr().err
    assert load_text_head(out, 32_000).config.width == 16
    assert [path.name for path in tmp_path.iterdir() if ".state" in path.name] == []
    with pytest.raises(SystemExit) as stop:
        app(["train", "head", str(pairs), str(out), "--num-epochs", "0"])
    assert stop.value.code == 2 and "error: --num-epochs must be an int" in capsys.readouterr().err
