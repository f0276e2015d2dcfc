"""Phase `verify`: v(M) of our forward pass, beside plain torch's, in the shape of a 7B model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .baseline import copy_timing
from .forward import need_transformers
from .parts import Context, Options, Part

GOALS = ((22, "ratio", 1.05), (64, "ratio", 1.20), (1, "floor_ratio", 1.35))


@dataclass(frozen=True, slots=True)
class Scale:
    """Sizes of the phase."""

    config: str = "llama-7b"
    prompt_tokens: tuple[int, ...] = (2076, 4124)
    rows: tuple[int, ...] = (1, 2, 4, 6, 8, 12, 16, 22, 24, 32, 48, 64)
    repeats: int = 8
    copy_bytes: int = 4 << 30


FULL = Scale()
TINY = Scale("tiny", (40,), (1, 2, 6), 1, 1 << 20)


def parts(options: Options) -> list[Part]:
    """One part: the weights are made once."""
    return [Part("verify", "bf16", bf16, 80)]


def bf16(context: Context) -> Iterator[dict]:
    """Rows of the table of v(M), and how far they are from the goals."""
    need_transformers()
    from ..verify_cost.measure import measure
    from ..verify_cost.options import Plan
    from ..verify_cost.stage import Subject, find_config, random_model

    options = context.options
    sizes, device, seed = TINY if options.dry_run else FULL, options.device, options.seed
    gbps = context.known.get("baseline.machine", {}).get("copy_gbps")
    gbps = gbps or 2 * sizes.copy_bytes / copy_timing(sizes.copy_bytes, device).ms / 1e6
    with torch.inference_mode():
        model = random_model(find_config(sizes.config), device, torch.bfloat16, seed)
        subject = Subject.of(model, seed, keep_model=False)
        del model
        yield {"copy_gbps": gbps}
        for prompt in sizes.prompt_tokens:
            plan = Plan(
                sizes.rows, (prompt,), ("chain", "tree"), ("auto", "tight", "linear"),
                ("eager", "graph"),
                device, torch.bfloat16, sizes.repeats, seed,
            )  # fmt: skip
            found = measure(plan, subject, gbps)
            names = list(dict.fromkeys(row["backend"] for row in found.rows))
            yield {"verify": found.rows, "goals": list(_goals(found.rows, names[0]))}
            if found.stopped:
                raise KeyboardInterrupt


def _is(row: dict, backend: str) -> bool:
    return (row["backend"], row["mode"], row["shape"]) == (backend, "graph", "chain")


def _goals(rows: list[dict], backend: str) -> Iterator[dict]:
    """What was reached of `GOALS`, of chains in a graph."""
    for count, key, goal in GOALS:
        for row in rows:
            if _is(row, backend) and row["rows"] == count:
                yield {
                    "prompt_tokens": row["prompt_tokens"], "rows": count, "of": key,
                    "value": row[key], "goal": goal, "met": row[key] <= goal,
                }  # fmt: skip
