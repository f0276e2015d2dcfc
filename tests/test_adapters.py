"""Adapters: what predicts what, no future, files, the drafter, training."""

from __future__ import annotations

import contextlib
import json
import random
from pathlib import Path

import pytest
import torch
from torch import nn

import tiny
from xspec_kernels import ranges
from xspec_runtime.adapters import (
    PrefixAdapter,
    PrefixAdapterConfig,
    TokenAdapter,
    TokenAdapterConfig,
    alignment,
    load_adapter,
    save_adapter,
)
from xspec_runtime.adapters.mini.pair import ADAPTERS, ARMS, adapter_drafter, evaluate, unseen_pairs
from xspec_runtime.adapters.mini.train import train_adapters
from xspec_runtime.adapters.training.pair_loss import pair_loss, predictions
from xspec_runtime.config import SpecConfig
from xspec_runtime.data.captions import QUESTIONS
from xspec_runtime.data.scenes import make_sample
from xspec_runtime.drafters.adapter import AdapterDrafter, DraftText
from xspec_runtime.drafters.base import Drafter, Request
from xspec_runtime.engine import SpeculativeDecoder
from xspec_runtime.models import mini
from xspec_runtime.models.mini_run import Plan, Run
from xspec_runtime.replay.run import replay
from xspec_runtime.targets.transformers import TransformersTarget

SIZE, LENGTH, KINDS = 48, 12, ("token", "prefix")


def network(kind: str, vocab: int = SIZE, positions: int = 32) -> TokenAdapter | PrefixAdapter:
    """A random adapter in evaluation mode."""
    if kind == "token":
        config = TokenAdapterConfig(vocab, 32, 2, 2, 64, positions, tied=True)
        return TokenAdapter(config).eval()
    config = PrefixAdapterConfig(vocab, 32, 2, 64, draft_positions=24, positions=positions)
    return PrefixAdapter(config).eval()


def ids(rng: random.Random, length: int, vocab: int = SIZE) -> list[int]:
    return [rng.randrange(1, vocab) for _ in range(length)]


class Copying(TokenAdapter):
    """Says at every position the draft's token there."""

    def forward(self, draft: torch.Tensor) -> torch.Tensor:
        return nn.functional.one_hot(draft, self.config.vocab_size).float()


def accepted_by_copying(target: list[int], draft: list[int]) -> int:
    """Accepted tokens where the draft's text, as it stands, is what the adapter says."""
    copying = Copying(TokenAdapterConfig(SIZE, 32, 1, 2, 64, 32))
    made = AdapterDrafter(copying, 4, lambda request: draft)
    return sum(r.accepted for r in replay(made, target, 5))


def test_input_position_predicts_the_token_after_it(rng) -> None:
    target = ids(rng, LENGTH)
    answers = torch.tensor([target, [*target[:5], *[0] * 7]])
    wanted = alignment.labels(answers, LENGTH, pad=0)
    assert wanted[0].tolist() == [*target[1:], 0]
    assert wanted[1].tolist() == [*target[1:5], *[0] * 8]
    assert alignment.labels(answers, 3, pad=0)[0].tolist() == target[1:4]
    # One token known, the given one: what comes next is what position 0 predicts.
    assert alignment.continuation("abcdef", 1, 3) == "abc"
    assert alignment.continuation("abcdef", 5, 3) == "ef"
    with pytest.raises(ValueError, match="first token"):
        alignment.continuation("abcdef", 0, 3)
    assert accepted_by_copying(target, target[1:]) == LENGTH - 1 - len(range(5, LENGTH, 5))


