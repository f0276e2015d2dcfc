"""Closed forms against simulation and measured results; modelled figures, and that they say so."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from running import bench_script, invoke
from xspec_runtime.cost.model import (
    Costs,
    acceptance_of,
    costs_of,
    points_of,
    project,
)
from xspec_runtime.cost.modelled import (
    CARDS,
    WEIGHTS,
    Assumed,
    floor_bytes,
    modelled_rows,
    pass_ms,
    verify_launches,
)
from xspec_runtime.cost.report import cost_results, fill_page, points_markdown, write_cost
from xspec_runtime.cost.spot import modelled_for, numbers
from xspec_runtime.files import read_json
from xspec_runtime.metrics import expected_tokens
from xspec_runtime.targets.llama_weights import LlamaShape
from xspec_runtime.verify_cost.stage import find_config

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
# An answer of a 7B pair: window, prefill, step, a verify as dear as five steps.
SEED_PAIR = Costs(30, 140, 317, 14, {6: 14.7, 22: 70}, 97, 10)


def simulate(acceptance: float, gamma: int, rounds: int, rng: random.Random) -> float:
    """Tokens a round, drawn one by one."""
    emitted = 0
    for _ in range(rounds):
        accepted = 0
        while accepted < gamma and rng.random() < acceptance:
            accepted += 1
        emitted += accepted + 1
    return emitted / rounds


def test_expected_tokens_are_those_of_a_simulation(rng: random.Random) -> None:
    for _ in range(10):
        acceptance, gamma = rng.random(), rng.randrange(0, 12)
        expected = simulate(acceptance, gamma, 20_000, rng)
        assert expected_tokens(acceptance, gamma) == pytest.approx(expected, rel=0.03)
        if 0.05 < acceptance < 0.95 and gamma:
            again = acceptance_of(expected_tokens(acceptance, gamma), gamma)
            assert again == pytest.approx(acceptance, abs=1e-6)
    assert expected_tokens(1, 7) == 8 and expected_tokens(0, 7) == 1
    with pytest.raises(ValueError, match="alpha must be from 0 to 1"):
        expected_tokens(1.1, 3)


def test_the_measurement_it_grew_out_of() -> None:
    """A verify of 22 rows at five steps' price cannot pay; its break-even says so."""
    c = SEED_PAIR
    assert c.plain == 140 + 317 + 29 * 14
    assert c.ceiling == pytest.approx(863 / 457)
    assert c.plain / c.rounds(expected_tokens(0.5, 21), 22, 0) < 1
    assert c.v(22) > c.break_even(0.5, 21)
    # Drafts in the window: one verify of them saves what it accepts.
    saved = expected_tokens(0.8, 5) - 1
    assert c.fused(0.8, 5) == pytest.approx(140 + 317 + 0.7 + (29 - saved) * 14)
    assert c.separate(0.8, 5) == pytest.approx(140 + 317 + 0.8 * c.v(5) + (29 - saved) * 14)
    # Eight drafts are not ready when the window closes.
    assert c.fused(0.8, 8) - c.v(9) == pytest.approx(
        97 + 70 + 317 - 14 + (30 - expected_tokens(0.8, 8)) * 14
    )


def test_v_between_measured_heights() -> None:
    c = SEED_PAIR
    assert (c.v(1), c.v(6), c.v(22)) == (14, 14.7, 70)
    assert c.v(14) == pytest.approx((14.7 + 70) / 2)
    with pytest.raises(ValueError, match=r"v\(23\) was not measured; there are \[6, 22\]"):
        c.v(23)
    with pytest.raises(ValueError, match="at least 2 tokens"):
        Costs(1, 0, 1, 1, {})
    with pytest.raises(ValueError, match="positive times"):
        Costs(5, 0, 1, 0, {})


def test_projections_grow_with_acceptance_and_stay_below_the_ceiling() -> None:
    rows = project(SEED_PAIR, (2, 5))
    assert [r["acceptance"] for r in rows[:10]] == [k / 10 for k in range(1, 11)]
    for key in ("free_drafts", "own_draft", "separate", "fused"):
        for gamma in (2, 5):
            line = [r[key] for r in rows if r["gamma"] == gamma]
            assert line == sorted(line) and line[-1] < SEED_PAIR.ceiling
    for r in rows:
        paying = r["verify_ms"] < r["break_even_ms"]
        assert (r["free_drafts"] > 1) == paying and r["own_draft"] < r["free_drafts"]


