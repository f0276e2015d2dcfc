"""Arguments of a measurement of v(M), parsed and checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ..drafters.base import MAX_ROWS, DraftTree
from ..files import check_output
from ..inputs import check_device
from .engines import MODES, check_backends
from .report import PLOT
from .stage import SHAPES, Stage, find_config

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FILES = ("results.json", PLOT)


@dataclass(frozen=True)
class VerifyOptions:
    """Arguments of one run, as the command line names them; lists are comma-separated.

    Attributes:
        backends: empty: ours, transformers', and on a GPU plain torch.
        modes: empty: eager, and on a GPU graph.
        dtype: empty: float32 on a CPU, bfloat16 on a GPU.
        threads: 0: one for the embedded pair, torch's choice otherwise.
    """

    command: str
    config: str = "mini"
    rows: str = "1,2,4,6,8,12,16,22,24,32,48,64"
    prompt_tokens: str = "512,2076,4124"
    shapes: str = "chain,tree"
    backends: str = ""
    modes: str = ""
    device: str = "cpu"
    dtype: str = ""
    repeats: int = 10
    seed: int = 0
    threads: int = 0
    output_dir: Path = Path("results/verify")
    json_file: Path | None = None

    def plan(self) -> Plan:
        """The options parsed and checked.

        Raises:
            ValueError: an option is out of range; the message names it.
            RuntimeError: a backend cannot run on the device.
            OSError: a result cannot be written, or a folder has no config.json.
        """
        find_config(self.config)
        check_device(self.device)
        kind = torch.device(self.device).type
        dtype = self.dtype or ("float32" if kind == "cpu" else "bfloat16")
        if dtype not in DTYPES:
            raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        for name, value, low, high in (
            ("--repeats", self.repeats, 1, 10_000),
            ("--threads", self.threads, 0, 1024),
            ("--seed", self.seed, 0, 1_000_000),
        ):
            if not low <= value <= high:
                raise ValueError(f"{name} must be in {low}..{high}, got {value}")
        modes = _names("--modes", self.modes or ("eager" if kind == "cpu" else "eager,graph"))
        if unknown := set(modes) - set(MODES):
            raise ValueError(f"--modes takes {', '.join(MODES)}, got {min(unknown)!r}")
        if "graph" in modes and kind == "cpu":
            raise ValueError("--modes graph needs --device cuda: a CPU has no CUDA graphs")
        shapes = _names("--shapes", self.shapes)
        if unknown := set(shapes) - set(SHAPES):
            raise ValueError(f"--shapes takes {', '.join(SHAPES)}, got {min(unknown)!r}")
        default = "auto,transformers" + (",linear" if kind == "cuda" else "")
        backends = _names("--backends", self.backends or default)
        check_backends(backends, self.device, DTYPES[dtype])
        if "tight" in backends and "graph" not in modes:
            raise ValueError("--backends tight is about graphs: add --modes graph")
        for file in filter(None, (*map(self.output_dir.joinpath, FILES), self.json_file)):
            check_output(file)
        rows = _numbers("--rows", self.rows, MAX_ROWS)
        prompts = _numbers("--prompt-tokens", self.prompt_tokens, 1 << 17)
        return Plan(
            tuple(sorted({1, *rows})), prompts, shapes, backends, modes, self.device, DTYPES[dtype],
            self.repeats, self.seed,
        )  # fmt: skip


def _names(option: str, text: str) -> tuple[str, ...]:
    found = tuple(part.strip() for part in text.split(",") if part.strip())
    if not found or len(set(found)) < len(found):
        raise ValueError(f"{option} must be one or more different names, got {text!r}")
    return found


def _numbers(option: str, text: str, most: int) -> tuple[int, ...]:
    try:
        found = tuple(int(part) for part in _names(option, text))
    except ValueError:
        found = ()
    if not found or not all(1 <= number <= most for number in found):
        raise ValueError(f"{option} must be different numbers in 1..{most}, got {text!r}")
    return found


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure: every combination."""

    rows: tuple[int, ...]
    prompt_tokens: tuple[int, ...]
    shapes: tuple[str, ...]
    backends: tuple[str, ...]
    modes: tuple[str, ...]
    device: str
    dtype: torch.dtype
    repeats: int
    seed: int

    def trees(self, stage: Stage) -> dict[tuple[str, int], DraftTree]:
        """By shape and rows. A tree of one or two rows is a chain; one row is always measured."""
        wanted = [
            (shape, rows)
            for shape in self.shapes
            for rows in self.rows
            if rows > (2 if shape == "tree" else 0)
        ]
        return {key: stage.tree(*key, self.seed) for key in dict.fromkeys([("chain", 1), *wanted])}
