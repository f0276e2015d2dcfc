"""Results of the suite as Markdown: everything measured, lost shapes included, goals beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..tables import markdown, shown
from ..verify_cost.report import groups

Results = Mapping[str, Any]
Facts = list[Mapping[str, Any]]
# Name, value, goal, whether the value is to be at least that.
Goal = tuple[str, float, float, bool]

# Rows of v(M) in the table; the result file has all.
COUNTS = (6, 22, 32, 64)
# Of the arms of full size and of the embedded pair: key, title, form.
FULL_SIZE = (
    ("tokens_per_verify", "tokens/verify", "{:.2f}"), ("ttft_ms", "TTFT ms", "{:.1f}"),
    ("decode_ms", "decode ms", "{:.1f}"), ("total_ms", "total ms", "{:.1f}"),
    ("speedup_decode", "decode", "{:.2f}x"), ("speedup_gpu", "GPU", "{:.2f}x"),
    ("speedup_total", "total", "{:.2f}x"), ("near_ties", "near ties", "{:.1f}"),
)  # fmt: skip
PAIR = (
    ("total_ms", "total ms", "{:.1f}"), ("tokens_per_verify", "tokens/verify", "{:.2f}"),
    ("speedup_total", "speedup", "{:.2f}x"), ("speedup_decode", "decode", "{:.2f}x"),
    ("identical", "identical", "{}"), ("samples", "of", "{}"),
)  # fmt: skip
OVERLAP = (
    ("ttft_ms", "TTFT ms", "{:.1f}"), ("video_ms", "video ms", "{:.1f}"),
    ("draft_ms", "draft ms", "{:.1f}"), ("window_used_ms", "of it hidden ms", "{:.1f}"),
    ("hidden_tokens", "tokens hidden", "{:.0f}"),
)  # fmt: skip


def gpu_markdown(results: Results) -> str:
    """A section for each kind of figure that there is, the headings of the third level."""
    made = (_goals, _checks, _verify, _kernels, _products, _prefill, _pair, _overlap, _full_size)
    return "\n\n".join(text for section in made for text in section(results))


def facts(results: Results, phase: str, key: str) -> Facts:
    """Entries of the list `key` of all parts of a phase, in order."""
    parts = results["phases"].get(phase, {}).get("parts", {})
    return [row for part in parts.values() for row in part["data"].get(key, ())]


def _data(results: Results, phase: str) -> dict[str, Mapping[str, Any]]:
    """Data of the parts of a phase that have any."""
    parts = results["phases"].get(phase, {}).get("parts", {})
    return {name: part["data"] for name, part in parts.items() if part["data"]}


def _section(title: str, titles: Sequence[str], rows: list[list[str]]) -> Iterator[str]:
    if rows:
        yield f"### {title}\n\n{markdown(titles, rows)}"


def _columns(rows: Mapping[str, Mapping[str, Any]], columns: Sequence[tuple]) -> list[list[str]]:
    return [[name, *(shown(form, row.get(key)) for key, _, form in columns)]
            for name, row in rows.items()]  # fmt: skip


def _goals(results: Results) -> Iterator[str]:
    cells = [
        [name, f"{value:.2f}", f"{'at least' if least else 'at most'} {goal:g}",
         "met" if (value >= goal if least else value <= goal) else "missed"]
        for name, value, goal, least in (*_kernel_goals(results), *_request_goals(results))
    ]  # fmt: skip
    yield from _section("Goals", ["", "measured", "goal", ""], cells)
    ahead = facts(results, "nf4", "ahead")
    if ahead:
        lost = [f"{row['model']} {row['shape']} at {row['rows']} rows" for row in ahead
                if not row["ahead"]]  # fmt: skip
        behind = f"; behind: {', '.join(lost)}" if lost else ""
        yield (
            f"Ahead of bitsandbytes' best way at {len(ahead) - len(lost)} of {len(ahead)} shapes "
            f"and numbers of rows{behind}."
        )


def _kernel_goals(results: Results) -> Iterator[Goal]:
    for weights, phase in (("bf16", "verify"), ("nf4", "nf4")):
        for goal in facts(results, phase, "goals"):
            what = "v(1)/floor" if goal["of"] == "floor_ratio" else f"v({goal['rows']})/v(1)"
            where = f", {goal['prompt_tokens']:,} tokens" if "prompt_tokens" in goal else ""
            yield f"{what}, {weights}{where}", goal["value"], goal["goal"], False
    for row in facts(results, "kernels", "kernels"):
        if row.get("goal_us"):
            yield f"{row['op']}, {row['rows']} rows, us", row["us"], row["goal_us"], False
    for row in facts(results, "prefill", "prefill"):
        if row["backend"] == "xspec graph":
            name = f"prefill / operations, {row['weights']}, {row['prompt_tokens']:,} tokens"
            yield name, row["ratio"], row["goal"], False


def _request_goals(results: Results) -> Iterator[Goal]:
    for weights, data in _data(results, "full_size").items():
        arms = data["arms"]
        for name in ("fused_exact", "memory_tree"):
            arm = arms[name]
            share = arm["speedup_decode"] / arm["tokens_per_verify"]
            yield f"{name}, {weights}: decode speedup / tokens per verify", share, 0.9, True
            if users := arms.get("transformers_generate"):
                ratio = users["total_ms"] / arm["total_ms"]
                yield f"{name}, {weights}: against transformers' generate", ratio, 3.0, True
            if (rest := _us(arm["round"]["gpu_rest"])) is not None:
                yield f"{name}, {weights}: us that the GPU rests", rest, 60.0, False
            if weights == "nf4" and arm["peak_bytes"]:
                yield f"{name}, {weights}: peak GB", arm["peak_bytes"] / 1e9, 20.0, False


def _checks(results: Results) -> Iterator[str]:
    rows = [
        [f"{phase}.{name}", part["status"], f"{part['seconds']:.1f}", part.get("message") or ""]
        for phase, found in results["phases"].items()
        for name, part in found["parts"].items()
    ]
    yield from _section("Parts", ["part", "status", "s", "why"], rows)
    rows = [
        [f"{one['model']}, {one['layers']} layers, {one['dtype']}", f"{one['prompt_tokens']:,}",
         str(one["rounds"]), str(one["rows"]), one["first"] or "none"]
        for one in facts(results, "check", "law")
    ]  # fmt: skip
    titles = ["model", "prompt tokens", "rounds", "rows compared", "first difference"]
    yield from _section("Plain decoding against trees, bit for bit", titles, rows)


def _verify(results: Results) -> Iterator[str]:
    for weights in dict.fromkeys(row["weights"] for row in results["verify"]):
        here = [row for row in results["verify"] if row["weights"] == weights]
        rows = []
        for (prompt, backend, mode, shape), found in groups({"verify": here}).items():
            one = found.get(1, {})
            rows.append([
                backend, mode, shape, f"{prompt:,}", shown("{:.3f}", one.get("ms")),
                shown("{:.2f}", one.get("floor_ratio")),
                *(shown("{:.2f}", found.get(m, {}).get("ratio")) for m in COUNTS),
            ])  # fmt: skip
        titles = ["backend", "mode", "shape", "prompt", "v(1) ms", "/ floor",
                  *(f"v({m})/v(1)" for m in COUNTS)]  # fmt: skip
        yield from _section(f"v(M), {weights}", titles, rows)


def _kernels(results: Results) -> Iterator[str]:
    rows = [
        [row["op"], str(row["rows"]), f"{row['us']:.1f}", f"{row['gbps']:,.0f}",
         shown("{:.0%}", row.get("of_copy")), shown("{:.1f}", row["torch_us"])]
        for row in facts(results, "kernels", "kernels")
    ]  # fmt: skip
    titles = ["kernel", "rows", "us", "GB/s", "of a copy's", "torch us"]
    yield from _section("Kernels", titles, rows)


def _products(results: Results) -> Iterator[str]:
    rows = [
        [f"{row['model']} {row['shape']}", row["backend"], str(row["rows"]), f"{row['us']:.1f}",
         f"{row['gbps']:,.0f}", f"{row['of_copy']:.0%}"]
        for row in facts(results, "nf4", "products")
    ]  # fmt: skip
    titles = ["layer", "way", "rows", "us", "GB/s", "of a copy's"]
    yield from _section("4-bit products", titles, rows)


def _prefill(results: Results) -> Iterator[str]:
    rows = [
        [f"{row['weights']}, {row['prompt_tokens']:,} tokens", row["backend"], f"{row['ms']:.2f}",
         f"{row['bound_ms']:.2f}", f"{row['ratio']:.2f}"]
        for row in facts(results, "prefill", "prefill")
    ]  # fmt: skip
    rows += [
        [f"{row['frames']} frames", row["backend"], f"{row['ms']:.2f}", f"{row['bound_ms']:.2f}",
         f"{row['ratio']:.2f}"]
        for row in facts(results, "prefill", "vision")
    ]  # fmt: skip
    titles = ["", "way", "ms", "operations at the matrix rate, ms", "ratio"]
    yield from _section("Prefill", titles, rows)


def _pair(results: Results) -> Iterator[str]:
    for dtype, data in _data(results, "e2e").items():
        arms = {arm["name"]: arm for arm in data["arms"]}
        titles = ["arm", *(title for _, title, _ in PAIR)]
        yield from _section(f"The embedded pair, {dtype}", titles, _columns(arms, PAIR))


def _overlap(results: Results) -> Iterator[str]:
    for data in _data(results, "overlap").values():
        if "prefills_ms" in data:
            rows = [[name, f"{ms:.2f}"] for name, ms in data["prefills_ms"].items()]
            yield from _section("Two prefills", ["", "ms"], rows)
        if "overlap" in data:
            modes = {row["mode"]: row for row in data["overlap"]}
            titles = ["draft text", *(title for _, title, _ in OVERLAP)]
            yield from _section("The window", titles, _columns(modes, OVERLAP))
            yield f"{data['note'].capitalize()}."


def _full_size(results: Results) -> Iterator[str]:
    for weights, data in _data(results, "full_size").items():
        arms, sizes = data["arms"], data["shape"]
        title = f"Both models at {sizes['config']}, {weights}"
        titles = ["arm", *(title for _, title, _ in FULL_SIZE)]
        yield from _section(title, titles, _columns(arms, FULL_SIZE))
        sources = " and ".join(dict.fromkeys(one["source"] for one in data["oracles"]))
        yield f"{data['notice'].capitalize()}; accepted lengths: {sources}."
        rows = [
            [name, shown("{:.2f}", arm["round_ms"]), shown("{:.2f}", arm["propose_ms"]),
             shown("{:.1f}", r["launches_per_round"]),
             shown("{:.1f}", r["cuda_waits_per_round"]), shown("{:.1f}", r["readbacks_per_round"]),
             shown("{:.0f}", _us(r["gpu_rest"])), shown("{:.0f}", _us(r["gap"])),
             shown("{:.1f}", arms[name]["peak_bytes"] and arms[name]["peak_bytes"] / 2**30)]
            for name, arm in arms.items() if (r := arm.get("round"))
        ]  # fmt: skip
        titles = ["arm", "ms", "of it proposing", "launches", "waits of CUDA", "readbacks",
                  "GPU rests us", "host gap us", "peak GiB"]  # fmt: skip
        yield from _section(f"A round, {weights}", titles, rows)


def _us(spread: Mapping[str, Any] | None) -> float | None:
    """The median in microseconds."""
    middle = spread and spread["median_ms"]
    return None if middle is None else 1e3 * middle