# Measured results.


@pytest.fixture(scope="module")
def e2e() -> dict:
    return read_json(RESULTS / "e2e_cpu.json")


def test_the_closed_form_meets_what_was_measured(e2e) -> None:
    points = points_of(e2e)
    assert {p.arm for p in points} >= {"draft", "ngram", "ngram_tree", "tree"}
    for point in points:
        assert point.projected_speedup == pytest.approx(point.measured_speedup, rel=0.05)
        assert (point.acceptance is None) == point.arm.endswith("tree")
    costs = costs_of(e2e)
    assert costs.window == 0 and costs.v(6) > costs.step > 0


def test_v_from_a_verify_run(e2e) -> None:
    verify = read_json(RESULTS / "verify_smollm2_cpu.json")
    costs = costs_of(e2e, verify, "transformers")
    ratio = next(
        row["ratio"]
        for row in verify["verify"]
        if (row["backend"], row["shape"], row["rows"]) == ("transformers", "chain", 16)
    )
    assert costs.v(16) == pytest.approx(costs.step * ratio)
    with pytest.raises(ValueError, match="no chains of backend 'none' were measured"):
        costs_of(e2e, verify, "none")


def test_a_run_from_a_file_has_a_window(e2e) -> None:
    found = json.loads(json.dumps(e2e))
    for sample in found["samples"]:
        sample["prepare_ms"] = 50.0
        sample["total_ms"] += 50.0
    for arm in found["arms"]:
        arm["stages"] = {"mode": "window"} if arm["name"] == "tree" else None
    assert costs_of(found).window == 50
    assert costs_of(found).step == pytest.approx(costs_of(e2e).step)
    # An arm that overlaps is not what the closed form describes.
    assert "tree" not in {p.arm for p in points_of(found)}


def test_results_without_plain_decoding(e2e) -> None:
    with pytest.raises(ValueError, match="no arm 'target'"):
        costs_of({**e2e, "samples": []})


def test_files_of_a_projection(e2e, tmp_path: Path) -> None:
    results = cost_results("command", e2e)
    written = write_cost(results, tmp_path / "out", tmp_path / "copy.json")
    assert {p.name for p in written} == {"results.json", "copy.json", "cost.png"}
    assert read_json(tmp_path / "copy.json")["ceiling"] == results["ceiling"]
    assert "measured speedup | projected speedup" in points_markdown(results)


# Modelled cards.


@pytest.fixture(scope="module")
def llama() -> LlamaShape:
    return LlamaShape.of(find_config("llama-7b"))


def test_bytes_are_those_of_the_weights(llama) -> None:
    weights = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    head, cached = 32064 * 4096 * 2, 2 * 32 * 4096 * 2
    for kind, per_weight in WEIGHTS.items():
        for rows in (1, 22):
            found = floor_bytes(verify_launches(llama, kind, 2076, rows, CARDS["h200"]))
            expected = weights * per_weight + head + cached * (2076 + rows)
            assert found == pytest.approx(expected, rel=1e-9)
    assert WEIGHTS["nf4"] == pytest.approx(0.5159, abs=1e-4)


def test_seven_launches_a_layer(llama) -> None:
    launches = verify_launches(llama, "bf16", 2076, 1, CARDS["h200"])
    per_layer = sum(launch.times for launch in launches if launch.times >= llama.layers)
    assert per_layer == 7 * llama.layers


@pytest.mark.parametrize("card", CARDS)
def test_a_modelled_pass_is_never_below_its_floor(card: str, llama) -> None:
    for row in modelled_rows(llama, card, rows=(1, 8, 22, 64)):
        assert row["modelled_floor_ratio"] > 1
        assert row["modelled_least_ms"] < row["modelled_ms"] < row["modelled_most_ms"]
        assert row["modelled_ratio"] >= 1
        assert (row["modelled_ratio"] == 1) == (row["rows"] == 1)


def test_more_of_anything_takes_longer(llama) -> None:
    card, assumed = CARDS["h200"], Assumed()

    def ms(prompt: int = 2076, rows: int = 8, us: float = 2.0, kind: str = "bf16") -> float:
        launches = verify_launches(llama, kind, prompt, rows, card)
        return pass_ms(launches, card, assumed, us)[0]

    assert ms() < min(ms(prompt=4124), ms(rows=64), ms(us=3.0))
    assert ms(us=3.0) - ms() == pytest.approx(0.001 * (7 * 32 + 9), rel=1e-6)
    assert ms(kind="nf4") < ms()


