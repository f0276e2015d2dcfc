"""What a run at full size was asked for, checked before models are made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from .oracle import Oracle, made_up, oracles_of_pairs, read_oracle

WEIGHTS = ("nf4", "bf16")


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a run: configurations of `verify_cost.stage.CONFIGS`, and tokens."""

    config: str
    dtype: torch.dtype
    prompt_tokens: int
    draft_prompt_tokens: int
    max_new_tokens: int
    repeats: int


SHAPES = {
    "full": Shape("llama-7b", torch.bfloat16, 2076, 637, 50, 5),
    "tiny": Shape("tiny", torch.float32, 40, 20, 12, 1),
}


@dataclass(frozen=True)
class Options:
    """What a run was asked for.

    Attributes:
        pairs: recorded answers, of which both oracles are made.
        oracle, draft_oracle: accepted lengths of the memory tree, and of the draft's first chain,
            instead. At full size there is no other source.
        window_ms: in which the CPU prepares the video and the GPU idles; 0 leaves it out.
    """

    weights: str = "nf4"
    shape: str = "full"
    pairs: Path | None = None
    oracle: Path | None = None
    draft_oracle: Path | None = None
    rows: int = 16
    gamma: int = 12
    window_ms: float = 0.0
    device: str = "cuda"
    seed: int = 0
    peers: bool = True
    command: str = ""


def checked(options: Options) -> tuple[Shape, tuple[Oracle, Oracle]]:
    """The sizes, and the oracles of the tree and of the chain.

    Raises:
        ValueError: an option is unknown or out of range, or an oracle is missing or damaged.
    """
    for name, value, known in (
        ("weights", options.weights, WEIGHTS), ("shape", options.shape, tuple(SHAPES)),
    ):  # fmt: skip
        if value not in known:
            raise ValueError(f"--{name} must be {' or '.join(known)}, got {value!r}")
    for name, value in (("rows", options.rows), ("gamma", options.gamma + 1)):
        if not 2 <= value <= 32:
            raise ValueError(f"--{name} is out of range: 2 to 32 rows a verify, got {value}")
    if not 0 <= options.window_ms < 1e6:
        raise ValueError(f"--window-ms must be 0 or more, got {options.window_ms}")
    if options.device != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"torch {torch.__version__} sees no CUDA device; --shape tiny needs none")
    return SHAPES[options.shape], _oracles(options)


def _oracles(options: Options) -> tuple[Oracle, Oracle]:
    """Of the tree, and of the chain."""
    if options.pairs:
        both = oracles_of_pairs(options.pairs, options.rows, options.gamma)
    elif options.shape == "tiny":
        both = made_up(options.rows, options.seed), made_up(options.gamma + 1, options.seed)
    elif options.oracle and options.draft_oracle:
        both = None, None
    else:
        raise ValueError(
            "accepted lengths are recorded ones, not made up: give --pairs, or --oracle and "
            "--draft-oracle"
        )
    given = (options.oracle, options.rows), (options.draft_oracle, options.gamma + 1)
    first, second = (
        read_oracle(path, rows, options.seed) if path else found
        for (path, rows), found in zip(given, both, strict=True)
    )
    return first, second
