"""The kernels of `adapter_forward` at the published sizes, as launches to be compiled."""

from __future__ import annotations

from collections.abc import Callable

import torch

import xspec_kernels as xspec

from .adapter_networks import SHORT, Builder

DTYPE = torch.bfloat16
_ROWS = 22
# Names of the launches of each call, None for one that has been named before.
_TOKEN = (
    "adapter_feed", "adapter_embed", "adapter_first_qkv", "row_attention", "adapter_first_out",
    "adapter_up", "adapter_down", "adapter_qkv", None, "adapter_out", None, None, "layer_norm",
    "lm_head", "lm_head_join", "adapter_pick",
)  # fmt: skip
_STATES = {
    "L1": ("row_moments", "adapter_down", "adapter_up", "layer_norm"),
    "L2": (None, None, None, "adapter_down", None, None),
    "L3": (None, "adapter_first_down", "adapter_first_up", "adapter_down", "adapter_up", None),
    "L4": (None, "adapter_qkv", "row_attention", "adapter_out", "adapter_up", "adapter_down",
           "adapter_mix"),
}  # fmt: skip
# On the matrix units.
PRODUCTS = (
    "row_attention", "adapter_first_qkv", "adapter_first_out", "adapter_qkv", "adapter_out",
    "adapter_up", "adapter_down", "adapter_first_down", "adapter_first_up", "adapter_mix",
)  # fmt: skip
NARROW = ("adapter_feed", "adapter_pick")


def new(*shape: int, dtype: torch.dtype = DTYPE) -> torch.Tensor:
    """Never written nor read, so a weight of a gigabyte takes no memory."""
    return torch.empty(shape, dtype=dtype)


def network(name: str) -> xspec.Network:
    """One of `adapter_networks.NETWORKS`, with no more layers than differ."""
    return Builder(SHORT, new, new, new).network(name)


def _run_tokens() -> None:
    words = [new(1, dtype=torch.int32) for _ in range(5)]
    feed = xspec.AdapterFeed(
        new(_ROWS, dtype=torch.int64), *words[:3], new(5, dtype=torch.int64)
    )  # fmt: skip
    tail = xspec.TailResult(words[3], new(1, _ROWS, dtype=torch.int32))
    tokens, root = new(_ROWS, dtype=torch.int64), new(1, dtype=torch.int64)
    xspec.adapter_tail(
        network("TokenAdapter"), feed, tail, tokens, root, words[4], round_to=DTYPE,
        backend="triton",
    )  # fmt: skip


def _run_states(level: str) -> None:
    xspec.adapter_forward(
        network(level), new(_ROWS, SHORT.state_width), new(1, dtype=torch.int32), round_to=DTYPE,
        backend="triton",
    )  # fmt: skip


def calls() -> dict[str, tuple[tuple[str | None, ...], Callable[[], None]]]:
    """Network -> (names of the launches, the call that makes them); a head of the target's own is
    that of its model.
    """
    found = {"TokenAdapter": (_TOKEN, _run_tokens)}
    for level, names in _STATES.items():
        found[level] = ((*names, None, None), lambda level=level: _run_states(level))
    return found