def test_what_modelling_refuses(llama) -> None:
    with pytest.raises(ValueError, match=r"card must be one of h200.*got 'h300'"):
        next(modelled_rows(llama, "h300"))
    with pytest.raises(ValueError, match="weights must be one of bf16, nf4, got 'int3'"):
        verify_launches(llama, "int3", 10, 1, CARDS["h200"])
    with pytest.raises(ValueError, match=r"rows must be in 1\.\.64, got 65"):
        verify_launches(llama, "bf16", 10, 65, CARDS["h200"])
    for text in ("1,x", "", "1,1", "0", "70"):
        with pytest.raises(ValueError, match=r"--rows must be different numbers in 1\.\.64"):
            numbers("--rows", text, 64)


PRICED = RESULTS / "regret_cpu.json"


def run(*arguments: object):
    return invoke(bench_script("cost_model").app, *arguments)


def test_everything_modelled_says_so(tmp_path: Path) -> None:
    done = run("--card", "h200,4090", "--output-dir", tmp_path, "--json", tmp_path / "m.json")
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("Modelled, not measured.")
    results = read_json(tmp_path / "m.json")
    assert results["kind"] == "modelled" and len(results["modelled"]) == 24
    plain = {"card", "weights", "prompt_tokens", "rows"}
    for row in results["modelled"]:
        for key in set(row) - plain:
            assert key.startswith(("modelled_", "counted_")), key
        assert not any("measured" in key for key in row)
    titles = next(line for line in done.stdout.splitlines() if line.startswith("| card"))
    columns = [cell.strip() for cell in titles.strip("|").split("|")][2:]
    assert all("modelled" in c or "counted" in c for c in columns), columns
    assert (tmp_path / "modelled.png").is_file()


def test_a_projection_from_files(tmp_path: Path) -> None:
    done = run("--e2e", RESULTS / "e2e_cpu.json", "--output-dir", tmp_path)
    assert done.exit_code == 0, done.output
    assert "measured speedup" in done.stdout and "modelled" not in done.stdout.lower()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--card", "h300"], "card must be one of"),
        (["--card", "h200", "--rows", "99"], "--rows must be different numbers in 1..64"),
        (["--e2e", "/nowhere.json"], "end-to-end results not found: /nowhere.json"),
        (["--e2e", PRICED], "is no result of bench/e2e.py: schema: expected 'xspec.e2e/1'"),
        (["--verify", PRICED], "is no result of bench/verify.py: expected schema xspec.verify/1"),
        (["--page", "x.md"], "--page goes with --card"),
        (["--e2e", RESULTS / "e2e_cpu.json", "--gamma", "20"], r"v(21) was not measured"),
    ],
)
def test_bad_arguments(arguments: list, message: str, tmp_path: Path) -> None:
    done = run(*arguments, "--output-dir", tmp_path / "out")
    assert done.exit_code == 2 and message in done.stderr
    assert not (tmp_path / "out").exists()


# The page.


def test_the_page_holds_what_the_model_gives(tmp_path: Path) -> None:
    """Its modelled tables; the measured ones are those of the results beside them."""
    page = (ROOT / "docs" / "performance.md").read_text()
    command = "python bench/cost_model.py --card h200,4090 --page docs/performance.md"
    assert command in page
    results = modelled_for("", "llama-7b", "h200,4090", "2076,4124", "1,22,64")
    copy = tmp_path / "page.md"
    parts = page.split("<!-- table: ")
    own = [
        f"<!-- table: {p}" for p in parts[1:] if p.startswith(("modelled", "constants", "counts"))
    ]
    assert len(own) == 3
    copy.write_text("\n".join(own))
    fill_page(copy, RESULTS, results, check=True)
    copy.write_text(copy.read_text().replace("H200, bf16", "H200, int3"))
    with pytest.raises(ValueError, match="is not what its results give"):
        fill_page(copy, RESULTS, results, check=True)
    copy.write_text("no table\n")
    with pytest.raises(ValueError, match="has no tables"):
        fill_page(copy, RESULTS, results)
    copy.write_text("<!-- table: wrong -->\n<!-- end -->\n")
    with pytest.raises(ValueError, match="there is no table 'wrong'"):
        fill_page(copy, RESULTS, results)
