"""Training of adapters of texts: both published networks, runs that go on, bad input."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from running import in_two_processes, xspec
from xspec_runtime.adapters import TokenAdapter, TokenAdapterConfig, alignment, load_adapter
from xspec_runtime.adapters.base import PAD
from xspec_runtime.adapters.mini.states import FIRST_SEED, SCORE_SEED, scenes_missing
from xspec_runtime.adapters.mini.texts import write_scene_pairs
from xspec_runtime.adapters.published import read_published
from xspec_runtime.adapters.token_adapter import CONFIGURABLE
from xspec_runtime.adapters.training.loop import fit, run_key, split_rows, validation_loss
from xspec_runtime.adapters.training.pair_loss import predictions
from xspec_runtime.adapters.training.text import (
    NETWORKS,
    TextLesson,
    TextPairs,
    TextTraining,
    build,
    constant_match,
    open_text_pairs,
    padded,
    score_texts,
    train_text,
)
from xspec_runtime.files import write_json
from xspec_runtime.models import mini

VOCAB, LENGTH = 24, 9
SIZES = {"width": 16, "heads": 2, "intermediate": 32, "positions": 12}
SMALL = {
    "token": SIZES | {"layers": 1},
    "token-bias": SIZES | {"layers": 1},
    "prefix": SIZES | {"encoder_layers": 1},
}
SHORT = TextTraining(epochs=3, batch=8, rate=5e-3, held_out=0.25)


def rows(count: int = 24, seed: int = 0) -> list[dict]:
    """Answers that say the draft's text once more, one place on."""
    generator = torch.Generator().manual_seed(seed)
    drafts = torch.randint(1, VOCAB, (count, LENGTH), generator=generator).tolist()
    return [
        {"sample_idx": i, "query": "?", "egpt_tokens": d[: 4 + i % 5], "vl_tokens": [1, *d]}
        for i, d in enumerate(drafts)
    ]


def write(path: Path, values: list[dict], **beside) -> Path:
    path.write_text(json.dumps({**beside, "results": values}))
    return path


@pytest.fixture
def pairs(tmp_path) -> TextPairs:
    return open_text_pairs(write(tmp_path / "pairs.json", rows(), draft="draft_raw"), VOCAB)


def test_both_published_networks_have_their_parameters(tmp_path):
    with torch.device("meta"):
        configurable = TokenAdapter(TokenAdapterConfig(**CONFIGURABLE))
    assert sum(p.numel() for p in configurable.parameters()) == 45_475_328
    small = TokenAdapter(TokenAdapterConfig(VOCAB, 16, 1, 8, 32, 12, token_bias=True))
    with torch.no_grad():
        small.token_bias.copy_(torch.arange(VOCAB))
    state = dict(reversed(small.state_dict().items()))
    # Tensors of one shape keep their order, whatever they are called.
    state = {"token_bias": state.pop("token_bias")} | dict(reversed(state.items()))
    torch.save({"model_state_dict": state, "epoch": 3}, tmp_path / "best_model.pt")
    found = read_published(tmp_path / "best_model.pt")
    assert found.config == small.config
    for name, value in small.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name


def test_the_configurable_network_does_not_attend_to_padding():
    torch.manual_seed(0)
    config = TokenAdapterConfig(VOCAB, 16, 1, 2, 32, 12, dropout=0.0, token_bias=True)
    # Evaluation may take a fused path that differs in places nobody reads.
    adapter = TokenAdapter(config)
    seen: dict[str, torch.Tensor] = {}
    adapter.layers.register_forward_pre_hook(
        lambda module, args, named: seen.update(mask=args[2]), with_kwargs=True
    )
    with torch.no_grad():
        before = adapter(torch.tensor([[PAD, PAD, 3], [4, PAD, PAD]]))
        assert seen["mask"].tolist() == [[False, True, False], [False, True, True]]
        adapter.token_bias += 2.0
        after = adapter(torch.tensor([[PAD, PAD, 3], [4, PAD, PAD]]))
    torch.testing.assert_close(after, before + 2.0)


