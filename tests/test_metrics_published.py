"""The published figures, and what they are counted right, from the recorded runs themselves."""

from __future__ import annotations

import json
from statistics import fmean

import pytest

from xspec_runtime import metrics as m


def rows(shared_dir, name: str) -> list[dict]:
    path = shared_dir / "data" / name
    if not path.is_file():
        pytest.skip(f"no recorded data: {path} is absent")
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def adapter_runs(shared_dir):
    return rows(shared_dir, "token_adapter_10q_runs.jsonl")


@pytest.fixture(scope="module")
def timed_runs(shared_dir):
    return rows(shared_dir, "e2e_wallclock_50tok.jsonl")


def test_every_run_has_the_figures_that_were_written_with_it(adapter_runs):
    for run in adapter_runs:
        found = m.published_run(run["adapter_tokens"], run["vl_tokens"])
        for key, value in found.items():
            assert run[key] == pytest.approx(value), key


@pytest.mark.parametrize(
    ("shift", "consecutive", "rate"),
    [(0, 0.0, 0.062), (1, 2.48, 0.216)],
    ids=["published", "right"],
)
def test_token_adapter_in_a_row_and_match(adapter_runs, shift, consecutive, rate):
    """100 runs; the rate is the mean of each run's share of its shorter text."""
    assert len(adapter_runs) == 100
    found = [m.published_run(r["adapter_tokens"], r["vl_tokens"], shift) for r in adapter_runs]
    assert fmean(run["consecutive_matches"] for run in found) == pytest.approx(consecutive)
    assert fmean(run["acceptance_rate"] for run in found) == pytest.approx(rate, abs=5e-4)


def test_pooled_positions_give_other_shares(adapter_runs):
    """Denominators matter: all matches over all compared positions."""
    for shift, matches, positions in ((0, 255, 3760), (1, 792, 3738)):
        found = [m.published_run(r["adapter_tokens"], r["vl_tokens"], shift) for r in adapter_runs]
        assert sum(run["total_matches"] for run in found) == matches
        assert sum(run["total_tokens"] for run in found) == positions


def test_first_token_is_nearly_always_right_once_aligned(adapter_runs):
    pairs = [(run["adapter_tokens"], run["vl_tokens"]) for run in adapter_runs]
    assert m.first_token_accuracy(pairs) == 0.0
    hits = sum(run["adapter_tokens"][0] == run["vl_tokens"][1] for run in adapter_runs)
    assert m.first_token_accuracy(pairs, 1) == hits / 100 > 0.4


def test_verification_there_changed_answers(timed_runs):
    """431 of 500 answers with the L4 adapter are the plain ones; where no draft was accepted, 57 of
    66 are, so what differs is the verify's arithmetic."""
    same = [run["L4+VL"]["text"] == run["baseline"]["text"] for run in timed_runs]
    assert (sum(same), len(same)) == (431, 500)
    none = [s for s, run in zip(same, timed_runs, strict=True) if not run["L4+VL"]["accepted"]]
    assert (sum(none), len(none)) == (57, 66)


def test_a_verify_took_69_ms_and_a_step_15(timed_runs):
    """Least squares over 500 runs of decode time on n_tokens - 1 - accepted forward passes."""
    runs = [run["L4+VL"] for run in timed_runs]
    found = m.verify_cost(
        [run["vl_decode_ms"] for run in runs],
        [run["n_tokens"] for run in runs],
        [run["accepted"] for run in runs],
    )
    assert found.verify == pytest.approx(68.9, abs=0.1)
    assert found.step == pytest.approx(15.2, abs=0.1)


def test_speedup_of_totals_is_less_than_the_mean_of_ratios(timed_runs):
    plain = [run["baseline"]["total_ms"] for run in timed_runs]
    ours = [run["L4+VL"]["sd_total_ms"] for run in timed_runs]
    assert m.speedup_of_totals(plain, ours) == pytest.approx(1.0115, abs=1e-4)
    assert m.mean_of_ratios(plain, ours) == pytest.approx(1.0182, abs=1e-4)


def test_raw_drafts_match_in_few_positions(shared_dir):
    """770 recorded pairs; the given first token does not count, a missing position is a miss."""
    pairs = rows(shared_dir, "dsec_1s_token_pairs.jsonl")
    found = fmean(m.position_match(pair["egpt_tokens"], pair["vl_tokens"]) for pair in pairs)
    assert 0.01 < found < 0.02
    with_bos = [([1, *p["egpt_tokens"]], [1, *p["vl_tokens"]]) for p in pairs]
    kept = fmean(m.published_acceptance(d, t, None)["acceptance_rate"] for d, t in with_bos)
    left_out = fmean(m.published_acceptance(d, t)["acceptance_rate"] for d, t in with_bos)
    assert kept - left_out == pytest.approx(1 / 51, abs=1e-3), "one certain match in 51 positions"
