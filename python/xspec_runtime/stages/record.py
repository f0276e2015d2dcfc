"""Five-stage results in the published schema, with the figures that it lacked; times in seconds.

Published keys mean what they meant. ``parallel_speedup`` divides the time of both models one after
the other by the time of both at once: it says nothing about using the draft. What a user gains or
loses against the target alone is ``speedup_against_target_alone``.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, pstdev

from ..data.dsec import Clip
from ..metrics import consecutive_matches, published_acceptance
from .clock import STAGES, Timed

SCHEMA = "xspec.stages/1"


def sample_record(
    clip: Clip, question: str, draft: Timed, target: Timed, wall: float | None, texts: Sequence[str]
) -> dict:
    """One sample.

    Args:
        wall: seconds from start to end where both ran at once; None where one followed the other.
        texts: of the draft's and of the target's answer.
    """
    match = published_acceptance(draft.tokens, target.tokens, bos=None)
    return {
        "sample_idx": clip.index,
        "sample_id": clip.id,
        "drive": clip.drive,
        "query": question,
        "eventgpt": _model_record("EventGPT", draft, texts[0]),
        "videollava": _model_record("Video-LLaVA", target, texts[1]),
        "acceptance": match | {"accepted_prefix": consecutive_matches(draft.tokens, target.tokens)},
        "parallel": parallel_record(draft, target, wall),
    }


def parallel_record(draft: Timed, target: Timed, wall: float | None) -> dict:
    """What the draft can do, or did, before the target's first token.

    Computed figures assume that neither model slows the other; measured ones are there where both
    ran at once.
    """
    step = draft.stages["decode"] / max(1, len(draft.tokens) - 1)
    window = max(0.0, target.first_token - draft.first_token)
    hidden = min(len(draft.tokens), int(window / step) if step else 0)
    computed = max(draft.total, target.total)
    record = {
        "egpt_prefill_complete": draft.first_token,
        "vl_prefill_complete": target.first_token,
        "overlap_window": window,
        "hidden_tokens": hidden,
        "hidden_decode_time": hidden * step,
        "wall_clock_prefill": max(draft.first_token, target.first_token),
        "wall_clock_decode": computed - max(draft.first_token, target.first_token),
        "wall_clock_total": wall if wall is not None else computed,
        "wall_clock_is": "computed" if wall is None else "measured",
        "sequential_total": draft.total + target.total,
        "egpt_tokens_generated": len(draft.tokens),
        "vl_tokens_generated": len(target.tokens),
    }
    record["parallel_speedup"] = record["sequential_total"] / record["wall_clock_total"]
    record["hidden_tokens_measured"] = None
    if wall is not None:
        first = target.started + target.first_token
        record["hidden_tokens_measured"] = sum(
            draft.started + moment <= first for moment in draft.emitted
        )
    return record


def statistics(results: Sequence[dict], alone: Sequence[float] | None = None) -> dict:
    """Means and deviations over samples.

    Args:
        alone: the target's totals by itself, where the samples ran both models at once.
    """

    def spread(values: Sequence[float]) -> dict[str, float]:
        return {"avg": mean(values), "std": pstdev(values)}

    found: dict = {"n_samples": len(results)}
    rates = spread([r["acceptance"]["acceptance_rate"] or 0.0 for r in results])
    found |= {f"acceptance_rate_{key}": value for key, value in rates.items()}
    found["accepted_prefix_avg"] = mean(r["acceptance"]["accepted_prefix"] for r in results)
    for key, part in (("matched_tokens_total", "matched_tokens"),
                      ("total_tokens_compared", "total_tokens")):  # fmt: skip
        found[key] = sum(r["acceptance"][part] for r in results)
    for model in ("eventgpt", "videollava"):
        found[model] = {
            f"{key}_{which}": value
            for key in (*(f"stage{i}_time" for i in range(1, 6)), "total_time", "num_output_tokens")
            for which, value in spread([float(r[model][key]) for r in results]).items()
        }
    parts = [r["parallel"] for r in results]
    parallel = {
        f"{key}_avg": mean(part[key] for part in parts)
        for key in (
            *("overlap_window", "hidden_tokens", "wall_clock_total", "sequential_total"),
            "parallel_speedup",
        )
    }
    measured = [p["hidden_tokens_measured"] for p in parts]
    parallel["hidden_tokens_measured_avg"] = None if None in measured else mean(measured)
    totals = alone or [r["videollava"]["total_time"] for r in results]
    parallel["speedup_against_target_alone"] = sum(totals) / sum(
        part["wall_clock_total"] for part in parts
    )
    found["parallel"] = parallel
    return found


def _model_record(name: str, timed: Timed, text: str) -> dict:
    decode, count = timed.stages["decode"], len(timed.tokens)
    return {
        "model": name,
        **{f"stage{i}_time": timed.stages[stage] for i, stage in enumerate(STAGES, 1)},
        "prefill_length": timed.prompt,
        "output_tokens": timed.tokens,
        "output_text": text,
        "num_output_tokens": count,
        "tokens_per_sec": (count - 1) / decode if decode and count > 1 else None,
        "avg_token_time": decode / (count - 1) if count > 1 else None,
        "total_time": timed.total,
        "prefill_complete_time": timed.first_token,
        "gpu_memory_mb": timed.memory_mb,
        "near_ties": timed.near_ties,
    }
