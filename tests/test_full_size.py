"""Full size in miniature: outcomes are imposed, everything else is computed."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from pair_cases import write_pairs
from running import bench_script, invoke
from test_graphs import use_tape
from tiny import VOCAB, prompt, tiny_llama
from xspec_runtime.config import SpecConfig
from xspec_runtime.drafters.base import DraftTree, Request
from xspec_runtime.drafters.graph_draft import GraphDrafter
from xspec_runtime.drafters.memory import NgramMemory
from xspec_runtime.drafters.ngram import NgramDrafter
from xspec_runtime.engine import SpeculativeDecoder
from xspec_runtime.full_size.adapters import state_pass, token_adapter_tail
from xspec_runtime.full_size.imposed import ImposedTarget, ImposedTree, imposed_drafts, script
from xspec_runtime.full_size.options import Options
from xspec_runtime.full_size.oracle import Oracle, oracles_of_pairs, read_oracle
from xspec_runtime.full_size.run import run_full_size
from xspec_runtime.targets.llama import LlamaTarget
from xspec_runtime.targets.llama_weights import LlamaWeights

ROOT = Path(__file__).resolve().parent.parent
TOKENS, ROWS = 24, 8
ANSWER = script(VOCAB, TOKENS, 5)


def target(graphs: bool | str, chain: Oracle | None = None) -> ImposedTarget:
    weights = LlamaWeights.of(tiny_llama(1))
    return ImposedTarget(weights, ANSWER, chain, capacity=96, backend="torch", graphs=graphs)


@pytest.mark.parametrize("mode", ["ops", "plain call", "tape"])
def test_rounds_accept_what_was_recorded(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if mode == "tape":
        use_tape(monkeypatch)
    oracle = Oracle("test", [3, 0, 7, 1, 2])
    asked = NgramDrafter(NgramMemory(), online=False)
    drafter = ImposedTree(asked, ANSWER, VOCAB, oracle)
    decoder = SpeculativeDecoder(target(mode != "ops"), drafter, SpecConfig(ROWS, TOKENS))
    ids = prompt(2)
    out = decoder.generate({"input_ids": ids}, Request(ids[0].tolist()))
    assert out.tokens == ANSWER[:TOKENS]
    accepted = [r.accepted for r in out.rounds]
    assert accepted[:-1] == [oracle[i] for i in range(len(accepted) - 1)] and len(accepted) > 4
    assert {r.rows for r in out.rounds[:-1]} == {ROWS}


@pytest.mark.parametrize("mode", ["plain call", "tape"])
def test_an_adapter_in_the_same_launch(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its drafts are computed behind every verify, and as many as recorded are then right."""
    if mode == "tape":
        use_tape(monkeypatch)
    oracle = Oracle("test", [3, 0, 4, 1, 2])
    ours = target(True, oracle)
    draft = GraphDrafter(LlamaTarget(tiny_llama(3), 96, "torch"), 4)
    drafter = token_adapter_tail(ours, draft, 4, tiny=True)
    ids, rounds = prompt(2), []
    for _ in range(2):
        out = SpeculativeDecoder(ours, drafter, SpecConfig(5, TOKENS)).generate(
            {"input_ids": ids}, Request(ids[0].tolist(), {"input_ids": ids})
        )
        assert out.tokens == ANSWER[:TOKENS]
        rounds += [(r.rows - 1, r.accepted) for r in out.rounds if r.rows > 1]
        # What was said last by a round of one row, too.
        assert drafter._follower.feed.fed[:TOKENS].tolist() == ANSWER[:TOKENS]
    assert len(rounds) > 8
    assert all(found == min(oracle[i], most) for i, (most, found) in enumerate(rounds)), rounds
    plain = target(True)
    wrong = token_adapter_tail(plain, draft, 4, tiny=True)
    with pytest.raises(ValueError, match="need accepted lengths"):
        SpeculativeDecoder(plain, wrong, SpecConfig(5, TOKENS)).generate(
            {"input_ids": ids}, Request(ids[0].tolist(), {"input_ids": ids})
        )


def test_the_tokens_of_a_pass_are_those_of_its_states() -> None:
    run = state_pass(target(True), 6, True, 1)
    assert len(run()) == 6 and run() == run() and all(0 <= token < VOCAB for token in run())


def test_drafts_in_the_prefill_and_after_it() -> None:
    ids, drafts = prompt(2), imposed_drafts([9] * 6, ANSWER, VOCAB, 4)
    assert drafts[:4] == ANSWER[:4] and all(
        a != b for a, b in zip(drafts[4:], ANSWER[4:], strict=False)
    )
    for fused in ("fast", "exact"):
        config = SpecConfig(7, TOKENS, prefill_fused=fused)
        out = SpeculativeDecoder(target(True), None, config).generate(
            {"input_ids": ids}, drafted=drafts
        )
        assert out.tokens == ANSWER[:TOKENS]
        if fused == "fast":
            assert (out.prefill_drafted, out.prefill_accepted) == (6, 4)
        else:
            # The first of them is the token of the prefill itself.
            assert [(r.rows, r.accepted) for r in out.rounds[:2]] == [(6, 3), (1, 0)]


