"""Parts of phase `check` that need transformers: the law, end to end on the device."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .parts import CheckFailed, Context, Skip

if TYPE_CHECKING:
    from ..targets.llama_weights import LlamaWeights


@dataclass(frozen=True, slots=True)
class Trial:
    """A model's shape with few layers, and prompt lengths around tile and split edges."""

    config: str
    layers: int
    dtype: torch.dtype
    prompts: tuple[int, ...]
    steps: int = 48
    replays: int = 3


TRIALS = (
    Trial("llama-7b", 4, torch.bfloat16, (1, 62, 255, 2076)),
    Trial("llama-3-8b", 2, torch.bfloat16, (31, 544)),
    Trial("smollm2", 4, torch.bfloat16, (95, 288)),
)
DRY = (Trial("tiny", 2, torch.float32, (20, 61), 14, 2),)


def need_transformers() -> None:
    """Raise `Skip` where transformers is not installed."""
    if importlib.util.find_spec("transformers") is None:
        raise Skip("transformers is not installed; the Llama target needs its configurations")


def random_weights(
    config: str, device: str, dtype: torch.dtype, seed: int, layers: int | None = None
) -> LlamaWeights:
    """Weights of a model in `verify_cost.stage.CONFIGS` or of the tiny one of dry runs."""
    from ..targets.llama_weights import LlamaWeights
    from ..verify_cost.stage import find_config, random_model

    found = find_config(config)
    if layers is not None:
        found.num_hidden_layers = layers
    return LlamaWeights.of(random_model(found, device, dtype, seed), share=True)


@contextlib.contextmanager
def exact_on_cpu(device: str) -> Iterator[None]:
    """XSPEC_EXACT=1 in a dry run: on a CPU the law holds in exact mode alone."""
    before = os.environ.get("XSPEC_EXACT")
    if device == "cpu":
        os.environ["XSPEC_EXACT"] = "1"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("XSPEC_EXACT", None)
        else:
            os.environ["XSPEC_EXACT"] = before


def law(context: Context) -> Iterator[dict]:
    """Plain decoding against random trees, bit for bit, and a CUDA graph against eager."""
    need_transformers()
    from .law import Law, Tally

    options, wrong = context.options, []
    for trial in DRY if options.dry_run else TRIALS:
        with exact_on_cpu(options.device), torch.inference_mode():
            weights = random_weights(
                trial.config, options.device, trial.dtype, options.seed, trial.layers
            )
            for prompt in trial.prompts:
                held = Law(weights, "auto", prompt, trial.steps, options.seed)
                total = Tally()
                for _ in range(trial.replays):
                    one = held.replay()
                    total.rounds, total.rows = total.rounds + one.rounds, total.rows + one.rows
                    total.first = total.first or one.first
                total.first = total.first or held.graph()
                name = f"{trial.config}, {str(trial.dtype)[6:]}, {prompt} tokens"
                yield {
                    "law": [
                        {"model": trial.config, "layers": trial.layers, "prompt_tokens": prompt,
                         "dtype": str(trial.dtype)[6:], "steps": trial.steps,
                         "rounds": total.rounds, "rows": total.rows, "first": total.first}
                    ]
                }  # fmt: skip
                context.log(f"law: {name}: {total.first or f'{total.rows} rows equal'}")
                if total.first:
                    wrong.append(f"{name}: {total.first}")
    if wrong:
        raise CheckFailed(f"bits differ from plain decoding in {wrong[0]}")
