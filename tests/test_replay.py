from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import pytest

from pair_cases import write_pairs
from xspec_runtime.data.pairs import contiguous_folds, read_pairs
from xspec_runtime.drafters.base import DraftTree, Request
from xspec_runtime.drafters.ngram import NgramDrafter, NgramMemory
from xspec_runtime.replay import run as replay_module
from xspec_runtime.replay.arms import PositionDrafter, replay_arms
from xspec_runtime.replay.run import ReplayOptions, replay, replay_markdown, run_replay

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / "bench" / "replay.py"


class Fixed:
    name = "fixed"

    def __init__(self, make):
        self.make, self.answers = make, []

    def begin(self, request: Request) -> None:
        pass

    def propose(self, context, rows):
        return self.make(list(context), rows)

    def end(self, answer) -> None:
        self.answers.append(list(answer))


@pytest.fixture
def pairs_file(tmp_path, rng) -> Path:
    """60 answers with much in common, as a file."""
    return write_pairs(tmp_path / "pairs.jsonl", rng, 60, 0.4)


def test_an_oracle_takes_one_verify_and_silence_one_a_token():
    answer = [4, 5, 6, 7, 8]
    oracle = Fixed(lambda context, rows: DraftTree.chain(context[-1], answer[len(context) :]))
    rounds = replay(oracle, answer, 8)
    assert [(r.known, r.accepted, r.emitted) for r in rounds] == [(1, 4, 4)]
    silent = Fixed(lambda context, rows: DraftTree.root(context[-1]))
    rounds = replay(silent, answer, 8)
    assert [(r.known, r.accepted, r.emitted) for r in rounds] == [(i, 0, 1) for i in range(1, 5)]
    assert silent.answers == [answer]
    assert replay(silent, [3], 8) == []
    with pytest.raises(ValueError, match="at least one token"):
        replay(silent, [], 8)


def test_what_lies_off_the_recorded_path_is_never_accepted(seed):
    """Right tokens under a wrong parent, and tokens beyond the end, count for nothing."""
    tree = DraftTree([1, 9, 2, 3, 4, 5], [-1, 0, 1, 0, 3, 4], [1.0] * 6)
    assert replay(Fixed(lambda c, r: tree), [1, 3], 8)[0].accepted == 1
    assert replay(Fixed(lambda c, r: tree), [1, 2, 3, 4], 8)[0].accepted == 0
    long = Fixed(lambda context, rows: DraftTree.chain(context[-1], [2, 2, 2, 2]))
    assert [(r.accepted, r.emitted) for r in replay(long, [2, 2, 2], 8)] == [(2, 2)]


def test_accept_agrees_with_the_trees_own_walk(rng):
    for _ in range(60):
        future = [rng.randrange(3) for _ in range(rng.randint(1, 8))]
        tree, edges = DraftTree.root(0), set()
        for _ in range(rng.randint(0, 30)):
            edge = rng.randrange(len(tree)), rng.randrange(3)
            if edge not in edges:
                edges.add(edge)
                tree.add(*edge, 0.5)
        paths = [[]]
        for parent, token in zip(tree.parent_idx[1:], tree.tokens[1:], strict=True):
            paths.append([*paths[parent], token])
        expected = max(len(p) for p in paths if p == future[: len(p)])
        assert replay_module._accept(tree, future, "auto") == expected


def test_position_drafters_align_known_tokens_with_the_string():
    drafter = PositionDrafter("raw")
    drafter.begin(Request(draft_inputs={"recorded_draft": [10, 11, 12, 13]}))
    assert drafter.propose([1, 2], 3).tokens == [2, 12, 13]
    assert drafter.propose([1, 2, 3, 4], 3).tokens == [4]


