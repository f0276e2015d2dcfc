"""Phase `overlap`: both models' prefills as one graph of two branches, and the draft's text in the
time in which the CPU prepares a video.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from statistics import median
from threading import Event
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np
import torch

from .clock import interleaved, rotated
from .forward import need_transformers, random_weights
from .parts import CheckFailed, Context, Options, Part

if TYPE_CHECKING:
    from ..overlap import Stages
    from ..targets.llama import LlamaTarget

Prompts = tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]
NOTE = (
    "random weights: nothing of the draft's text is accepted, so times end at the first token; the "
    "video is resized over and over in place of decoding it"
)


@dataclass(frozen=True, slots=True)
class Scale:
    """Sizes of the phase.

    Attributes:
        prompt_tokens: of the target and of the draft.
        prepare_ms: how long the CPU prepares the video at least.
        text: tokens of the draft's text at most.
    """

    config: str = "llama-7b"
    prompt_tokens: tuple[int, int] = (2076, 637)
    prepare_ms: float = 40.0
    text: int = 12
    repeats: int = 6


FULL = Scale()
TINY = Scale("tiny", (40, 20), 4.0, 4, 2)


def parts(options: Options) -> list[Part]:
    """The prefills, then whole requests."""
    return [Part("overlap", "prefills", prefills, 45), Part("overlap", "requests", requests, 45)]


def _models(context: Context) -> tuple[Scale, LlamaTarget, LlamaTarget, Prompts]:
    from ..targets.llama import LlamaTarget

    options = context.options
    sizes = TINY if options.dry_run else FULL
    dtype = torch.float32 if options.dry_run else torch.bfloat16
    targets, prompts = [], []
    draw = torch.Generator().manual_seed(options.seed)
    for number, count in enumerate(sizes.prompt_tokens):
        held = random_weights(sizes.config, options.device, dtype, options.seed + number)
        targets.append(LlamaTarget(held, count + 128, graphs=True))
        ids = torch.randint(held.shape.vocab, (1, count), generator=draw)
        prompts.append({"input_ids": ids.to(options.device)})
    return sizes, *targets, tuple(prompts)


@torch.inference_mode()
def prefills(context: Context) -> Iterator[dict]:
    """Each alone, one after the other, and both in one launch.

    Raises:
        CheckFailed: the first tokens depend on the company.
    """
    need_transformers()
    from ..targets.llama_graphs import PrefillPair

    sizes, target, draft, (theirs, ours) = _models(context)
    pair = PrefillPair(target.graphs, draft.graphs)

    def apart() -> list[int]:
        return [target.prefill(theirs).tokens[0], draft.prefill(ours).tokens[0]]

    def branches() -> list[int]:
        said = []
        with pair.beside(lambda: said.append(draft.prefill(ours).tokens[0])):
            return [target.prefill(theirs).tokens[0], *said]

    if apart() != branches():
        raise CheckFailed("a prefill beside another one gives another token")
    work = {
        "target": partial(target.prefill, theirs),
        "draft": partial(draft.prefill, ours),
        "apart": apart,
        "branches": branches,
    }
    ms = {name: one.ms for name, one in
          interleaved(work, context.options.device, sizes.repeats, burst=1).items()}  # fmt: skip
    yield {"prefills_ms": ms, "prompt_tokens": sizes.prompt_tokens,
           "branches_over_apart": ms["branches"] / ms["apart"]}  # fmt: skip
    context.log(", ".join(f"{name} {value:.2f} ms" for name, value in ms.items()))


@torch.inference_mode()
def requests(context: Context) -> Iterator[dict]:
    """Every mode of `overlap.MODES`, and no draft before the target's first token."""
    need_transformers()
    from ..config import SpecConfig
    from ..drafters.base import Request
    from ..drafters.graph_draft import GraphDrafter
    from ..engine import SpeculativeDecoder
    from ..overlap import MODES, Overlap

    sizes, target, draft, (theirs, ours) = _models(context)
    config = SpecConfig(rows=sizes.text, max_new_tokens=2)
    request = Request(theirs["input_ids"][0].tolist(), ours)
    prepare = partial(_prepare, theirs, sizes.prepare_ms, context.options.seed)
    plain = SpeculativeDecoder(target, None, config)
    ways = {
        mode: Overlap(
            SpeculativeDecoder(target, GraphDrafter(draft, sizes.text), config), mode, sizes.text
        )
        for mode in MODES
    }

    def alone() -> float:
        start, heard = perf_counter(), []
        plain.generate(prepare(Event()), request,
                       on_tokens=lambda tokens: heard.append(perf_counter()))  # fmt: skip
        return 1e3 * (heard[0] - start)

    first: list[float] = []
    found: dict[str, list[Stages]] = {mode: [] for mode in MODES}
    for name in rotated(["none", *MODES], 1 + sizes.repeats):
        if name == "none":
            first.append(alone())
        else:
            ways[name].generate(prepare, request)
            found[name].append(ways[name].stages)
    # The first of each captured its graphs.
    rows = [{"mode": "none", "ttft_ms": median(first[1:])}]
    for mode, stages in found.items():
        columns = [one.as_dict() for one in stages[1:]]
        keys = [key for key in columns[0] if key not in ("mode", "total_ms")]
        rows.append({"mode": mode} | {key: median(c[key] for c in columns) for key in keys})
    yield {"note": NOTE, "overlap": rows}
    for row in rows:
        hidden = f", {row['hidden_tokens']:.0f} tokens hidden" if "hidden_tokens" in row else ""
        context.log(f"{row['mode']}: first token after {row['ttft_ms']:.1f} ms{hidden}")


def _prepare(
    inputs: dict[str, torch.Tensor], ms: float, seed: int, stop: Event
) -> dict[str, torch.Tensor]:
    """`inputs`, behind so many milliseconds of resizing frames on the CPU."""
    from ..data.images import clip_preprocess

    frames = np.random.default_rng(seed).integers(0, 256, (8, 480, 640, 3), dtype=np.uint8)
    start = perf_counter()
    while not stop.is_set() and 1e3 * (perf_counter() - start) < ms:
        clip_preprocess(frames, 224)
    return inputs
