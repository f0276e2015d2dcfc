"""The cost model as JSON, Markdown and plots. Measured, projected and modelled figures never share
a column.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..files import read_json, read_text, write_json, write_text
from ..report import check_output_dir
from ..tables import markdown, shown
from ..targets.llama_weights import LlamaShape
from .model import ACCEPTANCES, SCHEMA, Results, costs_of, points_of, project
from .modelled import SCHEMA as MODELLED
from .modelled import find_card, verify_launches

# A projection at these acceptances is shown in Markdown; the JSON has them all.
SHOWN = (0.2, 0.4, 0.6, 0.8, 0.9, 1.0)
LABELS = {"h200": "H200", "h100": "H100", "a100": "A100", "4090": "RTX 4090", "3090": "RTX 3090"}


def cost_results(
    command: str,
    e2e: Results,
    verify: Results | None = None,
    backend: str = "",
    gammas: Sequence[int] = (),
) -> dict[str, Any]:
    """Results of schema ``xspec.cost/1`` from measured ones.

    Args:
        gammas: chain lengths to project; by default the measured one.

    Raises:
        ValueError: see `costs_of`; or v(gamma + 1) was not measured.
    """
    costs = costs_of(e2e, verify, backend)
    gammas = list(gammas) or [e2e["config"]["gamma"]]
    parts = asdict(costs) | {"verify": {str(m): ms for m, ms in sorted(costs.verify.items())}}
    return {
        "schema": SCHEMA,
        "kind": "projected from measured parts",
        "command": command,
        "environment": e2e["environment"],
        "sources": [source["command"] for source in (e2e, verify) if source],
        "measured": parts,
        "plain_ms": costs.plain,
        "ceiling": costs.ceiling,
        "points": [asdict(point) for point in points_of(e2e)],
        "projected": project(costs, gammas, ACCEPTANCES),
    }


def points_markdown(results: Results) -> str:
    """The measured arms beside the closed form of their own parts."""
    rows = []
    for p in results["points"]:
        rows.append(
            [
                p["arm"], str(p["rows"]), f"{p['tokens_per_verify']:.2f}",
                shown("{:.0%}", p["acceptance"]), f"{p['verify_ms']:.2f}",
                f"{p['drafting_ms']:.2f}", f"{p['begin_ms']:.1f}",
                f"{p['measured_speedup']:.2f}x", f"{p['projected_speedup']:.2f}x",
            ]
        )  # fmt: skip
    titles = ["arm", "rows", "tokens/verify", "as a chain", "v ms", "proposal ms", "begin ms",
              "measured speedup", "projected speedup"]  # fmt: skip
    m = results["measured"]
    window = f"window {m['window']:.1f} ms, " if m["window"] else ""
    note = (
        f"Measured parts: {window}prefill {m['prefill']:.1f} ms, step {m['step']:.2f} ms, "
        f"{m['tokens']:.1f} tokens. The ceiling, decoding for nothing, is "
        f"{results['ceiling']:.2f}x."
    )
    return f"{markdown(titles, rows)}\n\n{note}"


def projected_markdown(results: Results) -> str:
    """Projected speedups by acceptance."""
    rows = []
    for p in results["projected"]:
        if p["acceptance"] not in SHOWN:
            continue
        speedups = [f"{p[key]:.2f}x" for key in ("free_drafts", "own_draft", "separate", "fused")]
        rows.append(
            [f"{p['gamma']}", f"{p['acceptance']:.0%}", f"{p['tokens_per_verify']:.2f}",
             f"{p['verify_ms']:.2f}", f"{p['break_even_ms']:.2f}", *speedups]
        )  # fmt: skip
    return markdown(
        ["gamma", "acceptance", "tokens/verify", "v ms", "break-even v ms", "drafts free",
         "draft model", "one verify", "one, in the prefill"], rows,
    )  # fmt: skip


def modelled_markdown(results: Results) -> str:
    """The modelled table; every column of times and ratios says so."""
    rows = [
        [
            f"{LABELS.get(r['card'], r['card'])}, {r['weights']}, {r['prompt_tokens']:,}",
            str(r["rows"]), f"{r['counted_bytes'] / 1e9:.2f}",
            f"{r['modelled_floor_ms']:.2f}", f"{r['modelled_ms']:.2f}",
            f"{r['modelled_least_ms']:.2f}-{r['modelled_most_ms']:.2f}",
            f"{r['modelled_ratio']:.2f}", f"{r['modelled_floor_ratio']:.2f}", r["modelled_bound"],
        ]
        for r in results["modelled"]
    ]  # fmt: skip
    titles = (
        "card, weights, prompt", "M", "counted GB", "modelled floor ms", "modelled v(M) ms",
        "modelled range ms", "modelled v(M)/v(1)", "modelled v(M)/floor", "bound by (modelled)",
    )  # fmt: skip
    return markdown(titles, rows)


def constants_markdown(results: Results) -> str:
    """What the modelled figures rest on."""
    cards = [
        [c["title"], f"{c['bandwidth']:,.0f}", f"{c['matrix']:,.0f}", str(c["multiprocessors"]),
         f"{c['clock']:.2f}", f"{c['l2']:,.0f}"]
        for c in results["cards"].values()
    ]  # fmt: skip
    a = results["assumed"]
    low, high = a["launch_range_us"]
    note = (
        "Memory, matrix rate (bf16, dense, fp32 sums), multiprocessors and boost clock: NVIDIA's "
        "data sheets. L2 is assumed, and so is everything here: a plain copy reaches "
        f"{a['copy']:.0%} of the memory's rate (the floor divides by that), weights "
        f"{a['weights']:.0%} and K/V {a['cache']:.0%} of the copy's; matrix units "
        f"{a['matrix']:.0%} of their rate; {a['instructions']:g} instructions an NF4 weight (the "
        f"compiled kernel has 6 to 7.3); {a['launch_us']:g} us to fill and drain the card at each "
        f"launch of a graph, {low:g} to {high:g} for the range."
    )
    titles = ["card", "memory GB/s", "matrix TFLOP/s", "multiprocessors", "clock GHz", "L2 GB/s"]
    return f"{markdown(titles, cards)}\n\n{note}"


def counts_markdown(results: Results, prompt: int = 2076, rows: int = 22) -> str:
    """What the launches of one pass in bf16 move and compute, on the first card's tiles."""
    fields = {key: value for key, value in results["config"].items() if key != "config"}
    card = find_card(next(iter(results["cards"])))
    launches = verify_launches(LlamaShape(**fields), "bf16", prompt, rows, card)
    lines = [
        [x.name, str(x.times), f"{x.times * (x.weights + x.cache) / 1e6:,.1f}",
         f"{x.times * x.l2 / 1e6:,.1f}", f"{x.times * x.matrix / 1e9:,.1f}"]
        for x in launches
    ]  # fmt: skip
    titles = ["launch", "times", "MB from memory", "MB through L2 besides", "matrix Gop"]
    note = (
        f"Counted: {rows} rows behind {prompt:,} tokens, {results['config']['config']} in bf16, "
        f"tiles of sm_{card.capability}. Matrix operations are those of 64 rows, whatever the "
        "number of rows: the kernels have one tile height."
    )
    return f"{markdown(titles, lines)}\n\n{note}"


