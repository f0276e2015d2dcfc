"""Adapters on disk: a folder with `config.json` and half-precision `model.safetensors`."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..files import replace_file, write_json
from .base import Adapter, AdapterConfig
from .eagle import EagleConfig, EagleFusion
from .hidden import HiddenAdapter, HiddenAdapterConfig
from .prefix_adapter import PrefixAdapter, PrefixAdapterConfig
from .token_adapter import TokenAdapter, TokenAdapterConfig

FORMAT = "xspec.adapter/1"
KINDS: dict[str, tuple[type[AdapterConfig] | type[HiddenAdapterConfig], type]] = {
    TokenAdapter.kind: (TokenAdapterConfig, TokenAdapter),
    PrefixAdapter.kind: (PrefixAdapterConfig, PrefixAdapter),
    HiddenAdapter.kind: (HiddenAdapterConfig, HiddenAdapter),
    EagleFusion.kind: (EagleConfig, EagleFusion),
}


def save_adapter(adapter: Adapter | HiddenAdapter | EagleFusion, folder: Path) -> None:
    """Write `adapter` to `folder`, each file in one step."""
    state = {key: value.half().contiguous() for key, value in adapter.state_dict().items()}
    replace_file(folder / "model.safetensors", lambda path: save_file(state, path))
    header = {"format": FORMAT, "kind": adapter.kind}
    write_json(folder / "config.json", {**header, **asdict(adapter.config)})


def load_adapter(
    folder: Path,
    vocab_size: int | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Adapter | HiddenAdapter | EagleFusion:
    """An adapter ready for inference.

    Args:
        vocab_size: of the target it will draft for; checked where given and where the adapter has
            one, which those that end in target states have not.

    Raises:
        FileNotFoundError: a file of the folder is missing.
        ValueError: the configuration is none of an adapter, or is for another vocabulary.
        RuntimeError: the weights are damaged, not finite, or of another adapter.
    """
    folder = Path(folder)
    adapter = _untrained(folder / "config.json", vocab_size)
    path = _existing(folder / "model.safetensors")
    try:
        state = load_file(path)
    except (SafetensorError, OSError) as error:
        raise RuntimeError(f"{path} is not a readable safetensors file: {error}") from None
    expected = {key: tuple(value.shape) for key, value in adapter.state_dict().items()}
    found = {key: tuple(value.shape) for key, value in state.items()}
    if found != expected:
        odd = sorted(key for key in found | expected if found.get(key) != expected.get(key))
        raise RuntimeError(
            f"{path} does not fit {folder / 'config.json'}: {odd[0]} is {found.get(odd[0])}, "
            f"expected {expected.get(odd[0])} ({len(odd)} such tensors)"
        )
    for key, value in state.items():
        if not (value.is_floating_point() and value.isfinite().all()):
            raise RuntimeError(f"{path}: {key} holds values that are not finite numbers")
    adapter.load_state_dict(state, assign=True)
    return adapter.to(device, dtype).eval().requires_grad_(False)


def adapter_config(
    folder: Path, vocab_size: int | None = None
) -> AdapterConfig | HiddenAdapterConfig:
    """Sizes of the adapter in a folder; arguments and errors as of `load_adapter`."""
    return _untrained(folder / "config.json", vocab_size).config


def _untrained(path: Path, vocab_size: int | None) -> torch.nn.Module:
    """The network that the configuration at `path` describes, without memory for its weights."""
    try:
        values = json.loads(_existing(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    values = values if isinstance(values, dict) else {}
    header, kind = values.pop("format", None), values.pop("kind", None)
    if header != FORMAT or not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(
            f"{path} must name format {FORMAT!r} and a kind of {', '.join(KINDS)}, got "
            f"{header!r} and {kind!r}"
        )
    config_class, network = KINDS[kind]
    names = {field.name for field in fields(config_class)}
    # A flag that a file does not know is off.
    values = {f.name: False for f in fields(config_class) if f.default is False} | values
    if set(values) != names:
        raise ValueError(
            f"{path}: expected exactly the values {sorted(names)}, these differ: "
            f"{sorted(names ^ set(values))}"
        )
    try:
        config = config_class(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
    if vocab_size not in (None, getattr(config, "vocab_size", vocab_size)):
        raise ValueError(
            f"the adapter in {path.parent} is for a vocabulary of {config.vocab_size} tokens, the "
            f"target has {vocab_size}"
        )
    with torch.device("meta"):
        return network(config)


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: the folder holds no adapter")
    return path
