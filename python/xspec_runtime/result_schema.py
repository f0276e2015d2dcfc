"""The shape of an end-to-end result file, ``xspec.e2e/1``, and a check that names what is wrong."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .files import read_json

SCHEMA = "xspec.e2e/1"
ENVIRONMENT = (
    *("machine", "cpu", "gpu", "torch", "transformers", "triton", "python", "commit", "threads"),
)
ARM_NUMBERS = (
    *("prefill_ms", "decode_ms", "total_ms", "ttft_ms", "acceptance_rate", "tokens_per_verify"),
    *("gain", "speedup_total", "speedup_decode", "identical", "samples", "slower", "tokens"),
)
ROUND_PHASES = ("propose", "forward", "accept", "commit")
LEDGER = ("tokens_saved", "step_ms", "saved_ms", "verify_overhead_ms", "drafting_ms", "net_ms")
STAGES = (
    *("video_ms", "draft_start_ms", "draft_ms", "window_used_ms", "hidden_tokens"),
    *("drafted_tokens", "ttft_ms", "total_ms"),
)
BY_ACCEPTED_NUMBERS = ("samples", "share", "median_speedup", "slower")
VERDICTS = ("slower", "breakeven", "faster")


def read_results(path: Path) -> dict[str, Any]:
    """The results.json of an end-to-end run.

    Raises:
        FileNotFoundError, ValueError: it is none; the message names it.
    """
    results = read_json(path, "end-to-end results")
    try:
        validate_results(results)
    except ValueError as error:
        raise ValueError(f"{path} is no result of bench/e2e.py: {error}") from None
    return results


def validate_results(results: Mapping[str, Any]) -> None:
    """Check a results dictionary of schema ``xspec.e2e/1``.

    Figures may be null everywhere (an arm of another library does not know them all), keys may not
    be missing; only ``timeline``, ``prepare_ms`` and ``stages`` are optional.

    Raises:
        ValueError: names the first missing or wrong field, e.g. ``arms[2].gain``.
    """
    _mapping(results, "results")
    if results.get("schema") != SCHEMA:
        raise ValueError(f"schema: expected {SCHEMA!r}, got {results.get('schema')!r}")
    _no_odd_numbers(results, "")
    for key in ENVIRONMENT:
        _get(_mapping(_get(results, "environment"), "environment"), key, "environment.")
    _typed(_get(results, "command"), str, "command", "a string")
    _mapping(_get(results, "config"), "config")
    _numbers(_get(results, "near_ties"), ("steps", "below_2_ulp"), "near_ties")
    _numbers(_get(results, "verbatim_in_training"), ("captions", "share"), "verbatim_in_training")
    _typed(_get(results, "samples"), list, "samples", "a list")
    arms = _typed(_get(results, "arms"), list, "arms", "a list")
    if not arms:
        raise ValueError("arms: expected at least one arm, got an empty list")
    for index, arm in enumerate(arms):
        _arm(arm, f"arms[{index}]")
    names = [arm["name"] for arm in arms]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"arms: the name {twice[0]!r} occurs more than once")


def _arm(arm: Any, where: str) -> None:
    _mapping(arm, where)
    if not _typed(_get(arm, "name", where + "."), str, where + ".name", "a string"):
        raise ValueError(f"{where}.name: expected a name, got an empty string")
    _numbers(arm, ARM_NUMBERS, where)
    _numbers(arm, ("prepare_ms",) if "prepare_ms" in arm else (), where)
    _numbers(arm.get("stages"), STAGES, where + ".stages")
    histogram = _get(arm, "accept_histogram", where + ".")
    for key, count in (
        _mapping(histogram, where + ".accept_histogram") if histogram else {}
    ).items():
        if not str(key).isdigit():
            raise ValueError(f"{where}.accept_histogram: keys count accepted tokens, got {key!r}")
        if not _is_number(count):
            raise ValueError(f"{where}.accept_histogram[{key!r}]: expected a count, got {count!r}")
    _numbers(_get(arm, "round_split_ms", where + "."), ROUND_PHASES, where + ".round_split_ms")
    _numbers(_get(arm, "ledger", where + "."), LEDGER, where + ".ledger")
    rows = _get(arm, "by_accepted", where + ".")
    for index, row in enumerate(_list_or_null(rows, where + ".by_accepted")):
        spot = f"{where}.by_accepted[{index}]"
        _get(_mapping(row, spot), "accepted", spot + ".")
        _numbers(row, BY_ACCEPTED_NUMBERS, spot)
        if _get(row, "verdict", spot + ".") not in VERDICTS:
            raise ValueError(f"{spot}.verdict: expected {VERDICTS}, got {row['verdict']!r}")
    for index, span in enumerate(_list_or_null(arm.get("timeline"), where + ".timeline")):
        spot = f"{where}.timeline[{index}]"
        _typed(_get(_mapping(span, spot), "name", spot + "."), str, spot + ".name", "a string")
        for key in ("start_ms", "end_ms"):
            if not _is_number(_get(span, key, spot + ".")):
                raise ValueError(f"{spot}.{key}: expected a number, got {span[key]!r}")
        if span["end_ms"] < span["start_ms"]:
            raise ValueError(
                f"{spot}: end_ms {span['end_ms']} is before start_ms {span['start_ms']}"
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _get(mapping: Mapping[str, Any], key: str, where: str = "") -> Any:
    if key not in mapping:
        raise ValueError(f"{where}{key}: missing")
    return mapping[key]


def _typed(value: Any, kind: type, where: str, expected: str) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"{where}: expected {expected}, got {type(value).__name__}")
    return value


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    return _typed(value, Mapping, where, "a dictionary")


def _list_or_null(value: Any, where: str) -> list[Any]:
    return [] if value is None else _typed(value, list, where, "a list or null")


def _numbers(value: Any, keys: tuple[str, ...], where: str) -> None:
    """``value`` is null or a dictionary in which each key holds a number or null."""
    if value is None:
        return
    _mapping(value, where)
    for key in keys:
        found = _get(value, key, where + ".")
        if found is not None and not _is_number(found):
            raise ValueError(f"{where}.{key}: expected a number or null, got {found!r}")


def _no_odd_numbers(value: Any, where: str) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            _no_odd_numbers(item, f"{where}.{key}" if where else str(key))
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            _no_odd_numbers(item, f"{where}[{index}]")
    elif _is_number(value) and not math.isfinite(value):
        raise ValueError(f"{where}: expected a finite number or null, got {value}")
