"""Token pairs and hidden states of both models over a miniature dataset."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from xspec_runtime import cli
from xspec_runtime.data.dsec import open_dataset
from xspec_runtime.data.dsec_miniature import write_miniature
from xspec_runtime.data.pairs import read_pairs
from xspec_runtime.extract import ExtractOptions, extract, read_states
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


def test_damaged_states(data, pair, tmp_path):
    options = ExtractOptions(tmp_path / "p.json", tmp_path / "states", max_new_tokens=3)
    extract(pair, open_dataset(data), options)
    chunk, index = tmp_path / "states/chunk_00000.safetensors", tmp_path / "states/index.json"
    whole = chunk.read_bytes()
    chunk.write_bytes(whole[:50])
    with pytest.raises(RuntimeError, match="is damaged"):
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


def test_command(data, tmp_path, monkeypatch, capsys):
    def run(*arguments: object) -> int:
        monkeypatch.setattr("sys.argv", ["xspec", "extract", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code

    out = tmp_path / "pairs.json"
    base = ("--dataset-dir", data, "--output", out, "--max-new-tokens", 4, "--max-samples", 1)
    assert run(*base, "--single-question", "What moves?") == 0
    assert "1 pairs in" in capsys.readouterr().err
    assert torch.tensor(json.loads(out.read_text())["results"][0]["vl_tokens"]).numel() == 4
    assert run(*base, "--single-question", "a", "--questions-file", data) == 2
    assert run(*base, "--max-questions", -1) == 2
    open_dataset(data).clips[0].events.rename(tmp_path / "kept.npy")
    try:
        assert run(*base[:2], "--output", tmp_path / "b.json", "--max-samples", 1) == 2
        assert "could be answered: event file not found" in capsys.readouterr().err
    finally:
        (tmp_path / "kept.npy").rename(open_dataset(data).clips[0].events)
