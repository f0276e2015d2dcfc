"""The figures of recordings as one table, a column each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.table import Table

NONE = "-"


def tables(names: Sequence[str], found: Sequence[dict]) -> Iterator[Table]:
    """Rounds, ranges and ledger of recordings, as `figures` has them."""
    yield _table("Rounds", names, [list(_rounds(f)) for f in found])
    yield _table("Ranges: total ms, share of the requests", names, _ranges(found))
    yield _table("Ledger, ms", names, [list(_ledger(f["ledger"])) for f in found])


def _table(title: str, names: Sequence[str], columns: Sequence[list[tuple[str, str]]]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right", overflow="fold")
    for cells in zip(*columns, strict=True):
        table.add_row(cells[0][0], *(value for _, value in cells))
    return table


def _number(value: float | None, form: str = ".3f") -> str:
    return NONE if value is None else format(value, form)


def _pair(spread: dict | None) -> str:
    if not spread or not spread["count"]:
        return NONE
    return f"{spread['median_ms']:.3f} / {spread['p95_ms']:.3f}"


def _rounds(f: dict) -> Iterator[tuple[str, str]]:
    yield "source", f["source"]
    yield "requests / their ms", f"{f['requests']} / {f['request_ms']:.1f}"
    yield "verifies / plain rounds", f"{f['verify']['count']} / {f['plain']['count']}"
    yield "verify ms, median / p95", _pair(f["verify"])
    yield "plain round ms, median / p95", _pair(f["plain"])
    yield "host gap between rounds ms, median / p95", _pair(f["gap"])
    yield "GPU busy, share of the requests", _number(f["gpu_busy"], ".1%")
    yield "GPU busy a round ms, median", _number(f["gpu_busy_per_round_ms"])
    yield "GPU rest between rounds ms, median / p95", _pair(f["gpu_rest"])
    yield "launches a round", _number(f["launches_per_round"], ".1f")
    yield "CUDA waits a round", _number(f["cuda_waits_per_round"], ".1f")
    yield "readbacks a round", _number(f["readbacks_per_round"], ".1f")


def _ranges(found: Sequence[dict]) -> list[list[tuple[str, str]]]:
    names = list(dict.fromkeys(name for f in found for name in f["ranges"]))

    def cell(f: dict, name: str) -> str:
        entry = f["ranges"].get(name)
        return f"{entry['total_ms']:.2f}  {entry['share']:6.1%}" if entry else NONE

    return [[(name, cell(f, name)) for name in names] for f in found]


def _ledger(f: dict) -> Iterator[tuple[str, str]]:
    yield "tokens saved", str(f["tokens_saved"])
    yield "rows a verify", _number(f["rows_per_verify"], ".1f")
    how = f" ({f['step_from']})" if f["step_from"] else "; give --step-ms"
    yield "step", _number(f["step_ms"]) + how
    yield "tokens saved x step", _number(f["saved_ms"])
    yield "- verify overhead", _number(f["overhead_ms"])
    yield "- drafting", _number(f["drafting_ms"])
    yield "= net", _number(f["net_ms"])