@pytest.mark.parametrize("network", list(NETWORKS))
def test_training_teaches_and_comes_back(network, pairs, tmp_path):
    plan = TextTraining(epochs=12, batch=6, rate=2e-2, held_out=0.25, hidden_share=0.2)
    adapter, history = train_text(network, pairs, plan, SMALL[network])
    assert history[-1]["train_loss"] < 0.9 * history[0]["train_loss"]
    _, held = split_rows(len(pairs), plan.held_out)
    best = min(row["val_loss"] for row in history)
    assert validation_loss(TextLesson(adapter, pairs, plan), held, plan) == pytest.approx(best)
    assert set(history[0]) >= {"token_match", "top_5", "consecutive_tokens", "token_match_hidden"}
    assert not any(p.requires_grad for p in adapter.parameters()) and not adapter.training


def test_figures_count_what_they_say(pairs):
    adapter = build("token", pairs, SMALL["token"])
    adapter.forward = lambda draft: torch.nn.functional.one_hot(draft, VOCAB).float()
    every = torch.arange(len(pairs))
    found = score_texts(adapter, pairs, every)
    # Answers repeat the draft one place on: as far as the draft reaches all is right.
    right = sum(4 + i % 5 for i in range(24))
    assert found["tokens"] == 24 * LENGTH and found["token_match"] == right / found["tokens"]
    assert found["consecutive_tokens"] == right / 24 and found["token_match_hidden"] == 0
    answers = torch.tensor([[1, 5, 6], [1, 5, 7], [1, 5, PAD], [1, 4, 6]])
    train, held = torch.tensor([0, 2]), torch.tensor([1, 3])
    assert constant_match(answers, train, held) == 0.5


def test_decay_and_smoothing_count(pairs):
    adapter = build("token", pairs, SMALL["token"]).eval()
    part, shown = torch.arange(6), torch.zeros(6, dtype=torch.bool)

    def loss(**values) -> float:
        with torch.no_grad():
            total, weight = TextLesson(adapter, pairs, TextTraining(**values)).loss(part, shown)
        return float(total / weight)

    plain = loss(smoothing=0.0)
    logits, expected = predictions(adapter, pairs.drafts[part], pairs.targets[part])
    assert torch.equal(expected, alignment.labels(pairs.targets[part], logits.shape[1], PAD))
    keep = expected != PAD
    assert plain == pytest.approx(
        torch.nn.functional.cross_entropy(logits[keep], expected[keep]).item(), rel=1e-5
    )
    assert len({round(v, 6) for v in (plain, loss(), loss(smoothing=0.0, decay=0.5))}) == 3


def test_a_stopped_run_goes_on_to_the_same_weights(pairs, tmp_path):
    whole, history = train_text("token", pairs, SHORT, SMALL["token"])
    state = tmp_path / "state.pt"

    def stop(step: int, steps: int, loss: float) -> None:
        assert steps == 9
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_text("token", pairs, SHORT, SMALL["token"], state, stop)
    again, resumed = train_text("token", pairs, SHORT, SMALL["token"], state)
    assert resumed == history
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    with pytest.raises(ValueError, match="other answers or options"):
        train_text("token-bias", pairs, SHORT, SMALL["token"], state)
    assert run_key(SHORT, "a") != run_key(TextTraining(), "a")


def test_a_run_goes_on_with_its_own_split_and_sizes_alone(pairs, tmp_path):
    state = tmp_path / "state.pt"
    train_text("token", pairs, SHORT, SMALL["token"], state)
    drives = [list(range(12)), list(range(12, 24))]
    for other in ({"folds": drives}, {"vocab_size": VOCAB + 1}):
        with pytest.raises(ValueError, match="other answers or options"):
            train_text("token", replace(pairs, **other), SHORT, SMALL["token"], state)


def test_answers_of_one_token_teach_nothing_and_break_nothing(pairs):
    short = pairs.targets.clone()
    short[:3, 1:] = PAD
    plan = TextTraining(epochs=1, batch=1, held_out=0.25)
    adapter, history = train_text("token", replace(pairs, targets=short), plan, SMALL["token"])
    assert history[0]["train_loss"] > 0
    assert all(value.isfinite().all() for value in adapter.parameters())


