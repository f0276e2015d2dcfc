"""Phase `e2e`: the embedded pair, trained and whole, with its target on our own kernels."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from .forward import exact_on_cpu, need_transformers
from .parts import CheckFailed, Context, Options, Part

ARMS = (
    *("target", "hf_generate", "hf_assisted", "draft", "adapter", "adapter_tail"),
    *("ngram", "ngram_tree", "tree"),
)
SAMPLES, TOKENS = 12, 128
TINY_ARMS = ("target", "hf_generate", "hf_assisted", "adapter_tail", "ngram_tree")
# Of the table of `bench/e2e.py`; the rest is for plots.
LEFT_OUT = ("timeline", "by_accepted", "accept_histogram")


def parts(options: Options) -> list[Part]:
    """One for each precision: answers are compared."""
    dtypes = ("float32",) if options.dry_run else ("float32", "bfloat16")
    return [Part("e2e", dtype, partial(pair, dtype), 45) for dtype in dtypes]


def pair(dtype: str, context: Context) -> Iterator[dict]:
    """The table of `bench/e2e.py --engine llama`.

    Raises:
        CheckFailed: an answer of ours is not that of plain decoding.
    """
    need_transformers()
    from .. import e2e_options
    from ..measure import run_interleaved, summarize
    from ..workloads import MiniPair

    given, dry = context.options, context.options.dry_run
    names = TINY_ARMS if dry else ARMS
    options = e2e_options.Options(
        "",
        samples=1 if dry else SAMPLES,
        max_new_tokens=8 if dry else TOKENS,
        engine="llama",
        device=given.device,
        dtype=dtype,
        seed=given.seed,
    )
    with exact_on_cpu(given.device), torch.inference_mode():
        models = MiniPair(options.settings())
        workload = models.workload(models.scene_tasks(options.samples, options.seed))
        samples = run_interleaved(workload, names, warmup=min(2, options.samples))
    found = summarize(samples, names, workload, {}, "")
    arms = [{k: v for k, v in arm.items() if k not in LEFT_OUT} for arm in found["arms"]]
    yield {"arms": arms, "near_ties": found["near_ties"]}
    for arm in arms:
        context.log(
            f"{dtype} {arm['name']}: {arm['total_ms']:.1f} ms, {arm['speedup_total']:.2f}x, "
            f"{arm['identical']} of {arm['samples']} identical"
        )
        if arm["identical"] < arm["samples"] and not arm["name"].startswith("hf_"):
            raise CheckFailed(f"answers of {arm['name']} differ from plain decoding")