@pytest.mark.parametrize("shift", [0, 2])
def test_an_alignment_off_by_one_accepts_nothing(rng, monkeypatch, shift) -> None:
    target = rng.sample(range(1, SIZE), LENGTH)
    monkeypatch.setattr(alignment, "target_position", lambda position: position + shift)
    labels = alignment.labels(torch.tensor([target]), LENGTH, pad=0)[0].tolist()
    assert labels[: LENGTH - 2] != target[1 : LENGTH - 1]
    if shift == 2:  # runtime then has no prediction for the first token it must propose
        with pytest.raises(ValueError, match="known"):
            accepted_by_copying(target, target[1:])
    else:
        assert accepted_by_copying(target, target[1:]) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_training_and_runtime_agree_on_the_alignment(kind, seed) -> None:
    """Pairs whose target is a code of the draft, one place on: learned, then replayed."""
    generator = torch.Generator().manual_seed(seed)
    code = torch.randperm(SIZE - 1, generator=generator) + 1
    if kind == "token":
        drafts = torch.randint(1, SIZE, (256, LENGTH - 1), generator=generator)
    else:  # one word says it all: attention to it is learned at once
        drafts = torch.randint(1, SIZE, (256, 1), generator=generator).expand(-1, LENGTH - 1)
    targets = torch.cat([torch.ones(256, 1, dtype=torch.long), code[drafts - 1]], 1)
    adapter = network(kind).train()
    loss = pair_loss(adapter, drafts, targets)
    optimizer = torch.optim.Adam(adapter.parameters(), 1e-2)
    for step in range(100):
        optimizer.zero_grad()
        loss(step, torch.Generator().manual_seed(step)).backward()
        optimizer.step()
    adapter.eval()
    with torch.no_grad():
        logits, expected = predictions(adapter, drafts[:8], targets[:8])
    keep = expected != 0
    assert (logits.argmax(-1) == expected)[keep].float().mean() > 0.9

    def accepted(hidden: bool) -> float:
        rounds = []
        for draft, target in zip(drafts[:8].tolist(), targets[:8].tolist(), strict=True):
            made = AdapterDrafter(adapter, 4, lambda _, d=draft: d, hide_draft=hidden)
            rounds += replay(made, target, 5)
        return sum(r.accepted for r in rounds) / sum(len(r.tree) - 1 for r in rounds)

    assert accepted(hidden=False) > 0.7
    # Without the draft nothing tells the second token; the prefix tells the later ones.
    assert accepted(hidden=True) < (0.2 if kind == "token" else 0.75)


@pytest.mark.parametrize("kind", KINDS)
def test_no_future(kind, rng, seed) -> None:
    adapter, draft, answer = network(kind), ids(rng, 10), ids(rng, 20)
    for i in (0, 7, 18):
        other = [*answer[: i + 1], *ids(rng, 19 - i)]
        with torch.no_grad():
            if kind == "token":  # the target's tokens are no input; the draft's later ones neither
                a, b = adapter(torch.tensor([answer, other]))
            else:
                draft_ids = torch.tensor([draft, draft])
                a, b = adapter(draft_ids, torch.tensor([answer, other]))
        assert torch.allclose(a[: i + 1], b[: i + 1], atol=1e-5)
        assert not torch.allclose(a[i + 1 :], b[i + 1 :], atol=1e-3)


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_proposals_depend_on_the_committed_prefix_alone(kind, hidden, rng, seed) -> None:
    """A drafter whose proposals were mostly rejected proposes what a fresh one does."""
    adapter, draft, answer = network(kind), ids(rng, 10), ids(rng, 30)
    used, fresh = (AdapterDrafter(adapter, 5, lambda _: draft, hide_draft=hidden) for _ in range(2))
    used.begin(Request())
    known = 1
    while known <= len(answer):
        tree = used.propose(answer[:known], 6)
        fresh.begin(Request())
        expected = fresh.propose(answer[:known], 6)
        assert tree.tokens == expected.tokens and tree.parent_idx == expected.parent_idx
        assert tree.scores == pytest.approx(expected.scores, rel=1e-3)
        known += rng.randrange(1, 4)


