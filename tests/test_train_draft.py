"""Tuning of draft models: what is trained, what is saved, and the arms that run it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import tiny
from running import xspec
from xspec_runtime.adapters.mini.states import FIRST_SEED, write_scene_states
from xspec_runtime.adapters.mini.text import BlindDrafter, trained_arms
from xspec_runtime.adapters.mini.texts import write_scene_pairs
from xspec_runtime.adapters.training.draft_answers import DraftAnswers, open_draft_answers
from xspec_runtime.adapters.training.draft_folder import (
    DRAFT_LEVELS,
    L6,
    L6_HEAD,
    load_draft,
    save_draft,
)
from xspec_runtime.adapters.training.draft_tuning import (
    DraftLesson,
    DraftTraining,
    Lora,
    Teacher,
    tune_draft,
    with_lora,
)
from xspec_runtime.adapters.training.runs import write_run
from xspec_runtime.adapters.training.states import open_states, read_head
from xspec_runtime.adapters.training.text import build, open_text_pairs
from xspec_runtime.config import SpecConfig
from xspec_runtime.data.captions import QUESTIONS
from xspec_runtime.data.scenes import make_sample
from xspec_runtime.drafters.base import Request
from xspec_runtime.drafters.draft_model import ModelDrafter
from xspec_runtime.e2e import Options
from xspec_runtime.engine import SpeculativeDecoder
from xspec_runtime.models import mini
from xspec_runtime.targets.transformers import TransformersTarget
from xspec_runtime.workloads import MiniPair

PLAN = DraftTraining(epochs=2, batch=2, rate=2e-3, held_out=0.25)
HISTORY = [{"epoch": 1, "train_loss": 1.0, "val_loss": 1.0, "token_match": 0.5, "top_5": 0.5,
            "consecutive_tokens": 1.0}]  # fmt: skip


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    """Pairs of four procedural scenes, and their states beside them."""
    folder = tmp_path_factory.mktemp("scenes")
    write_scene_pairs(folder / "pairs.json", 4)
    write_scene_states(folder / "states", 4)
    return folder


def of_pair(scenes: Path) -> tuple[torch.nn.Module, DraftAnswers]:
    model = load_draft("mini")
    return model, open_draft_answers(scenes / "pairs.json", model, "mini")


def text_answers(count: int = 6) -> DraftAnswers:
    """Prompts of different lengths, and what another model answers to them."""
    prompts = [{"input_ids": tiny.prompt(i, 4 + i)} for i in range(count)]
    target = tiny.tiny_llama(seed=9)
    answers = torch.tensor([tiny.reference(target, p["input_ids"], 8) for p in prompts])
    lengths = torch.tensor([8 - i % 3 for i in range(count)])
    return DraftAnswers(prompts.__getitem__, answers, lengths, (), 64, None, "digest")


def test_every_token_is_predicted_by_the_row_before_it():
    """Against one answer at a time, without padding; the row after it says something else."""
    model, answers = tiny.tiny_llama(seed=3), text_answers()
    lesson = DraftLesson(model, answers, DraftTraining(decay=0.5), model.device)
    rows = torch.tensor([1, 4, 2])
    logits, expected, there = lesson.logits(rows, torch.zeros(3, dtype=torch.bool))
    total = weight = 0.0
    for i, row in enumerate(rows.tolist()):
        prompt = answers.prompt(row)["input_ids"]
        answer = answers.answers[row, : answers.lengths[row]]
        whole = model(torch.cat([prompt, answer[None]], 1)).logits[0]
        own = whole[prompt.shape[1] - 1 : -1]
        torch.testing.assert_close(logits[i][there[i]], own, rtol=1e-4, atol=1e-4)
        assert expected[i][there[i]].tolist() == answer.tolist()
        decay = 0.5 ** torch.arange(len(answer))
        total += float(
            (decay * torch.nn.functional.cross_entropy(own, answer, reduction="none")).sum()
        )
        weight += float(decay.sum())
    found = lesson.loss(rows, torch.zeros(3, dtype=torch.bool))
    assert float(found[0]) == pytest.approx(total, rel=1e-4)
    assert float(found[1]) == pytest.approx(weight, rel=1e-5)
    assert lesson.figures(rows)["tokens"] == int(answers.lengths[rows].sum())
    assert "token_match_hidden" not in lesson.figures(rows)


def test_a_model_that_is_the_target_loses_nothing():
    """Its own answers at its own rows: shifted by one either way nearly none would be right."""
    answers = text_answers()
    target = tiny.tiny_llama(seed=9)
    lesson = DraftLesson(target, answers, DraftTraining(), target.device)
    assert lesson.figures(torch.arange(6))["token_match"] == 1.0
    for shift in (-1, 1):
        moved = answers.batch

        class Shifted(DraftAnswers):
            def batch(self, rows, hidden, moved=moved, shift=shift):
                inputs, first = moved(rows, hidden)
                return inputs, first + shift

        other = DraftLesson(target, Shifted(**vars(answers)), DraftTraining(), target.device)
        assert other.figures(torch.arange(6))["token_match"] < 0.3


@pytest.mark.parametrize("level", DRAFT_LEVELS)
def test_only_what_is_named_is_trained(level, scenes, tmp_path):
    model, answers = of_pair(scenes)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tuned, history, count = tune_draft(level, model, answers, PLAN, Lora(4, 8.0))
    assert len(history) == 2 and history[0]["token_match_hidden"] is not None
    changed = {
        name for name, value in tuned.state_dict().items() if not torch.equal(value, before[name])
    }
    if level == L6_HEAD:
        assert changed == {"lm_head.weight"} and count == mini.VOCAB * 128
    else:
        attention = ("q_proj", "k_proj", "v_proj", "o_proj")
        layers = [f"model.language_model.layers.{i}.self_attn.{n}.weight" for i in (0, 1)
                  for n in attention]  # fmt: skip
        assert changed == set(layers) and count == 8 * 4 * (128 + 128)
    assert type(tuned) is type(load_draft("mini")) and not tuned.training
    save_draft(tuned, tmp_path / "best")
    again = load_draft(str(tmp_path / "best"))
    assert again.state_dict().keys() == tuned.state_dict().keys()
    for name, value in tuned.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    tied = again.lm_head.weight is again.get_input_embeddings().weight
    assert tied == (level == L6)
    assert {path.name for path in tmp_path.iterdir()} == {"best"}


@pytest.mark.parametrize("level", DRAFT_LEVELS)
def test_a_stopped_run_goes_on_to_the_same_weights(level, tmp_path):
    answers = text_answers()

    def tune(*extra):
        return tune_draft(level, tiny.tiny_llama(seed=3), answers, PLAN, None, None, *extra)[:2]

    whole, history = tune()

    def stop(step: int, steps: int, loss: float) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(tmp_path / "state.pt", stop)
    again, resumed = tune(tmp_path / "state.pt")
    assert resumed == history
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    with pytest.raises(ValueError, match="other answers or options"):
        tune_draft(level, tiny.tiny_llama(seed=4), answers, PLAN, state=tmp_path / "state.pt")


def test_tuning_teaches_and_stays_lossless():
    answers, draft = text_answers(), tiny.tiny_llama(seed=3)
    plan = DraftTraining(epochs=15, batch=5, rate=2e-2, held_out=0.2, patience=15)
    tuned, history, _ = tune_draft(L6, draft, answers, plan, Lora(dropout=0.0))
    assert history[-1]["train_loss"] < 0.5 * history[0]["train_loss"]
    prompt = answers.prompt(0)["input_ids"]
    decoder = SpeculativeDecoder(
        TransformersTarget(tiny.tiny_llama(seed=9)), ModelDrafter(tuned, 3), SpecConfig(4, 8)
    )
    found = decoder.generate({"input_ids": prompt}, Request(draft_inputs={"input_ids": prompt}))
    assert found.tokens == answers.answers[0].tolist()


def test_the_divergence_from_the_targets_distribution_counts(scenes):
    model, answers = of_pair(scenes)
    head = read_head("mini")
    teacher = Teacher(open_states(scenes / "states", head, scenes / "pairs.json"), head)
    rows, shown = torch.arange(3), torch.zeros(3, dtype=torch.bool)
    assert (teacher.said(rows, 9).argmax(-1) == answers.answers[rows, :9]).all()

    def loss(weight: float) -> float:
        plan = DraftTraining(kl_weight=weight)
        with torch.no_grad():
            total, count = DraftLesson(model, answers, plan, model.device, teacher).loss(
                rows, shown
            )
        return float(total / count)

    plain, one = loss(0.0), loss(1.0)
    assert one > plain and loss(2.0) == pytest.approx(2 * one - plain, rel=1e-4)
    with pytest.raises(ValueError, match="target's states"):
        tune_draft(L6_HEAD, model, answers, DraftTraining(kl_weight=1.0))


def test_prompts_are_those_of_the_runtime(scenes):
    _, answers = of_pair(scenes)
    assert answers.media == ("event_pixel_values",)
    sample = make_sample(FIRST_SEED + 2)
    live = mini.draft_inputs(QUESTIONS[0], sample.event_image, mini.load_tokenizer())
    hidden = torch.tensor([False, True])
    inputs, first = answers.batch(torch.tensor([2, 3]), hidden)
    length = live["input_ids"].shape[1]
    assert torch.equal(inputs["input_ids"][0, :length], live["input_ids"][0])
    assert torch.equal(inputs["event_pixel_values"][0], live["event_pixel_values"][0])
    assert not inputs["event_pixel_values"][1].any() and first.tolist() == [length - 1] * 2
    short = DraftAnswers(**{**vars(answers), "limit": 20})
    with pytest.raises(ValueError, match="the draft has 20"):
        short.batch(torch.arange(2), hidden)


@pytest.fixture(scope="module")
def runs(scenes, tmp_path_factory) -> Path:
    """Untrained runs of every level that is of no states."""
    folder = tmp_path_factory.mktemp("runs")
    pairs = open_text_pairs(scenes / "pairs.json", mini.VOCAB)
    sizes = {"width": 16, "heads": 2, "intermediate": 16}
    beside = {"command": "c", "train_answers": 1, "val_answers": 1, "split": "s",
              "draft": "draft_raw", "finished": "1"}  # fmt: skip
    for level, network in (("TOKEN", "token"), ("PREFIX", "prefix")):
        write_run(folder / level, build(network, pairs, sizes), HISTORY, beside | {"level": level})
    model = load_draft("draft")
    for level in DRAFT_LEVELS:
        write_run(folder / level, model, HISTORY, beside | {"level": level}, save_draft)
    return folder


ARMS = ["constant", "token", "token_hidden", "prefix", "prefix_hidden", "l6", "l6_hidden",
        "l6head", "l6head_hidden"]  # fmt: skip


def test_arms_answer_as_the_target_does(runs):
    options = Options("c", gamma=3, max_new_tokens=10, adapters=runs, threads=1)
    pair = MiniPair(options.settings())
    assert pair.text_arms == ARMS and pair.state_arms == []
    tasks = pair.scene_tasks(1)
    workload = pair.workload(tasks)
    plain = workload.arms["target"]().run(tasks[0])
    accepted = {}
    for name in pair.text_arms:
        outcome = workload.arms[name]().run(tasks[0])
        assert outcome.tokens == plain.tokens and any(r.rows > 1 for r in outcome.rounds), name
        accepted[name] = sum(r.accepted for r in outcome.rounds)
    # The folder holds the draft of the pair itself.
    draft = workload.arms["draft"]().run(tasks[0])
    assert accepted["l6"] == accepted["l6head"] == sum(r.accepted for r in draft.rounds)
    folder = MiniPair(options.settings(), str(runs / "L6/best"))
    for name, value in folder.draft_model.state_dict().items():
        assert torch.equal(value, pair.draft_model.state_dict()[name]), name


def test_a_tuned_draft_has_no_score(runs, tmp_path, capsys):
    assert xspec("score", tmp_path, "--run", runs, "--level", "L6") == 2
    assert "is a tuned draft (L6), no adapter" in " ".join(capsys.readouterr().err.split())


def test_arms_are_chosen_and_missing_ones_named(runs, tmp_path):
    assert trained_arms(None) == ([], [])
    assert trained_arms(runs, "L6") == ([], ["constant", "l6", "l6_hidden"])
    for folder, chosen, error, match in (
        (None, "L6", ValueError, "needs --adapters"),
        (runs, "L6,L9", ValueError, "'L9'"),
        (runs, "L6,L4", FileNotFoundError, "L4"),
        (tmp_path, "L6", FileNotFoundError, "L6"),
        (tmp_path, "", FileNotFoundError, "no run"),
    ):
        with pytest.raises(error, match=match):
            trained_arms(folder, chosen)


def test_a_blind_draft_sees_zeros():
    model, seen = load_draft("draft"), []
    model.model.visual_tower.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    inputs = mini.draft_inputs(QUESTIONS[0], make_sample(1).event_image, mini.load_tokenizer())
    drafter = BlindDrafter(model, 2)
    drafter.begin(Request(draft_inputs=inputs))
    assert len(seen) == 1 and not seen[0].any() and inputs["event_pixel_values"].any()


def text_folder(folder: Path, seed: int) -> Path:
    tiny.tiny_llama(seed).save_pretrained(folder)
    words = {f"w{i}": i for i in range(tiny.VOCAB)} | {"<unk>": 0}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    return folder


def test_commands_tune_a_text_draft_into_a_folder(tmp_path, capsys):
    target, draft = text_folder(tmp_path / "target", 9), text_folder(tmp_path / "draft", 3)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"w{i} w{i + 4} w{i + 9}" for i in range(5, 10)))
    pairs, out = tmp_path / "pairs.json", tmp_path / "runs/l6"
    options = ["--draft", draft, "--target", target, "--num-epochs", 1, "--max-new-tokens", 6]
    wanted = [pairs, *options, "--prompts", prompts, "--val-split", 0.2]
    assert xspec("train", "lora", *wanted, "--output-dir", out) == 0, capsys.readouterr().err
    rows = json.loads(pairs.read_text())["results"]
    ids = torch.tensor([[5, 9, 14]])
    assert rows[0]["vl_tokens"] == tiny.reference(tiny.tiny_llama(9), ids, 6)
    assert {f.name for f in out.iterdir()} == {
        "best", "results.json", "RESULTS.md", "loss.png", "acceptance.png",
    }  # fmt: skip
    record = json.loads((out / "results.json").read_text())
    assert record["level"] == "L6" and record["parameters"] == 3 * 16 * (4 * 64 + 4 * 64 - 64)
    tuned = AutoModelForCausalLM.from_pretrained(out / "best")
    assert tuned.config.vocab_size == tiny.VOCAB and (out / "best/tokenizer.json").is_file()
    names = load_file(out / "best/model.safetensors").keys()
    assert not any("lora" in name for name in names)
    assert xspec("train", "lm-head", pairs, *options, "--output-dir", tmp_path / "runs/head") == 0
    assert json.loads((tmp_path / "runs/head/results.json").read_text())["level"] == "L6HEAD"


def test_bad_input_is_one_line(scenes, tmp_path, capsys, monkeypatch):
    pairs, rows = tmp_path / "pairs.json", json.loads((scenes / "pairs.json").read_text())

    def refused(says: str, *options: object, file: Path = pairs) -> None:
        code = xspec("train", "lora", file, "--output-dir", tmp_path / "run", *options)
        said = capsys.readouterr().err.strip()
        assert code == 2 and says in said and "\n" not in said, said
        assert not (tmp_path / "run").exists()

    refused("pairs not found")
    refused("must be 0 or more", "--scenes", -1)
    pairs.write_text(json.dumps({"results": rows["results"]}))
    refused("--dataset-dir says where the events are")
    high = [rows["results"][0] | {"vl_tokens": [mini.VOCAB]}]
    pairs.write_text(json.dumps(rows | {"results": high}))
    refused(f"an id below {mini.VOCAB}")
    good = scenes / "pairs.json"
    refused("--kl-weight needs --states", "--kl-weight", 1, file=good)
    refused("rank must be", "--lora-rank", 0, file=good)
    refused("has no linear x_proj", "--lora-modules", "x_proj", file=good)
    refused("config.json is missing", "--draft", tmp_path / "none", file=good)
    refused("--dtype must be one of", "--dtype", "int8", file=good)
    pairs.write_text(json.dumps(rows | {"results": rows["results"][:3]}))
    refused("lengths differ", "--states", scenes / "states", "--kl-weight", 1)
    folder = text_folder(tmp_path / "draft", 3)
    refused("needs --target FOLDER", "--draft", folder, file=text_pairs(tmp_path))
    (folder / "model.safetensors").write_bytes(b"no weights")
    refused("cannot be used", "--draft", folder, file=good)
    monkeypatch.setitem(sys.modules, "peft", None)
    refused("pip install 'peft>=0.18'", file=good)


def text_pairs(folder: Path) -> Path:
    row = {"query": "w3", "egpt_tokens": [3], "vl_tokens": [3, 4]}
    path = folder / "text.json"
    path.write_text(json.dumps({"results": [row, row]}))
    return path


def test_a_draft_of_another_kind_is_no_draft_of_the_pair(tmp_path):
    text_folder(tmp_path, 3)
    with pytest.raises(ValueError, match="an EventGPT of 640 tokens"):
        MiniPair(Options("c", threads=1).settings(), str(tmp_path))


def test_peft_changes_the_language_model_alone(scenes):
    module = with_lora(load_draft("mini"), Lora())
    trained = [name for name, p in module.named_parameters() if p.requires_grad]
    assert trained and all("language_model" in name and "lora_" in name for name in trained)
