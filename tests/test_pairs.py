from __future__ import annotations

import json

import pytest

from xspec_runtime.data.pairs import contiguous_folds, iter_pairs, read_pairs

ROW = {"sample_idx": 4, "query": "what?", "egpt_tokens": [1, 2], "vl_tokens": [3, 31_999]}


def lines(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize(
    "text",
    [
        lines(ROW, ROW),
        "\n" + lines(ROW) + "\n\n" + lines(ROW).rstrip(),
        json.dumps({"timestamp": "t", "results": [ROW, ROW]}),
        json.dumps({"timestamp": "t", "results": [ROW, ROW]}, indent=2),
    ],
    ids=["lines", "blank lines", "published", "published, indented"],
)
def test_both_forms(tmp_path, text):
    path = tmp_path / "pairs"
    path.write_text(text)
    pairs = read_pairs(path)
    assert [pair.row for pair in pairs] == [0, 1]
    for pair in pairs:
        assert (pair.sample, pair.question) == (4, "what?")
        assert (pair.draft, pair.target) == ((1, 2), (3, 31_999))
    assert read_pairs(path, limit=1) == pairs[:1]


BROKEN = {
    "cut": (lines(ROW)[:-9], "line 2: not JSON"),
    "list": ("[1]\n", "line 2: expected an object, got list"),
    "no target": (lines({"egpt_tokens": [1]}), "vl_tokens must be a list of token ids, got noth"),
    "text": (lines(ROW | {"vl_tokens": "abc"}), "vl_tokens must be a list of token ids, got str"),
    "empty": (lines(ROW | {"vl_tokens": []}), "line 2: vl_tokens is empty"),
    "empty draft": (lines(ROW | {"egpt_tokens": []}), "line 2: egpt_tokens is empty"),
    "too large": (lines(ROW | {"vl_tokens": [1, 32_000]}), r"vl_tokens\[1\] must be an id below"),
    "negative": (lines(ROW | {"egpt_tokens": [-1]}), r"egpt_tokens\[0\] .* got -1"),
    "float": (lines(ROW | {"vl_tokens": [1.0]}), r"got 1\.0"),
    "boolean": (lines(ROW | {"vl_tokens": [True]}), "got True"),
    "sample": (lines(ROW | {"sample_idx": "x"}), "sample_idx must be an integer, got 'x'"),
    "query": (lines(ROW | {"query": 3}), "query must be a string"),
    "deep": ("[" * 100_000 + "\n", "line 2: not JSON"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_errors_name_file_line_and_reason(tmp_path, kind):
    text, message = BROKEN[kind]
    path = tmp_path / "pairs.jsonl"
    path.write_text(lines(ROW) + text)
    with pytest.raises(ValueError, match=f"pairs.jsonl, line 2: .*{message.split(': ', 1)[-1]}"):
        read_pairs(path)
    rows = iter_pairs(path)
    assert next(rows).sample == 4, "the rows before the broken one are read"


def test_errors_of_whole_files(tmp_path):
    path = tmp_path / "pairs.json"
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="holds no pairs"):
        read_pairs(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="line 1: not JSON"):
        read_pairs(path)
    path.write_text(json.dumps({"results": [ROW, {}]}))
    with pytest.raises(ValueError, match=r"results\[1\]: egpt_tokens must be"):
        read_pairs(path)
    path.write_text(json.dumps({"results": 3}))
    with pytest.raises(ValueError, match="results must be a list, got int"):
        read_pairs(path)
    with pytest.raises(FileNotFoundError, match="absent"):
        read_pairs(tmp_path / "absent")
    with pytest.raises(ValueError, match="limit must be at least 1"):
        read_pairs(path, limit=0)


@pytest.mark.parametrize(("count", "folds"), [(10, 5), (11, 5), (770, 5), (7, 7), (9, 2)])
def test_folds_are_contiguous_and_cover_all(count, folds):
    parts = contiguous_folds(count, folds)
    assert [i for part in parts for i in part] == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize(("count", "folds"), [(10, 1), (3, 4)])
def test_impossible_folds(count, folds):
    with pytest.raises(ValueError, match="folds must be from 2"):
        contiguous_folds(count, folds)


def test_the_recorded_file(shared_dir):
    pairs = read_pairs(shared_dir / "data" / "dsec_1s_token_pairs.jsonl")
    assert len(pairs) == 770
    assert {len(pair.target) for pair in pairs} == {50}
