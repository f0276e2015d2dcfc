"""Result files of an end-to-end run: validation, tables, RESULTS.md, plots, early failures."""

from __future__ import annotations

import copy
import io
import json
import sys

import pytest
from rich.console import Console

from xspec_runtime.report import (
    check_output_dir,
    markdown_table,
    print_table,
    render_table,
    results_markdown,
    validate_results,
    write_results,
)


def arm(name: str, total: float, **changes) -> dict:
    """An arm that drafts; `changes` overrides fields."""
    speedup = 600 / total
    rounds = {"propose": 3.9, "forward": 14.2, "accept": 0.31, "commit": 0.24}
    return {
        "name": name,
        "prefill_ms": 61.2,
        "decode_ms": total - 61.2,
        "total_ms": total,
        "ttft_ms": 62.8,
        "acceptance_rate": 0.713,
        "tokens_per_verify": 4.27,
        "gain": 3.38,
        "speedup_total": speedup,
        "speedup_decode": speedup * 1.1,
        "identical": 24,
        "samples": 24,
        "slower": 1,
        "tokens": 61.2,
        "accept_histogram": {"0": 31, "1": 20, "2": 14, "3": 22, "4": 30, "5": 140},
        "by_accepted": [
            {
                "accepted": 3,
                "samples": 9,
                "share": 0.375,
                "median_speedup": 1.41,
                "slower": 1,
                "verdict": "faster",
            }
        ],
        "round_split_ms": rounds,
        "ledger": {
            "tokens_saved": 46.2,
            "step_ms": 10.5,
            "saved_ms": 485.1,
            "verify_overhead_ms": 52.3,
            "drafting_ms": 60.4,
            "net_ms": 372.4,
        },
        "timeline": spans(rounds, round(total / 40)),
    } | changes


def spans(rounds: dict[str, float], count: int) -> list[dict]:
    out, clock = [{"name": "prefill", "start_ms": 0.0, "end_ms": 61.2}], 61.2
    for _ in range(count):
        for name, length in rounds.items():
            out.append({"name": name, "start_ms": clock, "end_ms": clock + length})
            clock += length
    return out


UNKNOWN = dict.fromkeys(
    (
        *("prefill_ms", "decode_ms", "acceptance_rate", "tokens_per_verify", "gain"),
        *("speedup_decode", "accept_histogram", "by_accepted", "round_split_ms", "ledger"),
    )
)


def synthetic() -> dict:
    """Eight arms: plain, three of another library with unknown fields, four that draft."""
    plain = UNKNOWN | {"prefill_ms": 61.0, "decode_ms": 539.0, "speedup_decode": 1.0, "slower": 0}
    others = {"hf_generate": 596.0, "hf_prompt_lookup": 455.0, "hf_assisted": 640.0}
    ours = {"draft": 351.0, "ngram": 274.0, "ngram_cold": 431.0, "tree": 231.0}
    return {
        "schema": "xspec.e2e/1",
        "environment": {
            "machine": "x86_64",
            "cpu": "Some CPU",
            "gpu": None,
            "torch": "2.13.0",
            "transformers": "5.23.0",
            "triton": None,
            "python": "3.11.9",
            "commit": "0123abc",
            "threads": 2,
        },
        "command": "python bench/e2e.py --gamma 5",
        "config": {"gamma": 5, "rows": 16, "samples": 24, "seed": 0},
        "near_ties": {"steps": 11754, "below_2_ulp": 3},
        "verbatim_in_training": {"captions": 4, "share": 0.1667},
        "arms": [
            arm("target", 600.0, **plain),
            *(arm(name, total, **UNKNOWN, timeline=None) for name, total in others.items()),
            *(arm(name, total) for name, total in ours.items()),
        ],
        "samples": [{"arm": "target", "total_ms": 600.0}],
    }


def test_writes_all_files(tmp_path):
    results = synthetic()
    paths = write_results(results, tmp_path / "new" / "folder")
    assert [path.name for path in paths] == [
        *("results.json", "RESULTS.md", "speedups.png", "histogram.png", "timeline.png"),
    ]
    assert sorted(path.name for path in paths[0].parent.iterdir()) == sorted(p.name for p in paths)
    assert json.loads(paths[0].read_text()) == results
    for plot in paths[2:]:
        assert plot.read_bytes().startswith(b"\x89PNG")
        assert f"({plot.name})" in paths[1].read_text()


def test_second_run_replaces_the_first(tmp_path):
    write_results(synthetic(), tmp_path)
    results = synthetic()
    results["command"] = "another command"
    write_results(results, tmp_path)
    assert json.loads((tmp_path / "results.json").read_text())["command"] == "another command"
    assert "another command" in (tmp_path / "RESULTS.md").read_text()


def test_markdown_table_has_a_row_an_arm():
    lines = markdown_table(synthetic()).splitlines()
    assert len(lines) == 2 + 8
    assert len({line.count("|") for line in lines}) == 1
    assert lines[0].startswith("| arm | prefill ms | decode ms | total ms | TTFT ms |")
    assert [cell.strip() for cell in lines[-1].strip("|").split("|")] == [
        *("tree", "61.2", "169.8", "231.0", "62.8", "71.3 %", "4.27", "3.38", "2.60x", "2.86x"),
        *("24/24", "1/24"),
    ]
    assert [cell.strip() for cell in lines[3].strip("|").split("|")] == [
        *("hf_generate", "-", "-", "596.0", "62.8", "-", "-", "-", "1.01x", "-", "24/24", "1/24"),
    ]


