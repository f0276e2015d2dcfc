"""Phase `nf4` of the GPU suite, at tiny shapes on the CPU."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

from xspec_kernels import Workspace, nf4
from xspec_runtime.gpu import nf4_bench, nf4_peers
from xspec_runtime.gpu.parts import CheckFailed, Context, Options, Part, merge
from xspec_runtime.gpu.record import validate_gpu_results

SCRIPT = Path(__file__).resolve().parent.parent / "bench" / "nf4.py"
WAYS = ["nf4_linear", "dequantize + linear", "linear, 16 bits"]


def context(**known: dict) -> Context:
    return Context(Options(dry_run=True, bundle=Path("none")), 0.0, known)


def collected(part, given: Context | None = None) -> dict:
    found: dict = {}
    for data in part(given or context()):
        merge(found, data)
    return found


def test_products_of_every_shape_at_every_number_of_rows():
    lines: list[str] = []
    given = context(**{"baseline.machine": {"copy_gbps": 50.0}})
    given.log = lines.append
    found = collected(lambda c: nf4_bench.products("llama-7b", c), given)
    rows = found["products"]
    names = list(dict.fromkeys(row["backend"] for row in rows))
    assert names[:3] == WAYS and "torch int4" in names
    assert len(rows) == len(names) * 2 * 3 and {row["rows"] for row in rows} == {1, 2, 6}
    for row in rows:
        assert row["gbps"] == pytest.approx(row["bytes"] / row["us"] / 1e3)
        assert row["of_copy"] == pytest.approx(row["gbps"] / 50.0)
        stored = {"nf4_linear": 0.5 + 1 / 64, "linear, 16 bits": 2}.get(row["backend"])
        moved = 2 * row["rows"] * (row["N"] + row["K"])
        if stored:
            weights = row["bytes"] - moved
            assert stored * row["N"] * row["K"] <= weights <= stored * row["N"] * row["K"] + 2048
    assert any("bitsandbytes" in note for note in found["notes"])
    assert sum("llama-7b o, 6 rows" in line for line in lines) == 1


def test_wrong_product_of_ours_gives_no_time(monkeypatch):
    sound = nf4_peers.nf4_linear
    monkeypatch.setattr(nf4_peers, "nf4_linear", lambda *a, **k: 1.05 * sound(*a, **k))
    for part in (lambda c: nf4_bench.products("llama-7b", c), nf4_bench.crossover):
        with pytest.raises(CheckFailed, match=r"nf4_linear, \[128, 128\], \d+ rows: off by 0\.05"):
            collected(part)


def test_wrong_peer_is_left_out_and_said_to_be(monkeypatch):
    class Wrong(nf4_peers.Plain):
        def reference(self) -> torch.Tensor:
            return self.weight.float().flip(0)

    class Missing(nf4_peers.Int4):
        def copies(self, count):
            return [lambda x: torch.ops.aten.nothing(x)] * count

    monkeypatch.setattr(nf4_peers, "Plain", Wrong)
    monkeypatch.setattr(nf4_peers, "Int4", Missing)
    found = collected(lambda c: nf4_bench.products("llama-3-8b", c))
    assert {row["backend"] for row in found["products"]}.isdisjoint({Wrong.name, Missing.name})
    said = [note for note in found["notes"] if "left out at [96, 128], 1 rows" in note]
    assert len(said) == 2 and "off by" in said[0] and "AttributeError" in said[1]


def test_ours_is_compared_with_the_best_way_of_bitsandbytes():
    def row(backend: str, rows: int, us: float) -> dict:
        return {"model": "m", "shape": "o", "rows": rows, "backend": backend, "us": us}

    rows = [row("nf4_linear", 1, 5.0), row("nf4_linear", 2, 5.0), row("linear, 16 bits", 2, 1.0)]
    rows += [row("bitsandbytes 0.50.2", 2, 9.0), row("bitsandbytes 0.50.2 fused", 2, 4.0)]
    (found,) = nf4_bench._ahead(rows)
    assert (found["rows"], found["bitsandbytes_us"], found["ahead"]) == (2, 4.0, False)


def test_crossover_is_where_parts_become_faster():
    found = collected(nf4_bench.crossover)
    assert [(row["shape"], row["rows"]) for row in found["crossover"]] == [
        (shape, rows) for shape in ("o", "down") for rows in (64, 128)
    ]
    for shape, most in found["fused_up_to"].items():
        rows = [row for row in found["crossover"] if row["shape"] == shape]
        assert most == max((r["rows"] for r in rows if r["fused_ms"] <= r["parts_ms"]), default=0)
    assert found["fused_rows"] == {"torch": 0}


def test_whole_model_is_in_the_table_of_v():
    found = collected(nf4_bench.model)
    assert {row["weights"] for row in found["verify"]} == {"nf4"}
    assert {row["mode"] for row in found["verify"]} == {"graph"}
    # Two layers of 128 in 4 bits, embedding and head of 512 rows in 16.
    assert found["verify"][0]["bytes"] < 700_000
    assert found["goals"] == [], "no 22 rows at this scale"
    rows = [{"rows": 22, "shape": "chain", "backend": "b", "ratio": 1.2}]
    assert [goal["met"] for goal in nf4_bench._goals(rows)] == [False]


def test_even_values_are_near(seed):
    weight = torch.randn(32, 128).bfloat16()
    even = nf4_peers.Int4(weight)
    assert (even.reference() - weight.float()).abs().max() < 0.25
    peer = nf4_peers.Ours(nf4.quantize(weight), torch.bfloat16, Workspace("cpu"))
    first, second = peer.copies(2)
    x = torch.randn(2, 128).bfloat16()
    assert torch.equal(first(x), second(x)), "copies are of one weight"


def test_command_line(tmp_path, monkeypatch, capsys):
    main = runpy.run_path(str(SCRIPT))["main"]
    out, copy = tmp_path / "out", tmp_path / "copy.json"
    monkeypatch.setattr(nf4_bench, "parts", lambda _: [Part("nf4", "one", nf4_bench.crossover, 0)])

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--out", str(out), "--dry-run", *arguments])
        return main()

    assert run("--budget", "0") == 2
    assert capsys.readouterr().err.startswith("error: --budget is 0.0, expected seconds above 0")
    assert run("--json", str(tmp_path / "out" / "no" / "..")) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert run("--bundle", str(tmp_path), "--json", str(copy)) == 0
    found = json.loads(copy.read_text())
    validate_gpu_results(found)
    assert found == json.loads((out / "results.json").read_text())
    assert found["phases"]["nf4"]["status"] == "passed"
    assert "nf4_linear is the faster up to" in capsys.readouterr().out


def test_parts_of_the_phase():
    parts = nf4_bench.parts(Options(bundle=Path("none")))
    assert [part.name for part in parts] == ["model", "crossover", "llama-7b", "llama-3-8b"]
    assert sum(part.seconds for part in parts) <= 210
    assert {name for name, *_ in nf4_bench.FULL.models["llama-7b"]} == {
        "qkv",
        "o",
        "gate_up",
        "down",
    }
