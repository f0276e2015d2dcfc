"""v(M) as results.json, a plot, and a table in the terminal: schema ``xspec.verify/1``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import write_json
from ..report import check_output_dir
from ..tables import terminal_table

if TYPE_CHECKING:
    from rich.table import Table

SCHEMA = "xspec.verify/1"
PLOT = "verify.png"
NUMBERS = ("prompt_tokens", "rows", "ms", "ratio")
NAMES = {"weights": None, "backend": None, "shape": ("chain", "tree"), "mode": ("eager", "graph")}
CAPTION = (
    "v(M): one target forward over M rows; floor: weights, K and V over the measured copy "
    "bandwidth. Columns M: v(M)/v(1)."
)

Results = Mapping[str, Any]


def validate_verify(results: Results) -> None:
    """Check a results dictionary of schema ``xspec.verify/1``.

    Raises:
        ValueError: names the first missing or wrong field, e.g. ``verify[2].ms``.
    """
    _require(results.get("schema") == SCHEMA, "schema", repr(SCHEMA), results.get("schema"))
    for key, kind in (
        *(("environment", dict), ("command", str), ("complete", bool), ("config", dict)),
        *(("copy", dict), ("notes", list), ("verify", list)),
    ):
        _require(isinstance(results.get(key), kind), key, kind.__name__, results.get(key))
    gbps = results["copy"].get("gbps")
    _require(_positive(gbps), "copy.gbps", "a number above 0", gbps)
    for index, row in enumerate(results["verify"]):
        where = f"verify[{index}]"
        for key, allowed in NAMES.items():
            value = row.get(key)
            good = isinstance(value, str) and (allowed is None or value in allowed)
            _require(good, f"{where}.{key}", allowed or "a name", value)
        for key in (*NUMBERS, "floor_ratio"):
            value = row.get(key)
            _require(_positive(value), f"{where}.{key}", "a number above 0", value)


def _positive(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0


def _require(good: bool, where: str, expected: object, found: object) -> None:
    if not good:
        raise ValueError(f"{where}: expected {expected}, got {found!r}")


def groups(results: Results) -> dict[tuple[int, str, str, str], dict[int, Mapping[str, Any]]]:
    """(prompt tokens, backend, mode, shape) -> rows -> row; one row belongs to every shape."""
    found: dict[tuple[int, str, str, str], dict[int, Mapping[str, Any]]] = {}
    for row in results["verify"]:
        key = (row["prompt_tokens"], row["backend"], row["mode"], row["shape"])
        found.setdefault(key, {})[row["rows"]] = row
    for (*start, shape), rows in found.items():
        one = found.get((*start, "chain"), {}).get(1)
        if shape == "tree" and one:
            rows.setdefault(1, one)
    return found


def verify_table(results: Results) -> Table:
    """The table for a terminal (rich).

    Raises:
        ValueError: see `validate_verify`.
    """
    validate_verify(results)
    counts = sorted({row["rows"] for row in results["verify"]} - {1})
    caption = CAPTION if results["complete"] else f"Interrupted. {CAPTION}"
    lines = []
    for (prompt, backend, mode, shape), rows in groups(results).items():
        if shape == "chain" and set(rows) == {1} and len(counts):
            continue
        one = rows.get(1)
        first = [f"{one['ms']:.3f}", f"{one['floor_ratio']:.2f}"] if one else ["-", "-"]
        cells = [f"{rows[m]['ratio']:.2f}" if m in rows else "-" for m in counts]
        lines.append([str(prompt), backend, mode, shape, *first, *cells])
    titles = ["prompt", "backend", "mode", "shape", "v(1) ms", "/ floor", *map(str, counts)]
    title = f"v(M), {results['config']['config']} {results['config']['dtype']}"
    return terminal_table(titles, lines, range(1, 4), title=title, caption=caption)


def write_verify(results: Results, output_dir: Path, json_file: Path | None) -> list[Path]:
    """Write results.json, its plot where matplotlib is installed, and a copy of the former.

    Returns:
        The files written.

    Raises:
        ValueError: wrong results or a folder that cannot be written.
        OSError: a file cannot be written.
    """
    from ..plots import draw_plots, draw_verify

    validate_verify(results)
    folder = check_output_dir(output_dir)
    written = [folder / "results.json", *([json_file] if json_file else [])]
    for file in written:
        write_json(file, results)
    return written + draw_plots(results, folder, verify=draw_verify)