def test_markdown_explains_columns_and_lists_every_part():
    text = results_markdown(synthetic())
    titles = [cell.strip() for cell in markdown_table(synthetic()).splitlines()[0].split("|")[2:-1]]
    assert len(titles) == 11
    for title in titles:
        assert f"- **{title}**: " in text
    assert "3 of 11,754 steps had a top-2 gap below 2 ulp" in text
    assert "4 (16.7 %)" in text
    assert "| tree | 46.20 | 10.50 | 485.10 | 52.30 | 60.40 | 372.40 |" in text
    assert "| tree | 3.90 | 14.20 | 0.31 | 0.24 | 18.65 |" in text
    assert "| 3 | 9 | 37.5 % | 1.41x | 1 | faster |" in text
    assert "### tree" in text and "### hf_generate" not in text and "### target" not in text


@pytest.mark.parametrize("width", [40, 200])
def test_terminal_table_is_whole_at_any_width(width):
    console = Console(file=io.StringIO(), width=width)
    print_table(synthetic(), console)
    lines = [line.split() for line in console.file.getvalue().splitlines()]
    assert [
        *("tree", "61.2", "169.8", "231.0", "62.8", "71.3", "%", "4.27", "3.38", "2.60x", "2.86x"),
        *("24/24", "1/24"),
    ] in lines
    assert len(render_table(synthetic()).rows) == 8


def test_one_arm_of_nulls(tmp_path):
    results = synthetic()
    results |= {"near_ties": None, "verbatim_in_training": None, "samples": []}
    nothing = dict.fromkeys(results["arms"][0])
    results["arms"] = [nothing | {"name": "hf_generate"}]
    del results["arms"][0]["timeline"]
    paths = write_results(results, tmp_path)
    assert [path.name for path in paths] == ["results.json", "RESULTS.md"]
    assert "| hf_generate" + " | -" * 11 + " |" in paths[1].read_text()
    assert "Near ties" not in paths[1].read_text()


def test_without_matplotlib_the_figures_are_still_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    paths = write_results(synthetic(), tmp_path)
    assert [path.name for path in paths] == ["results.json", "RESULTS.md"]
    assert ".png" not in paths[1].read_text()


WRONG = {
    "schema": (lambda r: r.update(schema="xspec.e2e/2"), "schema: expected 'xspec.e2e/1'"),
    "no arms": (lambda r: r.update(arms=[]), "arms: expected at least one arm"),
    "top missing": (lambda r: r.pop("near_ties"), "near_ties: missing"),
    "environment": (lambda r: r["environment"].pop("torch"), "environment.torch: missing"),
    "command": (lambda r: r.update(command=None), "command: expected a string, got NoneType"),
    "arm missing": (lambda r: r["arms"][2].pop("gain"), r"arms\[2\]\.gain: missing"),
    "arm type": (lambda r: r["arms"][4].update(gain="3"), r"arms\[4\]\.gain: expected a number"),
    "bool": (lambda r: r["arms"][4].update(slower=True), r"arms\[4\]\.slower: expected a number"),
    "nan": (lambda r: r["arms"][1].update(gain=float("nan")), r"arms\[1\]\.gain: .*finite.*nan"),
    "deep inf": (
        lambda r: r["samples"][0].update(total_ms=float("inf")),
        r"samples\[0\]\.total_ms: .*finite",
    ),
    "twice": (lambda r: r["arms"].append(r["arms"][5]), "name 'ngram' occurs more than once"),
    "verdict": (
        lambda r: r["arms"][7]["by_accepted"][0].update(verdict="good"),
        r"arms\[7\]\.by_accepted\[0\]\.verdict: expected",
    ),
    "histogram": (
        lambda r: r["arms"][7]["accept_histogram"].update(many=1),
        r"arms\[7\]\.accept_histogram: keys count accepted tokens, got 'many'",
    ),
    "ledger": (
        lambda r: r["arms"][7]["ledger"].pop("net_ms"),
        r"arms\[7\]\.ledger\.net_ms: missing",
    ),
    "split": (
        lambda r: r["arms"][7].update(round_split_ms=[1]),
        r"arms\[7\]\.round_split_ms: expected a dictionary, got list",
    ),
    "timeline": (
        lambda r: r["arms"][7]["timeline"][0].update(end_ms=-1),
        r"arms\[7\]\.timeline\[0\]: end_ms -1 is before start_ms",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_field_is_named_and_nothing_is_written(name, tmp_path):
    spoil, message = WRONG[name]
    results = copy.deepcopy(synthetic())
    validate_results(results)
    spoil(results)
    with pytest.raises(ValueError, match=message) as caught:
        write_results(results, tmp_path)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_output_folder_is_checked_before_work(tmp_path):
    assert check_output_dir(tmp_path / "a" / "b").is_dir()
    assert list((tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "file").write_text("")
    for bad in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match="cannot write to the output folder"):
            check_output_dir(bad)
