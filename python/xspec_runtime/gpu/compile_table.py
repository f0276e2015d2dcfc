"""What every kernel of the verify path costs as machine code, for cards that are not here.

An entry carries a digest of everything that the compiler saw, so that a table can be checked
against the present sources without compiling it again.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import xspec_kernels as xspec

from ..environment import environment
from ..files import read_json
from . import compile_adapters
from .compile_cases import Case, cases
from .machine_code import facts

SCHEMA = "xspec.compile/1"
# Compute capability -> KiB of shared memory that one program may have.
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227}
_LINEAR = ("qkv", "o", "gate_up", "down")
PRODUCTS = (
    "tree_attention", "first_qkv", *_LINEAR, *(f"nf4_{name}" for name in _LINEAR), "lm_head",
    *compile_adapters.PRODUCTS,
)  # fmt: skip
# These read single words: tables of a tree, and what the tiles of the vocabulary left.
NARROW = ("lm_head_join", "accept", "commit", *compile_adapters.NARROW)

Entry = dict[str, Any]


def entry_of(case: Case) -> Entry:
    """Compile and disassemble."""
    found = facts(case.source.compile())
    return {
        "kernel": case.kernel,
        "model": case.model,
        "arch": case.arch,
        **found._asdict(),
        "rows": case.rows,
        "instructions_per_row": round(found.instructions / case.rows, 1),
        "triton": compiler_version(),
        "source": case.source.digest,
    }


def compiler_version() -> str:
    """Triton's, which carries its own assembler."""
    return xspec.info()["triton"]


def faults(entry: Entry) -> list[str]:
    """What is wrong with the machine code, in words; empty where nothing is."""
    kernel, limit = entry["kernel"], SHARED_KIB[entry["arch"]] * 1024
    found = []
    if entry["spills"]:
        found.append(f"spills {entry['spills']}")
    if entry["shared"] > limit:
        found.append(f"asks for {entry['shared']} bytes of shared memory, the card has {limit}")
    if (kernel in PRODUCTS) != bool(entry["matrix"]):
        found.append(f"uses matrix instructions {entry['matrix']}")
    # Attention has two products of different widths; elsewhere one instruction serves every row.
    if len(entry["matrix"]) > (2 if kernel == "tree_attention" else 1):
        found.append(f"mixes matrix instructions {entry['matrix']}")
    if kernel not in NARROW and not entry["wide_loads"]:
        found.append("loads nothing 16 bytes at a time")
    return found


def is_current(entry: Entry | None, case: Case) -> bool:
    """Whether the entry was made from this source by this compiler."""
    key = (case.source.digest, compiler_version())
    return entry is not None and (entry["source"], entry["triton"]) == key


def by_name(table: dict[str, Any]) -> dict[tuple[str, str, int], Entry]:
    """Entries by (kernel, model, arch)."""
    return {(e["kernel"], e["model"], e["arch"]): e for e in table["entries"]}


def read_table(path: Path) -> dict[str, Any]:
    """A table as `build_table` makes it.

    Raises:
        FileNotFoundError, ValueError: there is none, or it is something else.
    """
    table = read_json(path, "compile table")
    if not isinstance(table, dict) or table.get("schema") != SCHEMA:
        raise ValueError(f"{path} is no compile table: its schema is not {SCHEMA}")
    return table


def build_table(
    command: str, old: dict[str, Any] | None, progress: Callable[[int, int, str], None]
) -> dict[str, Any]:
    """The whole table; entries of `old` that are current are kept, the others compiled."""
    kept = by_name(old) if old else {}
    made: dict[str, Entry] = {}
    wanted, entries = cases(), []
    for done, case in enumerate(wanted):
        progress(done, len(wanted), case.name)
        entry = kept.get((case.kernel, case.model, case.arch))
        if not is_current(entry, case):
            # Shapes of one model can be those of another.
            same = made.get(case.source.digest) or entry_of(case)
            entry = same | {"kernel": case.kernel, "model": case.model}
        made[case.source.digest] = entry
        entries.append(entry)
    return {
        "schema": SCHEMA,
        "command": command,
        "environment": environment(),
        "complete": True,
        "entries": entries,
    }


def compile_markdown(table: dict[str, Any]) -> str:
    """The table in Markdown: a line for every kernel and model, a column for every card."""
    entries = by_name(table)
    archs = sorted({arch for _, _, arch in entries})
    lines = [
        f"| kernel | model | {' | '.join(f'sm_{arch}' for arch in archs)} |",
        f"|---|---|{'---|' * len(archs)}",
    ]
    for kernel, model in dict.fromkeys((kernel, model) for kernel, model, _ in entries):
        cells = (_cell(entries[kernel, model, arch]) for arch in archs)
        lines.append(f"| `{kernel}` | {model} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(entry: Entry) -> str:
    matrix = "".join(f", {name.split('.')[0]} x {count}" for name, count in entry["matrix"].items())
    shared = entry["shared"]
    size = f"{shared / 1024:.3g} KiB" if shared >= 1024 else f"{shared} B"
    each = f" ({entry['instructions_per_row']:.0f})" if entry["rows"] > 1 else ""
    return f"{entry['registers']} reg, {size}, {entry['instructions']}{each}{matrix}"


def document(table: dict[str, Any]) -> str:
    """A page around `compile_markdown`."""
    limits = ", ".join(f"{kib} on sm_{arch}" for arch, kib in SHARED_KIB.items())
    return f"""# Machine code of the verify kernels

Triton {compiler_version_of(table)}, bfloat16, compiled without a GPU by `{table["command"]}`, which
compiles again what is out of date and rewrites this page.

A cell: registers a thread; shared memory a program; instructions in the binary, each counted as
often as it is written, and in parentheses that number for each row of the tile that a program
computes; the matrix instructions among them. No kernel spills, and none asks for more shared memory
than a program may have, in KiB: {limits}.

{compile_markdown(table)}
"""


def compiler_version_of(table: dict[str, Any]) -> str:
    """The versions of Triton that the entries were made by."""
    return ", ".join(sorted({entry["triton"] for entry in table["entries"]}))
