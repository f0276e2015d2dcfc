from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pair_cases import write_pairs
from xspec_runtime.commands import app
from xspec_runtime.data.pairs import drive_folds, read_pairs
from xspec_runtime.drafters.base import DraftTree, Request
from xspec_runtime.drafters.ngram import NgramDrafter, NgramMemory
from xspec_runtime.drafters.prefix_table import PrefixTable, PrefixTableDrafter
from xspec_runtime.evaluate import plan as evaluate_plan
from xspec_runtime.evaluate.material import RecordedPairs
from xspec_runtime.evaluate.report import evaluate_markdown, lines_of, tables, write_evaluation
from xspec_runtime.evaluate.run import EvaluateOptions, Evaluation, evaluate, next_tokens
from xspec_runtime.replay import arms as replay_arms
from xspec_runtime.replay.arms import SOURCES, Source, Training, Variant
from xspec_runtime.replay.drafters import PositionDrafter, WideMemoryDrafter
from xspec_runtime.replay.run import replay
from xspec_runtime.replay.suffix import SuffixDecodingDrafter, suffix_decoding_missing
from xspec_runtime.replay.tally import ReplayRound, Tally


@pytest.fixture
def pairs_file(tmp_path, rng) -> Path:
    """40 answers, of 4 drives."""
    return write_pairs(
        tmp_path / "pairs.jsonl",
        rng,
        40,
        0.5,
        query="what?",
        event_data=lambda i: f"drive_{i // 10}/{i:06}.npy",
    )


@pytest.fixture
def text_source(monkeypatch):
    """A source that reads the draft and joins, as one line in the registry makes it."""
    source = Source(lambda training, variant: PositionDrafter("text"), reads_draft=True)
    monkeypatch.setitem(SOURCES, "text", source)


def by_line(results: dict, part: str = "verify") -> dict[str, dict[int, list[dict]]]:
    return lines_of(results, part)


def test_cells_hold_what_a_replay_gives(pairs_file):
    results = evaluate(EvaluateOptions(pairs_file, folds=4, rows="4,16", sources="memory tree"))
    assert results["complete"] and results["schema"] == "xspec.evaluate/1"
    pairs = read_pairs(pairs_file)
    memory = NgramMemory(recency=0)
    memory.extend(pair.target for pair in pairs[10:])
    tally = Tally()
    for pair in pairs[:10]:
        tally.count(replay(NgramDrafter(memory, False), pair.target, 16), pair.target)
    cell = by_line(results)["memory tree"][16][0]
    expected = tally.figures()
    for key in ("tokens_per_verify", "after_10", "acceptance_rate", "accepted_prefix", "by_depth"):
        assert cell[key] == pytest.approx(expected[key]), key
    assert cell["histogram"] == {str(k): n for k, n in expected["histogram"].items()}
    assert [cell["fold"] for cell in by_line(results)["memory tree, online"][4]] == [0, 1, 2, 3]


def test_a_source_joins_by_name(pairs_file, text_source):
    options = EvaluateOptions(pairs_file, folds=2, rows=(8,), sources="memory tree, text")
    results = evaluate(options)
    lines = by_line(results)
    assert set(lines) == {
        "memory tree",
        "memory tree, online",
        "text",
        "text, draft hidden",
        "combined, online",
        "combined, online, draft hidden",
        "combined without memory tree, online",
        "combined without text, online",
    }
    for fold in range(2):
        per = {name: line[8][fold]["tokens_per_verify"] for name, line in lines.items()}
        assert per["text, draft hidden"] == 1.0 < per["text"]
        assert per["combined without text, online"] == per["memory tree, online"]
        assert per["combined without memory tree, online"] == per["text"]
    found = {table.title: table for table in tables(results)}
    marginal = found["Marginal gain of each source"]
    assert [line[0] for line in marginal.lines] == ["memory tree", "text", "the draft's text"]
    whole, without = (
        [cell["tokens_per_verify"] for cell in lines[name][8]]
        for name in ("combined, online", "combined without text, online")
    )
    mean = sum(a - b for a, b in zip(whole, without, strict=True)) / 2
    assert marginal.lines[1][1].startswith(f"{mean:.3f}")
    assert "| memory tree, online |" in evaluate_markdown(results)


