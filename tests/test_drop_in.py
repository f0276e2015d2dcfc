"""The comparison of the drop-in with `generate`: its figures, its table, one run of it."""

from __future__ import annotations

import json

import pytest

from xspec_runtime.drop_in.arms import AGAIN, COLD, LOOKUP, NOTHING, PLAIN, WRONG, Arms
from xspec_runtime.drop_in.material import EMBEDDED, material, read_prompts
from xspec_runtime.drop_in.report import drop_in_markdown, drop_in_table
from xspec_runtime.drop_in.run import SCHEMA, DropInOptions, run_drop_in, summarize


def sample(arm: str, prompt: str, group: str, total_ms: float, forwards: int) -> dict:
    return {
        "arm": arm, "prompt": prompt, "group": group, "repeat": 0, "tokens": 12,
        "forwards": forwards, "total_ms": total_ms, "identical": True,
    }  # fmt: skip


SAMPLES = [
    sample(PLAIN, "a", "edit", 100.0, 12), sample(PLAIN, "b", "quote", 300.0, 12),
    sample(PLAIN, "c", "open", 200.0, 12), sample(COLD, "a", "edit", 50.0, 4),
    sample(COLD, "b", "quote", 100.0, 2), sample(COLD, "c", "open", 220.0, 12),
    sample(LOOKUP, "a", "edit", 80.0, 6), sample(LOOKUP, "b", "quote", 160.0, 4),
    sample(LOOKUP, "c", "open", 240.0, 12),
]  # fmt: skip


def test_figures_of_groups() -> None:
    plain, lookup, cold = summarize([PLAIN, LOOKUP, COLD], SAMPLES)
    assert [*cold["groups"]] == ["all", "edit", "quote", "open", "edit + quote"]
    grounded = cold["groups"]["edit + quote"]
    assert grounded["tokens_per_forward"] == 24 / 6 and grounded["speedup"] == 400 / 150
    assert grounded["ratio"] == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert cold["groups"]["all"]["identical"] == cold["groups"]["all"]["answers"] == 3
    assert plain["groups"]["all"]["ratio"] == 1.0
    assert lookup["groups"]["open"]["speedup"] == 200 / 240


def test_the_table_compares_with_the_lookup() -> None:
    results = {
        "schema": SCHEMA, "arms": summarize([PLAIN, LOOKUP, COLD], SAMPLES), "first_call_ms": 1e3,
        "config": {"max_new_tokens": 64, "rows": 16},
        "lookup": {"prompt_lookup_num_tokens": 8, "max_matching_ngram_size": 2},
    }  # fmt: skip
    text = drop_in_markdown(results)
    (row,) = [line for line in text.splitlines() if "edit + quote" in line and "4.00" in line]
    assert "| 2.67x | 1.60x |" in row
    assert "8 tokens after at most 2" in text
    assert drop_in_table(results).row_count == 15
    with pytest.raises(ValueError, match="expected results of schema"):
        drop_in_markdown(results | {"schema": "other"})


def test_a_run_on_the_embedded_target() -> None:
    arms = f"{AGAIN},{NOTHING},{WRONG},{COLD}"
    results = run_drop_in(DropInOptions(EMBEDDED, samples=1, arms=arms, max_new_tokens=12))
    assert results["complete"] and results["schema"] == SCHEMA
    found = {arm["name"]: arm["groups"]["all"] for arm in results["arms"]}
    assert [*found] == [PLAIN, AGAIN, COLD, NOTHING, WRONG]
    for name, figures in found.items():
        assert figures["identical"] == figures["answers"] == 1, name
        assert figures["tokens_per_forward"] == 1.0 or name == COLD
    json.dumps(results)


def test_the_lookup_copies_no_placeholder() -> None:
    """The embedded target takes a copied one for a video token and refuses the pass."""
    model, pad, (prompt,) = material(EMBEDDED, None, 1, 8)
    arms = Arms(model, pad, 8, 16, {"prompt_lookup_num_tokens": 4, "max_matching_ngram_size": 2})
    assert arms.run(LOOKUP, prompt).tokens == arms.run(PLAIN, prompt).tokens


def test_what_is_wrong_is_said_before_anything_runs(tmp_path) -> None:
    for options, words in (
        (DropInOptions(EMBEDDED, arms="magic"), "unknown arms"),
        (DropInOptions(EMBEDDED, rows=65), "rows must be in 2..64, got 65"),
    ):
        with pytest.raises(ValueError, match=words):
            run_drop_in(options)
    with pytest.raises(ValueError, match="--prompts goes with a model in a folder"):
        material(EMBEDDED, tmp_path / "prompts.json", 1, 8)
    with pytest.raises(FileNotFoundError, match="holds no model"):
        material(str(tmp_path), None, 1, 8)
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps([{"question": "why"}]))
    with pytest.raises(ValueError, match="a group and a question"):
        read_prompts(prompts)