def test_steps_equal_the_network(rng, seed) -> None:
    adapter = network("prefix")
    with torch.no_grad():
        for parameter in adapter.parameters():  # norms and biases must count, too
            parameter.add_(0.2 * torch.randn_like(parameter))
    for draft in (ids(rng, 17), ids(rng, 40), []):
        proposer, answer = adapter.proposer(), ids(rng, 9)
        proposer.begin(draft)
        for known in (1, 2, 5, 9):
            tokens, scores = proposer.chain(answer[:known], 4, 0.0)
            path, chance = answer[:known], 1.0
            for token, score in zip(tokens, scores, strict=True):
                with torch.no_grad():
                    row = adapter(torch.tensor([draft[:24] or [0]]), torch.tensor([path]))[0, -1]
                chance *= float(row.softmax(-1).max())
                assert token == int(row.argmax()) and score == pytest.approx(chance, rel=1e-3)
                path = [*path, token]


@pytest.mark.parametrize("kind", KINDS)
def test_chain_keeps_to_gamma_rows_floor_and_positions(kind, rng, seed) -> None:
    adapter, draft = network(kind, positions=16), ids(rng, 40)
    made = AdapterDrafter(adapter, 4, lambda _: draft)
    made.begin(Request())
    assert isinstance(made, Drafter)
    answer = ids(rng, 40)
    assert len(made.propose(answer[:1], 16)) == 5 and len(made.propose(answer[:2], 3)) == 3
    assert len(made.propose(answer[:15], 16)) == 3 and len(made.propose(answer[:16], 16)) == 2
    for known in (17, 40):
        assert made.propose(answer[:known], 16).tokens == [answer[known - 1]]
    careful = AdapterDrafter(adapter, 4, lambda _: draft, floor=0.999)
    careful.begin(Request())
    assert len(careful.propose(answer[:1], 16)) == 2


def test_drafter_is_lossless_and_ranges_are_named(rng, monkeypatch, seed) -> None:
    names: list[tuple[str, int]] = []

    def record(name: str, payload: int) -> contextlib.AbstractContextManager:
        names.append((name, payload))
        assert name in ranges.NAMES
        return contextlib.nullcontext()

    monkeypatch.setattr(ranges, "range_", record)
    model, prompt = tiny.tiny_llama(seed=3), tiny.prompt(4)
    plain = tiny.reference(model, prompt, 12)
    source = DraftText(tiny.tiny_llama(seed=5), (), max_new_tokens=7)
    target = TransformersTarget(model)
    for kind in KINDS:
        for text, hidden in ((source, False), (None, True)):
            names.clear()
            made = AdapterDrafter(network(kind, tiny.VOCAB), 3, text, hide_draft=hidden)
            decoder = SpeculativeDecoder(target, made, SpecConfig(4, 12))
            request = Request(draft_inputs={"input_ids": prompt})
            answer = decoder.generate({"input_ids": prompt}, request)
            assert answer.tokens == plain
            assert ("draft.adapter", 0 if hidden else 7) in names
            assert any(name == "draft.decode" for name, _ in names) != hidden


def test_draft_text_is_the_models_own_answer() -> None:
    model, prompt = tiny.tiny_llama(seed=8), tiny.prompt(9)
    whole = tiny.reference(model, prompt, 10)
    request = Request(draft_inputs={"input_ids": prompt})
    assert DraftText(model, (), max_new_tokens=10)(request) == whole
    end = whole[3]
    text = DraftText(model, (end,), max_new_tokens=10)
    assert text(request) == text(request) == whole[: whole.index(end) + 1]


def test_published_sizes_have_the_published_parameters() -> None:
    with torch.device("meta"):
        for vocab, count in ((32010, 45_486_346), (32000, 45_476_096)):
            adapter = TokenAdapter(TokenAdapterConfig(vocab))
            assert sum(p.numel() for p in adapter.parameters()) == count


