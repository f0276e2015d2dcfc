"""v(M) of one target on this machine, measured once and kept in the user's cache folder."""

from __future__ import annotations

import hashlib
import json
import math
import os
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from xspec_kernels import exact, tiles

from .budget import DraftingCosts
from .drafters.base import MAX_ROWS, Drafter, Request
from .environment import environment
from .files import read_json, write_json
from .targets.base import Target
from .targets.heights import CONTEXT, verify_seconds

__all__ = ["Calibration", "cache_folder", "calibrate", "drafting_costs", "riding_cost"]

SCHEMA = "xspec.calibration/1"
HEIGHTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # rows that are timed; linear between them
REPEATS = 5
OFF = "off"


@dataclass(frozen=True, slots=True)
class Calibration:
    """Seconds of a verify by its rows, 1 among them.

    Attributes:
        cached: they come from the cache, not from a measurement just done.
    """

    seconds: dict[int, float]
    cached: bool = False

    @property
    def step(self) -> float:
        """Seconds of plain decoding's step."""
        return self.seconds[1]

    def costs(self) -> list[float]:
        """Time of a verify of 1, 2, ... rows, relative to a single row."""
        found = [1.0]
        for (low, start), (high, end) in pairwise(sorted(self.seconds.items())):
            slope = (end - start) / (high - low)
            found += [(start + slope * (m - low)) / self.step for m in range(low + 1, high + 1)]
        return found


def cache_folder() -> Path | None:
    """Where calibrations are kept: ``XSPEC_CACHE``, or ``xspec`` in the user's cache folder; None
    where ``XSPEC_CACHE`` is "off".
    """
    named = os.environ.get("XSPEC_CACHE", "")
    if named == OFF:
        return None
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "xspec"


def calibrate(target: Target, rows: int = MAX_ROWS, prompt_rows: int = CONTEXT) -> Calibration:
    """v(M) for M up to `rows`, from the cache or measured, see `verify_seconds`.

    What was measured is kept for the next process on this machine with this model, its types,
    versions and threads. A file that is damaged, or about something else, is measured anew and
    replaced, with a warning; so is a warning all that comes of a folder that cannot be written.

    Raises:
        ValueError: `rows` is not in 1..64.
        RuntimeError: `prompt_rows` and `rows` do not fit the target's cache.
    """
    if not 1 <= rows <= MAX_ROWS:
        raise ValueError(f"rows must be in 1..{MAX_ROWS}, got {rows}")
    heights = sorted({rows, *(height for height in HEIGHTS if height <= rows)})
    key = _key(target, heights, prompt_rows)
    folder = cache_folder()
    file = folder / f"vm-{_digest(key)}.json" if folder else None
    if file and file.exists():
        try:
            return Calibration(_checked(read_json(file), key, heights), cached=True)
        except (ValueError, OSError) as error:
            warnings.warn(f"{file} is measured anew: {error}", RuntimeWarning, stacklevel=2)
    seconds = verify_seconds(target, heights, prompt_rows, REPEATS)
    if file:
        kept = {str(height): time for height, time in seconds.items()}
        try:
            write_json(file, {"schema": SCHEMA, "key": key, "seconds": kept})
        except OSError as error:
            warnings.warn(f"v(M) is not kept: {error}", RuntimeWarning, stacklevel=2)
    return Calibration(seconds)


def drafting_costs(
    drafter: Drafter,
    request: Request,
    rows: int,
    step: float,
    repeats: int = REPEATS,
    clock: Callable[[], float] = perf_counter,
) -> DraftingCosts:
    """What `drafter` costs on a typical request, in steps of `step` seconds: the fastest of
    `repeats` after a warm-up, linear between 2 and `rows` rows. It learns nothing of it.

    Raises:
        ValueError: `rows` is not in 2..64, or `step` is not positive.
    """
    if not 2 <= rows <= MAX_ROWS or not step > 0:
        raise ValueError(f"rows must be in 2..{MAX_ROWS} and step positive, got {rows} and {step}")
    best = [math.inf] * 3
    for repeat in range(repeats + 1):
        marks = [clock()]
        drafter.begin(request)
        marks.append(clock())
        for known, height in ((1, 2), (2, rows)):
            drafter.propose([1] * known, height)
            marks.append(clock())
        if repeat:
            best = [min(old, b - a) for old, (a, b) in zip(best, pairwise(marks), strict=True)]
    drafter.end([])
    begin, low, high = (seconds / step for seconds in best)
    slope = max(0.0, high - low) / max(1, rows - 2)
    return DraftingCosts(begin, (0.0, *(low + slope * extra for extra in range(rows - 1))))


def riding_cost(
    target: Target,
    inputs: Mapping[str, torch.Tensor],
    rows: int,
    step: float,
    repeats: int = REPEATS,
    clock: Callable[[], float] = perf_counter,
) -> float:
    """Cost of one more row in the target's prefill of `inputs`, in steps of `step` seconds, from
    prefills with and without `rows` drafts; 0 where those are not slower.
    """
    best = {0: math.inf, rows: math.inf}
    for repeat in range(repeats + 1):
        for drafts in best:
            start = clock()
            target.prefill(inputs, None, [1] * drafts)
            if repeat:
                best[drafts] = min(best[drafts], clock() - start)
    return max(0.0, best[rows] - best[0]) / rows / step


def _key(target: Target, heights: Sequence[int], prompt_rows: int) -> dict[str, Any]:
    """Everything that another v(M) may come from, as JSON types."""
    where = environment()
    model = getattr(target, "model", None)
    if model is None:
        shape = repr(target.decoder.weights.shape)
    else:
        # Packed or quantized layers have classes of their own, or compute by an object that has.
        workers = (getattr(module.forward, "__self__", module) for module in model.modules())
        layers = Counter(type(worker).__name__ for worker in workers)
        # The folder it came from does not matter.
        config = {k: v for k, v in model.config.to_dict().items() if k != "_name_or_path"}
        shape = f"{json.dumps(config, sort_keys=True, default=str)} {sorted(layers.items())}"
    return {
        "device": str(target.device.type),
        "machine": where["gpu"] if target.device.type == "cuda" else where["cpu"],
        "threads": where["threads"],
        "torch": where["torch"],
        "transformers": where["transformers"],
        "xspec_kernels": where["xspec_kernels"],
        "engine": type(target).__name__,
        "backend": target.backend,
        "graphs": bool(getattr(target, "graphs", None)),
        "dtype": str(target.dtype),
        "exact": exact(),
        "tiles": tiles.config_hash(tiles.card_of(target.device)),
        "model": _digest(shape),
        "heights": list(heights),
        "prompt_rows": prompt_rows,
    }


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _checked(found: object, key: Mapping[str, Any], heights: Sequence[int]) -> dict[int, float]:
    """The times in a file's content; `ValueError` says what is wrong with it."""
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise ValueError(f"it is not of schema {SCHEMA}")
    if found.get("key") != key:
        raise ValueError("it is about another machine, model or version")
    seconds = found.get("seconds")
    if not isinstance(seconds, dict) or set(seconds) != {str(height) for height in heights}:
        raise ValueError(f"it must hold the seconds of {list(heights)} rows")
    for rows, time in seconds.items():
        if type(time) is not float or not 0 < time < math.inf:
            raise ValueError(f"the time of {rows} rows must be positive seconds, got {time!r}")
    return {int(height): time for height, time in seconds.items()}