def test_a_hidden_draft_never_reaches_a_drafter(pairs_file, monkeypatch):
    seen: dict[bool, set] = {True: set(), False: set()}

    class Spy(PositionDrafter):
        def __init__(self, hidden):
            super().__init__("spy")
            self.hidden = hidden

        def begin(self, request):
            seen[self.hidden].add(tuple(request.draft_inputs["recorded_draft"]))
            super().begin(request)

    spy = Source(lambda training, variant: Spy(variant.hide_draft), reads_draft=True)
    monkeypatch.setitem(SOURCES, "spy", spy)
    evaluate(EvaluateOptions(pairs_file, folds=2, rows=(4,), sources="spy"))
    assert seen[True] == {()} and len(seen[False]) > 1


def test_next_tokens_are_ranked_and_see_no_future():
    contexts = []

    class Fixed:
        def propose(self, context, rows):
            contexts.append(list(context))
            tree = DraftTree.root(context[-1])
            weak = tree.add(0, 8, 0.2)
            tree.add(weak, 9, 0.1)
            tree.add(0, 5, 0.7)
            return tree

    assert next_tokens(Fixed(), [3, 5, 8], 4) == [[5, 8], [5, 8]]
    assert contexts == [[3], [3, 5]]


def test_next_token_figures(pairs_file):
    results = evaluate(EvaluateOptions(pairs_file, folds=2, rows=(4,), sources="raw draft"))
    pairs = read_pairs(pairs_file)
    for fold, cell in enumerate(by_line(results, "next")["raw draft"][6]):
        test = pairs[20 * fold : 20 * fold + 20]
        flat = [
            (i, p.draft[i : i + 1] == p.target[i : i + 1])
            for p in test
            for i in range(1, len(p.target))
        ]
        assert cell["top_1"] == cell["top_5"] == sum(hit for _, hit in flat) / len(flat)
        late = [hit for i, hit in flat if i >= 10]
        assert cell["top_1_after_10"] == sum(late) / len(late)
        assert cell["first_token"] == sum(hit for i, hit in flat if i == 1) / 20


def test_what_was_at_stake_at_each_depth():
    answer = [1, 2, 3, 4]
    tree = DraftTree([1, 2, 9, 3], [-1, 0, 0, 1], [1.0] * 4)
    tally = Tally()
    tally.count([ReplayRound(1, tree, 2, 3)], answer)
    assert tally.figures()["by_depth"] == [1.0, 1.0]
    tally.count([ReplayRound(1, DraftTree.chain(1, [2, 8, 8]), 1, 2)], answer)
    assert tally.figures()["by_depth"] == [1.0, 0.5], "depth 3 was never reached"
    tally.count([ReplayRound(3, DraftTree.chain(3, [4, 5]), 1, 1)], answer)
    assert tally.figures()["by_depth"] == [1.0, 0.5], "nothing is at stake behind the end"


def test_folds_by_drive(pairs_file):
    assert [len(fold) for fold in drive_folds(read_pairs(pairs_file))] == [10] * 4
    options = EvaluateOptions(pairs_file, by_drive=True, rows=(4,), sources="constant string")
    results = evaluate(options)
    assert results["material"]["training_answers"] == [30] * 4
    assert "by drive" in evaluate_markdown(results)
    rows = [json.loads(line) for line in pairs_file.read_text().splitlines()]
    rows[3]["drive"], rows[5]["event_data"] = "elsewhere", "no_folder.npy"
    pairs_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_pairs(pairs_file)[3].drive == "elsewhere"
    with pytest.raises(ValueError, match="row 5 names none"):
        evaluate(options)


def test_training_sizes_and_wide_trees(pairs_file):
    options = EvaluateOptions(
        pairs_file, folds=2, rows=(16, 100), sizes="0,20", sources="memory tree,SuffixDecoding"
        if not suffix_decoding_missing() else "memory tree",
    )  # fmt: skip
    results = evaluate(options)
    sizes = by_line(results, "size")["memory tree"]
    few, all_of_them = (sizes[n][0]["tokens_per_verify"] for n in (0, 20))
    line = by_line(results)["memory tree"]
    assert few < all_of_them == pytest.approx(line[16][0]["tokens_per_verify"])
    assert line[100][0]["tokens_per_verify"] >= line[16][0]["tokens_per_verify"]
    wide = WideMemoryDrafter(NgramMemory(backend="python"), online=True)
    for pair in read_pairs(pairs_file):
        wide.end(pair.target)
    wide.begin(Request())
    assert len(wide.propose([7], 300)) > 64