def test_everything_else_is_computed() -> None:
    """K and V of the script's rows are those of a target that is fed them."""
    imposed, ids = target(False), prompt(3)
    SpeculativeDecoder(imposed, None, SpecConfig(1, TOKENS)).generate({"input_ids": ids})
    fed = LlamaTarget(LlamaWeights.of(tiny_llama(1)), 96, "torch", graphs=False)
    fed.prefill({"input_ids": ids})
    fed.forward(DraftTree.chain(ANSWER[0], ANSWER[1 : TOKENS - 1]))
    assert imposed.cache.length == ids.shape[1] + TOKENS - 1
    for got, want in zip(imposed.cache.layers, fed.cache.layers, strict=True):
        rows = slice(imposed.cache.length)
        # Rows one by one and together: torch on a CPU rounds their sums differently.
        close = {"atol": 1e-4, "rtol": 1e-4}
        torch.testing.assert_close(got.keys[:, :, rows], want.keys[:, :, rows], **close)
        torch.testing.assert_close(got.values[:, :, rows], want.values[:, :, rows], **close)


def test_only_greedy_requests() -> None:
    config = SpecConfig(1, 4, temperature=1.0)
    with pytest.raises(ValueError, match="greedy"):
        SpeculativeDecoder(target(False), None, config).generate({"input_ids": prompt(2)})


def test_oracles(tmp_path: Path) -> None:
    path = tmp_path / "oracle"
    path.write_text("3\n0\n\n7\n")
    assert [read_oracle(path, 8)[i] for i in range(4)] == [3, 0, 7, 3]
    line = {"drafter": "tree", "rows": 8, "accepted": 2, "tokens": [1]}
    path.write_text(json.dumps(line) + "\n" + json.dumps(line | {"accepted": 4}))
    assert read_oracle(path, 8).mean == 3
    path.write_text('{"0": 3, "2": 1,\n "5": 2}')
    assert sorted(read_oracle(path, 8).accepted) == [0, 0, 0, 2, 5, 5]
    for text, message in {
        "": "no accepted lengths",
        "8": "less than the 8 rows",
        "-1": "line 1",
        "true": "line 1",
        "1\n{}": "line 2",
        '{"a": 1}': "line 1",
        '{"70": 1}': "line 1",
        "[1, 2]": "line 1",
        json.dumps(line) + "\n" + json.dumps(line | {"drafter": "draft"}): "mixes 2 arms",
    }.items():
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_oracle(path, 8)
    with pytest.raises(FileNotFoundError, match="oracle not found"):
        read_oracle(tmp_path / "none", 8)


def test_oracles_of_recorded_answers(tmp_path: Path) -> None:
    seed = random.randrange(2**32)
    path = write_pairs(tmp_path / "pairs.jsonl", random.Random(seed), 12, 0.9)
    tree, chain = oracles_of_pairs(path, 8, 5)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    emitted = sum(len(row["vl_tokens"]) - 1 for row in rows)
    assert emitted - 12 * 8 <= sum(a + 1 for a in tree.accepted) <= emitted + 12 * 8, seed
    assert max(tree.accepted) < 8 and tree.mean > 0.3, seed
    for row, accepted in zip(rows, chain.accepted, strict=True):
        draft, answer = row["egpt_tokens"], row["vl_tokens"]
        assert draft[:accepted] == answer[:accepted], seed
        assert accepted == 5 or draft[accepted] != answer[accepted], seed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "int8"}, "--weights must be nf4 or bf16"),
        ({"shape": "half"}, "--shape must be full or tiny"),
        ({"rows": 1}, "--rows"),
        ({"gamma": 40}, "--gamma"),
        ({"window_ms": -1.0}, "--window-ms"),
        ({"shape": "full"}, "recorded ones, not made up: give --pairs"),
    ],
)
def test_wrong_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_full_size(Options(**({"shape": "tiny", "device": "cpu"} | options)), lambda line: None)


def test_tiny(tmp_path: Path) -> None:
    """The command itself, every arm."""
    out = tmp_path / "out.json"
    arguments = ["--shape", "tiny", "--weights", "bf16", "--window-ms", 3, "--json", out]
    done = invoke(bench_script("full_size").app, *arguments)
    assert done.exit_code == 0, done.output
    assert "accepted lengths are imposed" in done.output and "made up from seed 0" in done.output
    found = json.loads(out.read_text())
    arms = found["arms"]
    assert list(arms) == [
        *("transformers_generate", "transformers_research_loop"),
        *("plain", "separate_verify", "l4_verify", "fused_exact", "fused_fast", "memory_tree"),
        "adapter_tail",
    ]
    assert "imposed" in found["notice"] and not found["skipped"]
    assert arms["plain"]["speedup_decode"] == 1 and arms["plain"]["tokens_per_verify"] == 1
    assert arms["fused_fast"]["prefill_accepted"] > 0 == arms["fused_exact"]["prefill_accepted"]
    assert arms["separate_verify"]["verifies"] == arms["l4_verify"]["verifies"] == 1
    tail = arms["adapter_tail"]
    assert tail["verifies"] > 1 < tail["accepted"]
    assert tail["round"]["readbacks_per_round"] == 1.0
    for name, arm in arms.items():
        drafted = name in ("separate_verify", "l4_verify", "fused_exact", "fused_fast")
        hidden = arm["total_ms"] + 3 - arm["total_with_window_ms"]
        assert hidden == pytest.approx(3 if drafted else 0, abs=1e-6), name


def test_four_bit_without_peers() -> None:
    lines: list[str] = []
    options = Options("nf4", "tiny", device="cpu", peers=False)
    found = run_full_size(options, lines.append)
    assert next(iter(found["arms"])) == "plain" and len(found["arms"]) == 7
    assert all("imposed" in line for line in lines[2:]) and len(lines) == 9