def test_training_that_diverges_writes_no_run(tmp_path, monkeypatch, capsys):
    path = write(tmp_path / "pairs.json", rows(4))
    whole = TextLesson.loss

    def loss(self, *batch):
        total, weight = whole(self, *batch)
        return total * float("nan"), weight

    monkeypatch.setattr(TextLesson, "loss", loss)
    sizes = ["--vocab-size", VOCAB, "--hidden-dim", 16, "--num-layers", 1, "--positions", 12]
    assert xspec("train", "token", path, "--output-dir", tmp_path / "run", *sizes) == 2
    said = capsys.readouterr().err.strip()
    assert "diverged in epoch 1" in said and "\n" not in said
    assert not (tmp_path / "run").exists()


class Steady:
    """Gets nowhere: its weight moves, its validation loss does not."""

    reads_draft = False

    def __init__(self) -> None:
        self.module = torch.nn.Linear(1, 1, bias=False)
        self.seen: list[float] = []

    def loss(self, part, hidden):
        total = self.module.weight.sum() if self.module.training else torch.tensor(1.0)
        return total * len(part), torch.tensor(float(len(part)))

    def figures(self, part):
        self.seen.append(self.module.weight.item())
        return {}


def test_of_equal_losses_the_first_is_the_best():
    lesson = Steady()
    fit(lesson, split_rows(4, 0.25), TextTraining(epochs=3, rate=0.1), "k")
    assert len(set(lesson.seen)) == 3 and lesson.module.weight.item() == lesson.seen[0]


def _losses(plan: TextTraining) -> list[float]:
    values = [(row["egpt_tokens"], row["vl_tokens"]) for row in rows()]
    drafts, targets = (padded(side) for side in zip(*values, strict=True))
    pairs, losses = TextPairs(drafts, targets, None, "d", "", VOCAB), []
    sizes = SMALL["token"] | {"dropout": 0.0}
    train_text("token", pairs, plan, sizes, None, lambda *at: losses.append(at[2]))
    return losses


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_two_processes_and_parts_of_a_batch_have_the_loss_of_one(tmp_path):
    plan = TextTraining(epochs=2, batch=5, held_out=0.25)
    found, plain = in_two_processes(lambda: _losses(plan), tmp_path), _losses(plan)
    assert found[0] == found[1] == pytest.approx(plain, rel=1e-4)
    parts = _losses(replace(plan, accumulation=3))
    assert parts == pytest.approx(plain, rel=1e-4)


def test_the_command_writes_a_run_and_opens_no_test(tmp_path, monkeypatch, capsys):
    train = write(tmp_path / "train.json", rows(), draft="draft_raw")
    test = write(tmp_path / "test.json", rows(seed=1))
    opened: list[Path] = []
    plain = Path.open
    monkeypatch.setattr(Path, "open", lambda p, *a, **k: opened.append(p) or plain(p, *a, **k))
    sizes = ["--hidden-dim", 16, "--num-layers", 1, "--num-heads", 2, "--ffn-dim", 32]
    options = ["--vocab-size", VOCAB, "--num-epochs", 2, "--positions", 12, *sizes]
    assert xspec("train", "token", train, "--output-dir", tmp_path / "run", *options) == 0
    assert train in opened and test not in opened
    kept = {path.name for path in (tmp_path / "run").iterdir()}
    assert kept == {"best", "results.json", "RESULTS.md", "loss.png", "acceptance.png"}
    record = json.loads((tmp_path / "run/results.json").read_text())
    assert record["level"] == "TOKEN" and record["draft"] == "draft_raw"
    assert record["val_answers"] == 2 and 0 <= record["constant_match"] <= 1
    assert load_adapter(tmp_path / "run/best", VOCAB).config.positions == 12
    assert "constant string" in (tmp_path / "run/RESULTS.md").read_text()
    test.chmod(0o600)
    save_file({"lm_head.weight": torch.zeros(VOCAB, 4)}, tmp_path / "head.safetensors")
    options = ["--run", tmp_path / "run", "--target", tmp_path / "head.safetensors"]
    assert xspec("score", test, *options, "--json", tmp_path / "figures.json") == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["shown"]["answers"] == 24 and figures["shown"]["tokens_per_verify"] >= 1
    assert figures["hidden"]["token_match"] == figures["shown"]["token_match_hidden"]
    capsys.readouterr()
    assert xspec("score", train, *options) == 2
    assert "pairs trained the adapter" in capsys.readouterr().err
    few, all_of_it = (open_text_pairs(train, VOCAB, limit) for limit in (3, None))
    assert len(few) == 3 and few.digest == all_of_it.digest
    with pytest.raises(ValueError, match="vocabulary of 24"):
        load_adapter(tmp_path / "run/best", VOCAB + 1)
    capsys.readouterr()


