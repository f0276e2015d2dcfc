"""Inputs of the cost model that a command line names or measures on the spot."""

from __future__ import annotations

from pathlib import Path

from ..e2e import Options, run_e2e
from ..files import read_json
from ..targets.llama_weights import LlamaShape
from ..verify_cost.measure import run_verify
from ..verify_cost.options import VerifyOptions
from ..verify_cost.report import SCHEMA
from ..verify_cost.stage import find_config
from .modelled import WEIGHTS, modelled_results

ARMS = "target,draft,ngram,ngram_tree,tree"
HEIGHTS = "1,2,4,6,8,12,16"


def spot_e2e(folder: Path, samples: int) -> dict:
    """A short end-to-end run of the embedded pair, written below `folder`."""
    return run_e2e(
        Options("python bench/e2e.py", arms=ARMS, samples=samples, output_dir=folder / "e2e")
    )


def spot_verify(folder: Path) -> dict:
    """v(M) of the embedded target through transformers' kernels, as end-to-end runs use them."""
    options = VerifyOptions(
        "python bench/verify.py", rows=HEIGHTS, prompt_tokens="192", shapes="chain",
        backends="transformers", repeats=5, output_dir=folder / "verify",
    )  # fmt: skip
    return run_verify(options)


def read_verify(path: Path) -> dict:
    """The results.json of `bench/verify.py`.

    Raises:
        FileNotFoundError, ValueError: it is none; the message names it.
    """
    results = read_json(path, "results of bench/verify.py")
    known = isinstance(results, dict) and results.get("schema") == SCHEMA
    if not known or not isinstance(results.get("verify"), list):
        raise ValueError(f"{path} is no result of bench/verify.py: expected schema {SCHEMA}")
    return results


def numbers(option: str, text: str, most: int) -> tuple[int, ...]:
    """Comma-separated numbers.

    Raises:
        ValueError: not different numbers in 1..`most`; names `option`.
    """
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or len(set(found)) < len(found) or not all(1 <= n <= most for n in found):
        raise ValueError(f"{option} must be different numbers in 1..{most}, got {text!r}")
    return found


def modelled_for(command: str, config: str, cards: str, prompts: str, rows: str) -> dict:
    """Modelled results of cards that a command line names.

    Raises:
        ValueError: an unknown card or configuration, or numbers out of range.
    """
    names = [name.strip() for name in cards.split(",") if name.strip()]
    shape = LlamaShape.of(find_config(config))
    return modelled_results(
        command, config, shape, list(dict.fromkeys(names)), tuple(WEIGHTS),
        numbers("--prompt-tokens", prompts, 1 << 20), numbers("--rows", rows, 64),
    )  # fmt: skip