def cold_markdown(results: Results) -> str:
    """Seconds from the start of a process, by stage."""
    wall, cpu = results["seconds"]["wall"], results["seconds"]["cpu"]
    lines = [[stage, f"{wall[stage]:.2f}", f"{cpu[stage]:.2f}"] for stage in wall]
    return markdown(["stage", "wall s", "CPU s"], lines)


def verify_markdown(results: Results) -> str:
    """v(M) of chains as it was measured."""
    found: dict[tuple[int, str, str], dict[int, Mapping[str, Any]]] = {}
    for row in results["verify"]:
        if row["shape"] == "chain":
            key = (row["prompt_tokens"], row["backend"], row["mode"])
            found.setdefault(key, {})[row["rows"]] = row
    counts = sorted({m for rows in found.values() for m in rows} - {1})
    lines = [
        [f"{backend}, {mode}, {prompt:,} tokens", f"{rows[1]['ms']:.1f}",
         f"{rows[1]['floor_ratio']:.2f}",
         *(f"{rows[m]['ratio']:.2f}" if m in rows else "-" for m in counts)]
        for (prompt, backend, mode), rows in found.items()
    ]  # fmt: skip
    titles = ["backend", "v(1) ms", "v(1)/floor", *(f"v({m})/v(1)" for m in counts)]
    return markdown(titles, lines)