def score(trace: Path, pairs: Path, folds: int) -> dict[tuple, list[float]]:
    """(drafter, rows, online) -> tokens per verify of each fold, from the two files alone."""
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    target = {row["sample_idx"]: row["vl_tokens"] for row in rows}
    fold_of = {row["sample_idx"]: i * folds // len(rows) for i, row in enumerate(rows)}
    walked = defaultdict(lambda: 1)
    sums: dict[tuple, dict[int, list[int]]] = defaultdict(lambda: defaultdict(lambda: [0, 0]))
    for line in trace.read_text().splitlines():
        step = json.loads(line)
        answer, known = target[step["sample"]], len(step["context"])
        arm = step["drafter"], step["rows"], step["online"]
        assert step["context"] == answer[:known]
        assert walked[arm, step["sample"]] == known, "rounds follow each other without gaps"
        assert len(step["tokens"]) < step["rows"]
        reached = {-1: known}
        for i, (token, parent) in enumerate(zip(step["tokens"], step["parent_idx"], strict=True)):
            assert -1 <= parent < i
            at = reached.get(parent)
            if at is not None and at < len(answer) and answer[at] == token:
                reached[i] = at + 1
        accepted = max(reached.values()) - known
        assert accepted == step["accepted"]
        emitted = min(accepted + 1, len(answer) - known)
        walked[arm, step["sample"]] += emitted
        tally = sums[arm][fold_of[step["sample"]]]
        tally[0] += emitted
        tally[1] += 1
    for (_, sample), known in walked.items():
        assert known == len(target[sample])
    return {arm: [e / v for _, (e, v) in sorted(f.items())] for arm, f in sums.items()}


def assert_scored(results: dict, trace: Path, pairs: Path) -> None:
    scored = score(trace, pairs, results["config"]["folds"])
    arms = {(e["drafter"], e["rows"], e["online"]): e for e in results["replay"]}
    assert scored.keys() == arms.keys()
    for arm, entry in arms.items():
        found = [fold["tokens_per_verify"] for fold in entry["folds"]]
        assert found == pytest.approx(scored[arm])
        assert entry["tokens_per_verify"] == pytest.approx(sum(found) / len(found))


def test_an_independent_scorer_agrees(pairs_file, tmp_path):
    options = ReplayOptions(pairs_file, folds=4, gamma=3, rows=(4, 12))
    results = run_replay(options, tmp_path / "trace.jsonl")
    assert results["complete"] and results["schema"] == "xspec.replay/1"
    assert len(results["replay"]) == 2 + 2 * 2 * 2
    assert_scored(results, tmp_path / "trace.jsonl", pairs_file)
    table = replay_markdown(results)
    assert table.count("\n| ") == len(results["replay"]) and "memory tree | 12 | online" in table


def test_after_10_counts_the_verifies_that_start_late(pairs_file):
    results = run_replay(ReplayOptions(pairs_file, rows=(6,)))
    targets = [json.loads(line)["vl_tokens"] for line in pairs_file.read_text().splitlines()]
    train = NgramMemory(recency=0)
    train.extend(targets[12:])
    rounds = [
        r for t in targets[:12] for r in replay(NgramDrafter(train, False), t, 6) if r.known >= 10
    ]
    expected = sum(r.emitted for r in rounds) / len(rounds)
    entry = next(e for e in results["replay"] if (e["drafter"], e["online"]) == ("memory tree", 0))
    assert entry["folds"][0]["after_10"] == pytest.approx(expected)


def test_train_file_replaces_folds(pairs_file):
    results = run_replay(ReplayOptions(pairs_file, train=pairs_file, rows=(16,)))
    by_arm = {(e["drafter"], e["online"]): e for e in results["replay"]}
    assert all(len(entry["folds"]) == 1 for entry in results["replay"])
    folds = run_replay(ReplayOptions(pairs_file, rows=(16,)))["replay"]
    tree = next(e for e in folds if (e["drafter"], e["online"]) == ("memory tree", False))
    assert by_arm["memory tree", False]["tokens_per_verify"] > tree["tokens_per_verify"]


def test_interruption_keeps_what_is_finished(pairs_file, tmp_path):
    calls = []

    def stop(done: int, steps: int, arm: str) -> None:
        calls.append(steps)
        if done > 3 * 60 + 5:
            raise KeyboardInterrupt

    trace = tmp_path / "trace.jsonl"
    results = run_replay(ReplayOptions(pairs_file, folds=4, rows=(4,)), trace, stop)
    assert not results["complete"] and len(results["replay"]) == 3
    assert set(calls) == {6 * 60}
    assert_scored(results, trace, pairs_file)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": 0}, "gamma"),
        ({"rows": (1,)}, "rows must be from 2 to 64, got 1"),
        ({"rows": "6,x"}, "rows must be numbers like 6,16, got '6,x'"),
        ({"rows": (6, 6)}, "different numbers"),
        ({"folds": 1}, "folds must be from 2"),
    ],
)
def test_bad_options(pairs_file, options, message):
    with pytest.raises(ValueError, match=message):
        run_replay(ReplayOptions(pairs_file, **options))


