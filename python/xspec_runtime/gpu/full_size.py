"""Phase `full_size`: both 7B models in one request, accepted lengths imposed from a recording."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from .bundle import DRAFT_ACCEPTED, RECORDINGS, carried
from .forward import need_transformers
from .parts import Context, Options, Part, Skip

# Tokens that the research drafted in its one chain (18 to 23): accepted lengths need the room.
RECORDED_GAMMA = 21


def parts(options: Options) -> list[Part]:
    """One for each kind of weights; bitsandbytes is needed for the users' stack in NF4."""
    folders = list(carried(options.bundle, "bitsandbytes").values())[:1]
    paths = tuple(str(folder) for folder in folders if folder)
    return [
        Part("full_size", weights, partial(arms, weights), 90, paths if weights == "nf4" else ())
        for weights in ("nf4", "bf16")
    ]


def arms(weights: str, context: Context) -> Iterator[dict]:
    """Figures of every arm; see `xspec_runtime.full_size.run`."""
    need_transformers()
    from ..full_size.options import Options as Asked
    from ..full_size.run import run_full_size

    options, pairs = context.options, context.options.bundle / RECORDINGS[0]
    if options.dry_run:
        asked = Asked(weights, "tiny", device="cpu", seed=options.seed)
    elif pairs.is_file():
        counts = options.bundle / DRAFT_ACCEPTED
        asked = Asked(weights, pairs=pairs, device=options.device, seed=options.seed)
        if counts.is_file():
            asked = replace(asked, draft_oracle=counts, gamma=RECORDED_GAMMA)
    else:
        raise Skip(f"{pairs} is not there: accepted lengths are recorded ones")
    found = run_full_size(asked, context.log)
    yield {key: found[key] for key in ("notice", "oracles", "skipped", "shape", "arms")}