def overlap_markdown(results: Results) -> str:
    """Arms from file to last token."""
    lines = []
    for arm in results["arms"]:
        s = arm.get("stages") or {}
        hidden = f"{s['hidden_tokens']:.1f} of {s['drafted_tokens']:.1f}" if s.get("mode") else "-"
        used = f"{s['window_used_ms']:.0f} of {s['draft_ms']:.0f}" if s.get("mode") else "-"
        lines.append(
            [arm["name"], f"{arm['prepare_ms']:.1f}", used, hidden, f"{arm['ttft_ms']:.1f}",
             f"{arm['total_ms']:.1f}", f"{arm['speedup_total']:.2f}x",
             f"{arm['identical']}/{arm['samples']}"]
        )  # fmt: skip
    return markdown(["arm", "prepare ms", "draft hidden ms", "tokens hidden", "TTFT ms", "total ms",
                  "speedup", "identical"], lines)  # fmt: skip


def write_cost(results: Results, output_dir: Path, json_file: Path | None) -> list[Path]:
    """Write results.json and, where matplotlib is installed, a plot; returns the files.

    Raises:
        ValueError: a folder that cannot be written.
        OSError: a file cannot be written.
    """
    from ..plots import draw_plots
    from .plots import draw_cost, draw_modelled

    folder = check_output_dir(output_dir)
    modelled = results["schema"] == MODELLED
    written = [folder / "results.json", *([json_file] if json_file else [])]
    for file in written:
        write_json(file, results)
    plots = {"modelled": draw_modelled} if modelled else {"cost": draw_cost}
    return written + draw_plots(results, folder, **plots)


# Tables of a page, by the name between its markers: from which file they come, and what makes them.
_MEASURED: dict[str, tuple[str, Callable[[Results], str]]] = {
    "cost": ("e2e_cpu.json", lambda r: points_markdown(cost_results("", r))),
    "projected": ("e2e_cpu.json", lambda r: projected_markdown(cost_results("", r))),
    "verify": ("verify_smollm2_cpu.json", verify_markdown),
    "overlap": ("overlap_cpu.json", overlap_markdown),
    "cold": ("cold_start_cpu.json", cold_markdown),
}


def fill_page(page: Path, folder: Path, modelled: Results, check: bool = False) -> None:
    """Rewrite the tables of `page` between ``<!-- table: NAME -->`` and ``<!-- end -->``: measured
    ones from the results in `folder`, the others from `modelled`.

    Args:
        check: only compare.

    Raises:
        ValueError: there is no table, one has no results, or `check` found a difference.
    """
    text, cards = read_text(page), ",".join(modelled["cards"])
    before = text
    names = re.findall(r"<!-- table: (\w+) -->", text)
    if not names:
        raise ValueError(f"{page} has no tables")
    for name in names:
        if name in _MEASURED:
            file, render = _MEASURED[name]
            results = read_json(folder / file, "measured results")
            if not results.get("complete", True):
                raise ValueError(f"{folder / file} cannot be published: the run was interrupted")
            what = "Projected from what was measured" if name == "projected" else "Measured"
            block = f"{what}: {_source(file, results)}\n\n{render(results)}"
        elif name == "modelled":
            made = f"Modelled, not measured: `python bench/cost_model.py --card {cards}`."
            block = f"{made}\n\n{modelled_markdown(modelled)}"
        elif name in ("constants", "counts"):
            block = (constants_markdown if name == "constants" else counts_markdown)(modelled)
        else:
            raise ValueError(f"{page}: there is no table {name!r}")
        pattern = rf"(<!-- table: {name} -->).*?(<!-- end -->)"
        text = re.sub(pattern, lambda m, b=block: f"{m[1]}\n{b}\n{m[2]}", text, flags=re.S)
    if check and text != before:
        raise ValueError(f"{page} is not what its results give; run bench/cost_model.py --page")
    if not check:
        write_text(page, text)


def _source(file: str, results: Results) -> str:
    env = results["environment"]
    where = [f"`{results['command']}` on {env.get('gpu') or env.get('cpu') or env['machine']}"]
    names = ("threads", "torch", "transformers", "commit")
    where += [f"{name} {env[name]}" for name in names if env.get(name)]
    return f"{', '.join(where)} ([raw](../bench/results/{file}))."