def command(*arguments: object) -> list[str]:
    return [sys.executable, str(BENCH), *map(str, arguments)]


def test_command_writes_results_and_trace(pairs_file, tmp_path):
    files = "--json", tmp_path / "r.json", "--trace", tmp_path / "t.jsonl"
    done = subprocess.run(
        command(pairs_file, "--rows", "6,16", "--limit", 40, *files), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "memory tree" in done.stdout
    results = json.loads((tmp_path / "r.json").read_text())
    assert results["config"]["samples"] == 40 and results["command"].startswith("python")
    some = tmp_path / "first.jsonl"
    some.write_text("".join(pairs_file.read_text().splitlines(keepends=True)[:40]))
    assert_scored(results, tmp_path / "t.jsonl", some)
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []


def test_command_names_bad_input(pairs_file, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text(pairs_file.read_text() + '{"vl_tokens": [1], "egpt_tokens": [40000]}\n')
    done = subprocess.run(command(bad), capture_output=True, text=True)
    assert done.returncode == 2
    assert "bad.jsonl, line 61: egpt_tokens[0] must be an id below 32000" in done.stderr
    assert "Traceback" not in done.stderr


def test_ctrl_c_ends_cleanly(tmp_path):
    generator = random.Random(1)
    pairs = tmp_path / "pairs.jsonl"
    with pairs.open("w") as file:
        for _ in range(400):
            target = [generator.randrange(20) for _ in range(200)]
            file.write(json.dumps({"egpt_tokens": [1], "vl_tokens": target}) + "\n")
    files = "--json", tmp_path / "r.json", "--trace", tmp_path / "t.jsonl"
    run = subprocess.Popen(
        command(pairs, *files, "--rows", 64),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not list(tmp_path.glob(".t.jsonl.*")):
        assert run.poll() is None, run.communicate()
        time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    out, err = run.communicate(timeout=60)
    assert run.returncode == 130 and "Traceback" not in err
    assert json.loads((tmp_path / "r.json").read_text())["complete"] is False
    assert "Interrupted" in out
    assert (tmp_path / "t.jsonl").is_file()


@pytest.mark.slow
def test_goals_on_the_recorded_file(shared_dir):
    """Means over 5 contiguous folds of the recorded answers."""
    pairs = read_pairs(shared_dir / "data" / "dsec_1s_token_pairs.jsonl")
    goals = {(6, False): 3.2, (16, False): 4.3, (16, True): 5.4, (64, True): 7.0}
    found = {}
    for arm in replay_arms(gamma=5, rows=(6, 16, 64)):
        key = arm.rows, arm.online
        if arm.drafter != "memory tree" or key not in goals:
            continue
        folds = []
        for number, fold in enumerate(contiguous_folds(len(pairs), 5)):
            drafter = arm.make(number, [*pairs[: fold.start], *pairs[fold.stop :]])
            rounds = [r for i in fold for r in replay(drafter, pairs[i].target, arm.rows)]
            folds.append(sum(r.emitted for r in rounds) / len(rounds))
        found[key] = sum(folds) / len(folds)
    print(found)
    assert found.keys() == goals.keys()
    assert {key: found[key] for key, goal in goals.items() if found[key] < goal} == {}