def test_the_prefix_table_knows_whole_beginnings_by_question():
    table = PrefixTable()
    for answer in ([1, 2, 3], [1, 2, 4], [1, 2, 4], [1, 9, 9]):
        table.learn((5,), answer)
    drafter = PrefixTableDrafter(table, online=True)
    drafter.begin(Request([5]))
    tree = drafter.propose([1], 5)
    assert (tree.tokens, tree.parent_idx) == ([1, 2, 4, 9, 3], [-1, 0, 1, 0, 1])
    assert tree.scores == [1.0, 0.75, 0.5, 0.25, 0.25]
    assert drafter.propose([1, 9], 8).tokens == [9, 9]
    assert drafter.propose([2], 8).tokens == [2], "no answer begins so"
    drafter.end([])
    drafter.begin(Request([6]))
    assert drafter.propose([1], 8).tokens == [1], "another question"
    drafter.end([1, 7])
    drafter.begin(Request([6]))
    assert drafter.propose([1], 8).tokens == [1, 7]


def test_suffix_decoding(pairs_file):
    if suffix_decoding_missing():
        with pytest.raises(RuntimeError, match=r"SuffixDecoding.*arctic-inference is not"):
            EvaluateOptions(pairs_file, sources="SuffixDecoding")
        pytest.skip(suffix_decoding_missing())
    targets = [pair.target for pair in read_pairs(pairs_file)]
    drafter = SuffixDecodingDrafter(online=True)
    drafter.learn(targets[:30])
    rounds = [r for t in targets[30:] for r in replay(drafter, t, 16)]
    assert all(len(r.tree) <= 16 for r in rounds)
    assert sum(r.emitted for r in rounds) / len(rounds) > 2