@pytest.mark.parametrize("kind", KINDS)
def test_save_and_load(kind, tmp_path, rng, seed) -> None:
    adapter = network(kind)
    save_adapter(adapter, tmp_path / "a")
    loaded = load_adapter(tmp_path / "a", SIZE)
    assert type(loaded) is type(adapter) and loaded.config == adapter.config
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    adapter.half().float().requires_grad_(False)
    draft, prefix = torch.tensor([ids(rng, 10)]), torch.tensor([ids(rng, 6)])
    inputs = (draft,) if kind == "token" else (draft, prefix)
    assert torch.equal(loaded(*inputs), adapter(*inputs))
    save_adapter(loaded, tmp_path / "b")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def damaged(folder: Path, how: str) -> None:
    """Make one thing wrong with a saved adapter."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    weights = folder / "model.safetensors"
    match how:
        case "no config":
            path.unlink()
        case "no weights":
            weights.unlink()
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:-100])
        case "not safetensors":
            weights.write_bytes(b"PK\x03\x04 not weights at all")
        case "nan":
            save_adapter(network("token").apply(lambda m: _fill(m, float("nan"))), folder)
        case "another size":
            save_adapter(network("token", positions=31), folder)
            path.write_text(json.dumps(config))
        case "not json":
            path.write_text("{")
        case "a list":
            path.write_text("[]")
        case "unknown kind":
            path.write_text(json.dumps({**config, "kind": "oracle"}))
        case "odd kind":
            path.write_text(json.dumps({**config, "kind": ["token"]}))
        case "extra value":
            path.write_text(json.dumps({**config, "code": "x"}))
        case "bad value":
            path.write_text(json.dumps({**config, "layers": 2.5}))
        case "odd heads":
            path.write_text(json.dumps({**config, "heads": 5}))


def _fill(module: nn.Module, value: float) -> None:
    for parameter in module.parameters(recurse=False):
        nn.init.constant_(parameter, value)


@pytest.mark.parametrize(
    ("how", "error", "says"),
    [
        ("no config", FileNotFoundError, "config.json is missing"),
        ("no weights", FileNotFoundError, "model.safetensors is missing"),
        ("truncated", RuntimeError, "not a readable safetensors"),
        ("not safetensors", RuntimeError, "not a readable safetensors"),
        ("nan", RuntimeError, "not finite"),
        ("another size", RuntimeError, r"position.weight is \(31, 32\), expected \(32, 32\)"),
        ("not json", ValueError, "not JSON"),
        ("a list", ValueError, "kind of token, prefix, hidden, eagle, got None and None"),
        ("unknown kind", ValueError, "prefix, hidden, eagle, got 'xspec.adapter/1' and 'oracle'"),
        ("odd kind", ValueError, "kind of token, prefix"),
        ("extra value", ValueError, "code"),
        ("bad value", ValueError, "layers must be an int in 1..128, got 2.5"),
        ("odd heads", ValueError, "multiple of 5 heads, got 32"),
        ("intact", ValueError, "vocabulary of 48 tokens, the target has 49"),
    ],
)
def test_bad_files_are_refused(how, error, says, tmp_path) -> None:
    save_adapter(network("token"), tmp_path)
    damaged(tmp_path, how)
    with pytest.raises(error, match=says) as caught:
        load_adapter(tmp_path, SIZE + (how == "intact"))
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_bad_arguments_are_refused() -> None:
    adapter, request = network("token"), Request()
    with pytest.raises(ValueError, match="gamma must be at least 1, got 0"):
        AdapterDrafter(adapter, 0, hide_draft=True)
    with pytest.raises(ValueError, match="needs a draft's text"):
        AdapterDrafter(adapter, 3)
    with pytest.raises(ValueError, match="128 tokens, the adapter 48"):
        AdapterDrafter(adapter, 3, DraftText(tiny.tiny_llama(1), ()))
    with pytest.raises(ValueError, match=r"outside 0\.\.47"):
        AdapterDrafter(adapter, 3, lambda _: [3, SIZE]).begin(request)
    with pytest.raises(ValueError, match="input_ids"):
        DraftText(tiny.tiny_llama(1), ())(request)
    with pytest.raises(ValueError, match="at most 32 ids, got 33"):
        adapter(torch.ones(1, 33, dtype=torch.long))
    good, high = torch.ones(2, 4, dtype=torch.long), torch.full((2, 4), SIZE)
    with pytest.raises(ValueError, match="unknown adapter arm 'oracle'"):
        adapter_drafter("oracle", 5)
    for drafts, targets, says in (
        (good, good[:1], "got 2 and 1"),
        (good[:0], good[:0], "got 0 and 0"),
        (good, high, "target ids must be from 0 to 47, got 48 to 48"),
    ):
        with pytest.raises(ValueError, match=says):
            pair_loss(adapter, drafts, targets)


class Folder(Run):
    """A run of nothing but adapters: no scenes are drawn."""

    def __init__(self, out: Path) -> None:
        out.mkdir()
        self.out, self.plan = out, Plan.smoke(2)


def test_training_repeats_itself_and_resumes(tmp_path, seed) -> None:
    drafts, targets = torch.randint(1, mini.VOCAB, (2, 8, 10))
    targets[:4, 6:] = 0
    written = []
    for name in ("one", "two"):
        run = Folder(tmp_path / name)
        train_adapters(run, drafts, targets, tmp_path / name / "out", steps=2)
        written.append({a: load_adapter(run.out / "out" / a, mini.VOCAB) for a in ADAPTERS})
    for name in ADAPTERS:
        one, two = (adapters[name].state_dict() for adapters in written)
        assert all(torch.equal(one[key], two[key]) for key in one)
    record = json.loads((run.out / "record.json").read_text())
    assert record["adapter_prefix"]["steps"] == 2
    # A finished stage is not trained again, and a missing export is written again.
    (run.out / "out" / "adapter" / "model.safetensors").unlink()
    train_adapters(run, drafts, targets, run.out / "out", steps=2)
    again = load_adapter(run.out / "out" / "adapter").state_dict()
    two = written[1]["adapter"].state_dict()
    assert all(torch.equal(again[key], two[key]) for key in two)


@pytest.fixture(scope="module")
def shipped() -> Path:
    if not all((mini.CHECKPOINTS / name / "config.json").is_file() for name in ADAPTERS):
        pytest.skip("no adapters beside the embedded pair: train them")
    return mini.CHECKPOINTS


def test_shipped_adapters_are_small_and_useful(shipped) -> None:
    files = [f for name in ADAPTERS for f in (shipped / name).iterdir()]
    assert sum(f.stat().st_size for f in files) < 1.5e6
    pairs = unseen_pairs(mini.load("draft_raw"), mini.load("target"), 8)
    figures = evaluate(pairs, mini.load_answers()[:200])
    assert set(ARMS) < set(figures)
    value = {name: row["tokens_per_verify"] for name, row in figures.items()}
    print(value)
    assert value["adapter_prefix"] > value["adapter_prefix_hidden"] > 2 * value["adapter"]
    assert 1.0 <= value["raw draft"] < 1.5 and value["adapter"] > 1.05


def test_live_draft_gives_the_recorded_text(shipped) -> None:
    """The arms of the runtime see what the adapters were trained on."""
    raw = mini.load("draft_raw")
    pairs = unseen_pairs(raw, mini.load("target"), 2, seed=3)
    text = DraftText(raw, (mini.EOS,))
    for i, pair in enumerate(pairs):
        events = make_sample(mini.TEST_SEED + 300_000 + i).event_image
        inputs = mini.draft_inputs(QUESTIONS[0], events, mini.load_tokenizer())
        assert tuple(text(Request(draft_inputs=inputs))) == pair.draft
    made = adapter_drafter("adapter_prefix", 5, raw)
    made.begin(Request(draft_inputs=inputs))
    assert len(made.propose(pair.target[:1], 6)) == 6