BAD = {"query": "?", "egpt_tokens": [3], "vl_tokens": [3, 4]}


@pytest.mark.parametrize(
    ("values", "options", "says"),
    [
        ([], [], "holds no pairs"),
        ([BAD], [], "two answers"),
        ([BAD, BAD | {"vl_tokens": []}], [], "vl_tokens is empty"),
        ([BAD, BAD | {"vl_tokens": [VOCAB]}], [], f"an id below {VOCAB}, got {VOCAB}"),
        ([BAD, {"vl_tokens": [1]}], [], "egpt_tokens must be a list of token ids, got nothing"),
        ([BAD] * 2, ["--network", "oracle"], "token, token-bias, prefix, got 'oracle'"),
        ([BAD, BAD | {"vl_tokens": [3]}], [], "has a token to predict"),
        ([BAD] * 2, ["--threads", -1], "--threads must be 0 or more"),
        ([BAD] * 2, ["--num-heads", 3], "multiple of 3 heads"),
        ([BAD] * 2, ["--num-epochs", 0], "--num-epochs must be an int in 1"),
        ([BAD] * 2, ["--learning-rate", "nan"], "--learning-rate must be above 0"),
        ([BAD] * 2, ["--hidden-share", 1], "--hidden-share must be from 0 to below 1, got 1.0"),
        ([BAD] * 2, ["--positions", 0], "--positions must be"),
        ([BAD] * 2, ["--label-smoothing", 1], "--label-smoothing must be from 0"),
        ([BAD] * 2, ["--scenes", -1], "--scenes must be 0 or more"),
        ([BAD] * 2, ["--val-split", 1], "--val-split must be above 0 and below 1, got 1.0"),
    ],
)
def test_bad_input_is_one_line(values, options, says, tmp_path, capsys):
    path = write(tmp_path / "pairs.json", values)
    options = ["--vocab-size", VOCAB, "--hidden-dim", 16, *options]
    code = xspec("train", "token", path, "--output-dir", tmp_path / "run", *options)
    said = capsys.readouterr().err.strip()
    assert code == 2 and says in said and "\n" not in said
    assert not (tmp_path / "run/results.json").exists()


def test_a_target_says_its_vocabulary(tmp_path, capsys):
    path = write(tmp_path / "pairs.json", [BAD] * 2)
    (tmp_path / "config.json").write_text('{"text_config": {"vocab_size": 4}}')
    assert xspec("train", "token", path, "--output-dir", tmp_path / "r", "--target", tmp_path) == 2
    assert "an id below 4, got 4" in capsys.readouterr().err
    (tmp_path / "config.json").write_text("{}")
    assert xspec("train", "token", path, "--output-dir", tmp_path / "r", "--target", tmp_path) == 2
    assert "give --vocab-size" in capsys.readouterr().err


def test_scene_pairs_are_never_of_test_scenes(tmp_path):
    with pytest.raises(ValueError, match="seeds from 0"):
        write_scene_pairs(tmp_path / "p.json", 3, mini.TEST_SEED - 2)
    assert not (tmp_path / "p.json").exists()


def test_scenes_of_another_number_are_not_taken_for_those_asked_for(tmp_path):
    pairs, index = tmp_path / "pairs.json", tmp_path / "states" / "index.json"
    origin = {"scenes": 20, "first_seed": FIRST_SEED}
    assert scenes_missing(pairs, 20) and not scenes_missing(pairs, 0)
    write_json(pairs, {**origin, "results": []})
    index.parent.mkdir()
    write_json(index, {"config": origin})
    for file in (pairs, index):
        assert not scenes_missing(file, 20) and not scenes_missing(file, 0)
        with pytest.raises(ValueError, match=r"answers to 20 scenes from seed .* expected the 300"):
            scenes_missing(file, 300)
        with pytest.raises(ValueError, match="answers to 20 scenes"):
            scenes_missing(file, 20, SCORE_SEED)
    write_json(pairs, {"results": []})
    with pytest.raises(ValueError, match="answers to no scenes"):
        scenes_missing(pairs, 20)