def test_interruption_keeps_finished_cells_and_resumes(pairs_file, tmp_path):
    folder = tmp_path / "out"
    values = {"folds": 2, "rows": (4, 8), "sources": "memory tree,constant string"}
    options = EvaluateOptions(pairs_file, folder=folder, **values)
    calls = []

    def stop(done: int, steps: int, label: str) -> None:
        calls.append((done, steps))
        if done == 3 * 20 + 7:
            raise KeyboardInterrupt

    first = evaluate(options, stop)
    assert not first["complete"] and len(first["cells"]) == 3
    assert json.loads((folder / "results.json").read_text()) == first
    write_evaluation(first, folder)
    assert "interrupted" in (folder / "RESULTS.md").read_text()
    again = EvaluateOptions(pairs_file, folder=folder, resume=True, **values)
    left: list[int] = []
    whole = evaluate(again, lambda done, steps, label: left.append(steps))
    assert whole["complete"] and whole["cells"][:3] == first["cells"]
    assert left == [calls[0][1] - 3 * 20] * len(left)
    fresh = evaluate(EvaluateOptions(pairs_file, **values))
    for a, b in zip(whole["cells"], fresh["cells"], strict=True):
        assert {**a, "propose_us": 0} == {**b, "propose_us": 0}
    other = EvaluateOptions(pairs_file, folder=folder, resume=True, gamma=3, **values)
    with pytest.raises(ValueError, match="another config"):
        Evaluation(other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": "6,x"}, "rows must be numbers like 6,16, got '6,x'"),
        ({"rows": (1,)}, "rows must be from 2 to 4096, got 1"),
        ({"rows": ()}, "rows must be one number or more"),
        ({"rows": (6, 6)}, "different numbers"),
        ({"sizes": "-1"}, "sizes must not be negative"),
        ({"sizes": "31"}, "sizes must be at most 30"),
        ({"gamma": 64}, "gamma must be from 1 to 63"),
        ({"sources": "memory"}, "unknown source 'memory'; there are raw draft"),
        ({"folds": 1}, "folds must be from 2"),
        ({"resume": True}, "resume needs the folder"),
        ({"by_drive": True, "train": "x"}, "does not go with train"),
        ({"pairs": None, "limit": 4}, "go with a file of pairs"),
        ({"pairs": None, "rows": (65,)}, "rows must be from 2 to 64"),
    ],
)
def test_bad_options(pairs_file, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate(EvaluateOptions(**{"pairs": pairs_file, "folds": 4, **options}))


def test_sources_that_cannot_run_say_why(pairs_file):
    with pytest.raises(RuntimeError, match="'draft model': it runs the embedded pair's models"):
        EvaluateOptions(pairs_file, sources="draft model")
    with pytest.raises(RuntimeError, match="'raw draft': it reads recorded drafts"):
        EvaluateOptions(sources="raw draft")
    results = evaluate(EvaluateOptions(pairs_file, rows=(4,), sources="constant string", limit=9))
    assert "draft model" in results["missing"]


def test_every_line_of_a_plan_is_measured_on_every_fold(pairs_file, text_source):
    cells = evaluate_plan.plan(EvaluateOptions(pairs_file), 3)
    keys = [cell.key() for cell in cells]
    assert len(set(keys)) == len(keys)
    for name, source in SOURCES.items():
        if source.learns or source.missing():
            continue
        made = {cell.subject.variant.online for cell in cells if cell.subject.label == name}
        assert made <= {False}
    for i in range(0, len(cells), 3):
        assert [cell.fold for cell in cells[i : i + 3]] == [0, 1, 2]


def test_shared_things_are_made_once_a_fold():
    training, calls = Training(0, []), []
    assert training.shared("net", lambda: calls.append(1) or "made") == "made"
    assert training.shared("net", lambda: calls.append(1) or "again") == "made" and calls == [1]
    static = replay_arms.SOURCES["memory tree"].make
    one, two = (static(training, Variant(6, 5)) for _ in range(2))
    assert one.memory is two.memory
    assert static(training, Variant(6, 5, online=True)).memory is not one.memory


XSPEC = [sys.executable, "-c", "from xspec_runtime.cli import main; main()", "evaluate"]


def test_a_network_is_kept_only_for_the_answers_it_was_trained_on(pairs_file, tmp_path):
    def folders(**options) -> list[Path]:
        material = RecordedPairs(EvaluateOptions(pairs_file, folder=tmp_path, **options))
        return [material.training(fold).folder for fold in range(material.folds())]

    found = [folders(folds=2), folders(folds=4), folders(folds=4, limit=38)]
    assert len({path for some in found for path in some}) == 2 + 4 + 4
    assert folders(folds=4, rows=(9,)) == found[1]
    assert folders(by_drive=True) == found[1], "the same pairs, cut another way"


def test_command(pairs_file, tmp_path, capsys):
    out = tmp_path / "out"
    options = ["--rows", "4,8", "--folds", "2", "--sources", "constant string,memory tree"]
    options += ["--sizes", "0,9", "--output-dir", str(out)]
    app(["evaluate", str(pairs_file), *options], standalone_mode=False)
    assert "memory tree, online" in capsys.readouterr().out
    text = (out / "RESULTS.md").read_text()
    assert "## By training answers" in text and "## First verify and cost" in text
    assert json.loads((out / "results.json").read_text())["complete"]


def test_bad_input_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        app(["evaluate", str(tmp_path / "none.jsonl"), "--output-dir", str(tmp_path)])
    assert stop.value.code == 2
    assert "recorded pairs not found" in capsys.readouterr().err


def test_ctrl_c_writes_what_is_done(pairs_file, tmp_path):
    out = tmp_path / "out"
    options = [
        "--rows",
        "8,100,200,300,400,500,600",
        "--sources",
        "memory tree",
        "--output-dir",
        out,
    ]
    run = subprocess.Popen([*XSPEC, pairs_file, *options], stdout=subprocess.PIPE,
                           stderr=subprocess.PIPE, text=True)  # fmt: skip
    while not (out / "results.json").exists():
        assert run.poll() is None, run.communicate()
        time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 130 and "--resume goes on" in err and "Traceback" not in err
    assert json.loads((out / "results.json").read_text())["complete"] is False
    assert (out / "RESULTS.md").exists()
