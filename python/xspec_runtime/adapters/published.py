"""Checkpoints of the research, read into our adapters: pickles of tensors and plain values only."""

from __future__ import annotations

from pathlib import Path

import torch

from ..files import existing_file
from .hidden import HiddenAdapter, HiddenAdapterConfig
from .token_adapter import TokenAdapter, TokenAdapterConfig

# Published type -> our level. B1 was saved as L5_EAGLE: only the name of its folder tells.
TYPES = {
    "L2_MultiLayerBottleneck": "L2",
    "L3_WideBottleneck": "L3",
    "L4_Attention": "L4",
    "L5_EAGLE": "L5",
    "L5F_FusedEAGLE": "L5F",
}
_SIZES = {
    "hidden_dim": "width",
    "bottleneck_dim": "bottleneck",
    "num_blocks": "blocks",
    "num_heads": "heads",
    "ffn_dim": "intermediate",
    "num_layers": "layers",
}


def read_published(path: Path) -> HiddenAdapter | TokenAdapter:
    """The adapter in a published ``.pt`` file, on the CPU, in evaluation mode.

    Tensors are taken in the order of the modules, which is the same in both; every shape is
    compared.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is L1's (whose configuration is a pickled class), of an unknown type, or its
            tensors do not fit.
        RuntimeError: it is no file of tensors and plain values.
    """
    existing_file(path, "checkpoint")
    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        if "HiddenAdapterConfig" in str(error):
            raise ValueError(
                f"{path} holds its configuration as a pickled class (the published L1 does), which "
                "is not read: save its model_state_dict by itself where it was made"
            ) from None
        raise RuntimeError(f"{path} is no file of tensors and plain values: {reason}") from None
    state = values.get("model_state_dict") if isinstance(values, dict) else None
    if not isinstance(state, dict) or not all(torch.is_tensor(v) for v in state.values()):
        raise ValueError(f"{path} has no model_state_dict of tensors")
    kind = values.get("adapter_type")
    if kind is None and any("embed" in name for name in state):
        return _filled(path, _token_adapter(path, state), state)
    if kind not in TYPES:
        raise ValueError(f"{path}: adapter_type must be one of {', '.join(TYPES)}, got {kind!r}")
    level = "B1" if TYPES[kind] == "L5" and "b1" in str(path).lower() else TYPES[kind]
    given = values.get("config") or {}
    sizes = {ours: given[theirs] for theirs, ours in _SIZES.items() if theirs in given}
    if "width" in sizes:
        sizes["draft_width"] = sizes["width"]
    return _filled(path, HiddenAdapter(HiddenAdapterConfig(level, **sizes)), state)


def _token_adapter(path: Path, state: dict[str, torch.Tensor]) -> TokenAdapter:
    """The published TokenAdapter; its file stores no configuration, so the shapes tell it."""
    tables = [value for value in state.values() if value.dim() == 2]
    inner = [name for name in state if name.endswith("linear1.weight")]
    if len(tables) < 2 or not inner:
        raise ValueError(f"{path} holds no TokenAdapter: no embeddings or no transformer layers")
    (vocab_size, width), positions = tables[0].shape, tables[1].shape[0]
    return TokenAdapter(
        TokenAdapterConfig(
            vocab_size,
            width,
            layers=len(inner),
            intermediate=state[inner[0]].shape[0],
            positions=positions,
            token_bias="token_bias" in state,
        )
    )


def _filled(
    path: Path, adapter: HiddenAdapter | TokenAdapter, state: dict[str, torch.Tensor]
) -> HiddenAdapter | TokenAdapter:
    own = adapter.state_dict()
    # As long as the head's bias: of these two the name tells.
    state = dict(sorted(state.items(), key=lambda item: item[0] == "token_bias"))
    own = dict(sorted(own.items(), key=lambda item: item[0] == "token_bias"))
    wanted, found = ([tuple(v.shape) for v in s.values()] for s in (own, state))
    if sorted(wanted) != sorted(found):
        raise ValueError(
            f"{path} holds {len(found)} tensors with {sum(map(_size, found)):,} values, expected "
            f"{len(wanted)} with {sum(map(_size, wanted)):,}"
        )
    # Modules were registered in another order in places: among tensors of one shape the order
    # is kept, and no other choice has the same shapes.
    waiting = {shape: [v for v in state.values() if tuple(v.shape) == shape] for shape in found}
    filled = {name: waiting[tuple(value.shape)].pop(0) for name, value in own.items()}
    adapter.load_state_dict({name: value.to(own[name].dtype) for name, value in filled.items()})
    return adapter.eval().requires_grad_(False)


def _size(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
