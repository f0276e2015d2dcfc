"""Token pairs and hidden states of both models over a miniature dataset."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from running import xspec
from xspec_runtime.data.dsec import open_dataset
from xspec_runtime.data.dsec_miniature import write_miniature
from xspec_runtime.data.pairs import read_pairs
from xspec_runtime.extract import ExtractOptions, extract, read_states
from xspec_runtime.journal import Journal
from xspec_runtime.models.vlm_pair import EmbeddedPair


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("dsec")
    return write_miniature(root, ("500ms",), drives=1, clips=2)[0]


@pytest.fixture(scope="module")
def pair() -> EmbeddedPair:
    return EmbeddedPair()


def test_pairs_and_states(data, pair, tmp_path):
    questions = ("What is happening in this scene?", "Can you describe the scene?")
    options = ExtractOptions(
        tmp_path / "pairs.json", tmp_path / "states", questions, max_new_tokens=9, chunk=3
    )
    told = []
    record = extract(pair, open_dataset(data), options, lambda *at: told.append(at))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert record["total_samples"] == 4 and record["num_questions"] == 2
    pairs = read_pairs(options.output, vocab_size=640)
    assert [(p.sample, p.question) for p in pairs] == [(i, q) for i in range(2) for q in questions]
    assert pairs[0].drive == "procedural_00"
    draft, target, lengths = read_states(options.states)
    assert draft.shape == (4, 9, 128) and target.shape == (4, 9, 192)
    assert lengths.tolist() == [[len(p.draft), len(p.target)] for p in pairs]
    # State i predicts token i: the head says so.
    for states, model, ids in (
        (draft, pair.draft, [p.draft for p in pairs]),
        (target, pair.target, [p.target for p in pairs]),
    ):
        said = model.get_output_embeddings()(states.float()).argmax(-1)
        assert said.tolist() == [list(row) for row in ids]
    assert sorted(p.name for p in options.states.iterdir()) == [
        "chunk_00000.safetensors", "chunk_00001.safetensors", "index.json"
    ]  # fmt: skip


def test_resumes(data, pair, tmp_path, monkeypatch):
    options = ExtractOptions(tmp_path / "pairs.json", tmp_path / "states", max_new_tokens=5)

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract(pair, open_dataset(data), options, stop)
    assert not options.output.exists()
    told = []
    extract(pair, open_dataset(data), options, lambda *at: told.append(at))
    assert told == [(2, 2)]
    assert len(read_states(options.states)[0]) == 2
    whole = tmp_path / "whole.json"
    extract(pair, open_dataset(data), ExtractOptions(whole, max_new_tokens=5))
    first, second = (json.loads(p.read_text())["results"] for p in (options.output, whole))
    assert first == second
    with pytest.raises(ValueError, match="of a run with other options"):
        extract(pair, open_dataset(data), ExtractOptions(options.output, max_new_tokens=6))


def test_damaged_journals(tmp_path):
    path, config = tmp_path / "j.jsonl", {"gamma": 5}
    head = json.dumps(config)
    for text, rows in (
        ("", []),
        (f'{head}\n{{"key": 1}}\n{{"ke', [{"key": 1}]),
        (f'{head}\n{{"key": 1, "error": "no file"}}\n{{"key": 2}}\n', [{"key": 2}]),
    ):
        path.write_text(text)
        assert Journal(path, config, "key").rows == rows
    for row in ("{nope", "[1]", '{"sample_idx": 1}'):
        path.write_text(f'{head}\n{row}\n{{"key": 2}}\n')
        with pytest.raises(ValueError, match=f"{path}, line 2 is damaged"):
            Journal(path, config, "key")
    path.write_text("{nope")
    with pytest.raises(ValueError, match=f"{path}, line 1 is damaged"):
        Journal(path, config, "key")


def test_damaged_states(data, pair, tmp_path):
    options = ExtractOptions(tmp_path / "p.json", tmp_path / "states", max_new_tokens=3)
    extract(pair, open_dataset(data), options)
    chunk, index = tmp_path / "states/chunk_00000.safetensors", tmp_path / "states/index.json"
    whole = chunk.read_bytes()
    chunk.write_bytes(whole[:50])
    with pytest.raises(RuntimeError, match="is damaged"):
        read_states(options.states)
    save_file({"draft": torch.zeros(1, 2, 3)}, chunk)
    with pytest.raises(RuntimeError, match="is damaged: expected draft, target and lengths"):
        read_states(options.states)
    chunk.unlink()
    with pytest.raises(FileNotFoundError, match="chunk of hidden states not found"):
        read_states(options.states)
    values = json.loads(index.read_text())
    values["chunks"][0]["path"] = "../x"
    index.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="expected a file"):
        read_states(options.states)
    index.write_text("{}")
    with pytest.raises(ValueError, match="no index of hidden states"):
        read_states(options.states)


def test_command(data, tmp_path, capsys):
    run = partial(xspec, "extract")

    out = tmp_path / "pairs.json"
    base = ("--dataset-dir", data, "--output", out, "--max-new-tokens", 4, "--max-samples", 1)
    assert run(*base, "--single-question", "What moves?") == 0
    assert "1 pairs in" in capsys.readouterr().err
    assert torch.tensor(json.loads(out.read_text())["results"][0]["vl_tokens"]).numel() == 4
    assert run(*base, "--single-question", "a", "--questions-file", data) == 2
    assert run(*base, "--max-questions", -1) == 2
    capsys.readouterr()
    for option, value in (
        ("--chunk-size", 0), ("--max-samples", 0), ("--threads", -1), ("--single-question", " "),
    ):  # fmt: skip
        assert run(*base, option, value) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith(f"error: {option} ")
    open_dataset(data).clips[0].events.rename(tmp_path / "kept.npy")
    try:
        assert run(*base[:2], "--output", tmp_path / "b.json", "--max-samples", 1) == 2
        assert "could be answered: event file not found" in capsys.readouterr().err
    finally:
        (tmp_path / "kept.npy").rename(open_dataset(data).clips[0].events)
