"""The analysis under the names of the research: `acceptance_metrics.json`, `position_stats.json`
and `METRICS_COMPARISON.md` of its `pipeline/evaluation/measure_feature_acceptance.py`
(https://github.com/xifan-zhang/EventGPT).

Two things differ. B1, L5F and EAGLE are compared with the state they have to predict, not with the
one they read. Keys that were computed from assumed times (``speedup_*``, ``e2e_*``, ``prefill_*``
and ``token_sd_*`` of prefill hiding) are absent: speedups are measured end to end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import torch

from ...metrics.similarity import PUBLISHED_TAUS, consecutive_similar, published_similarity
from .steps import Compared, correlation, cosine_curve

HIGH = 0.90
PROXY_TAUS = (0.80, 0.85, 0.90, 0.92, 0.95, 0.98)
POSITIONS = 20
SHOWN = 10


def acceptance_metrics(compared: Compared, width: int, gamma: int = 5) -> dict[str, Any]:
    """The published keys; None where nothing was counted.

    Args:
        width: of the states.
        gamma: drafts of ``sd_*_gamma5`` and ``token_sd_decode_*``, as ``sd_gamma_decode`` says.
    """
    there, lengths = compared.there, compared.lengths
    kept = compared.similarity[there]
    metrics: dict[str, Any] = {
        "timestamp": datetime.now().isoformat(),
        "batch_size": len(there),
        "max_seq_len": there.shape[1],
        "hidden_dim": width,
        "total_valid_positions": kept.numel(),
        **_spread("cos_sim_{}", kept),
    }
    similar = published_similarity(compared.similarity, lengths)
    metrics |= {key: value for key, value in similar.items() if key != "cos_sim"}
    for tau in PUBLISHED_TAUS:
        rows = consecutive_similar(compared.similarity, tau, lengths)
        metrics |= _spread(f"consecutive_{{}}_{tau * 100:.0f}", torch.tensor(rows))
    metrics |= _spread("num_hidden_tokens_{}", torch.tensor(lengths), ("mean", "std", "min", "max"))
    metrics |= _of_drafts(compared, metrics, gamma)
    metrics |= _of_tokens(compared, gamma)
    for point in cosine_curve(compared, PROXY_TAUS):
        key = f"cosim_{point['tau'] * 100:.0f}"
        metrics |= {f"{key}_token_match": point["token_match"], f"{key}_count": point["count"]}
    return metrics | {"cosim_token_pearson_r": correlation(compared)}


def position_stats(compared: Compared) -> list[dict[str, float | int | None]]:
    """Similarity at each position that any answer has."""
    stats = []
    for i in range(compared.there.shape[1]):
        kept = compared.similarity[compared.there[:, i], i]
        if not kept.numel():
            break
        spread = _spread("{}", kept, ("mean", "std"))
        shares = {
            f"accept_{tau * 100:.0f}": (kept > tau).float().mean().item() for tau in PUBLISHED_TAUS
        }
        stats.append({"position": i, **spread, "num_samples": kept.numel(), **shares})
    return stats


def comparison_markdown(metrics: Mapping[str, Any], speedup: float | None = None) -> str:
    """METRICS_COMPARISON.md in the published layout.

    Args:
        speedup: measured end to end, with tokens; similarity accepts nothing and has none.
    """
    whole = "-" if speedup is None else f"{speedup:.2f}x"
    positions = zip(
        metrics["position_accept_90"][:SHOWN], metrics["position_token_accept"], strict=False
    )
    proxies = (f"cosim_{tau * 100:.0f}" for tau in PROXY_TAUS)
    pearson = metrics["cosim_token_pearson_r"]
    lines = [
        "# Metrics Comparison: Hidden-State vs Token-Level",
        "",
        f"Generated: {metrics['timestamp']}",
        "",
        "A verify accepts tokens; similarity is no acceptance.",
        "",
        "## Summary",
        "",
        "| Metric | Hidden-State (@0.90) | Token-Level (Top-1) |",
        "|--------|---------------------|---------------------|",
        f"| Overall Accept Rate | {_percent(metrics['accept_90'])} | "
        f"{_percent(metrics['token_top1_match'])} |",
        f"| Consecutive Accepts | {metrics['consecutive_mean_90']:.2f} | "
        f"{metrics['token_consecutive_mean']:.2f} |",
        f"| E2E Speedup | - | {whole} |",
        "",
        "## Cosine Similarity as Token Proxy",
        "",
        "| cos_sim threshold | P(token match given cos > threshold) | Count |",
        "|-------------------|-------------------------------|-------|",
        *(f"| > 0.{key[-2:]} | {_percent(metrics[key + '_token_match'])} | "
          f"{metrics[key + '_count']} |" for key in proxies),
        "",
        f"Pearson r (cos_sim, token_match): **{'-' if pearson is None else f'{pearson:.4f}'}**",
        "",
        "## Per-Position Comparison (First 10)",
        "",
        "| Position | Hidden Accept @0.90 | Token Top-1 |",
        "|----------|--------------------:|------------:|",
        *(f"| {i} | {_percent(alike)} | {_percent(right)} |"
          for i, (alike, right) in enumerate(positions)),
        "",
        "## Two-Phase SD (Token-Level)",
        "",
        f"- gamma_decode = {metrics['token_sd_gamma_decode']}",
        f"- Decode consecutive accepts: {metrics['token_sd_decode_consecutive_mean']:.2f}",
        "",
    ]  # fmt: skip
    return "\n".join(lines)


def _of_drafts(compared: Compared, metrics: Mapping[str, Any], gamma: int) -> dict[str, Any]:
    """The published ``sd_*`` keys, which call similar states accepted."""
    length = metrics["num_hidden_tokens_mean"]
    lengths = [min(length, gamma) for length in compared.lengths]
    first = consecutive_similar(compared.similarity[:, :gamma], HIGH,
                                [min(n, compared.there.shape[1]) for n in lengths])  # fmt: skip
    mean = torch.tensor(first).float().mean().item()
    return {
        "sd_accept_rate_prefill_gamma": metrics["consecutive_mean_90"] / length if length else None,
        "sd_gamma_prefill": length,
        "sd_accept_rate_decode_gamma5": mean / gamma,
        "sd_consecutive_gamma5": mean,
        "sd_gamma_decode": gamma,
        "position_accept_90": _by_position(compared, compared.similarity > HIGH),
        "position_mean_sim": _by_position(compared, compared.similarity),
    }


def _of_tokens(compared: Compared, gamma: int) -> dict[str, Any]:
    count = int(compared.there.sum())
    hits = {1: compared.right, **compared.among}
    rates = {
        f"token_top{k}_match": int(hit.sum()) / count if count else None for k, hit in hits.items()
    }
    rows = compared.right.int().cumprod(1)
    first = rows[:, :gamma].sum(1).float().mean().item()
    return {
        **rates,
        **_spread("token_consecutive_{}", rows.sum(1)),
        "position_token_accept": _by_position(compared, compared.right),
        "token_sd_gamma_decode": gamma,
        "token_sd_decode_consecutive_mean": first,
        "token_sd_decode_accept_rate": first / gamma,
    }


def _by_position(compared: Compared, values: torch.Tensor) -> list[float]:
    """Means over answers at the first positions."""
    return [
        values[there, i].float().mean().item()
        for i, there in enumerate(compared.there.T[:POSITIONS])
        if there.any()
    ]


def _spread(
    key: str,
    values: torch.Tensor,
    names: Sequence[str] = ("mean", "std", "max", "min", "median"),
) -> dict[str, float | None]:
    """Mean, spread and bounds under `key` with the name filled in; None without values."""
    values = values.float()
    if not values.numel():
        return dict.fromkeys(key.format(name) for name in names)
    found = {
        "mean": values.mean(),
        "std": values.std(correction=min(1, values.numel() - 1)),
        "min": values.min(),
        "max": values.max(),
        "median": values.median(),
    }
    return {key.format(name): found[name].item() for name in names}


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.2%}"
