"""A model's directory: `config.json` and safetensors files, neither of them trusted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PreTrainedConfig

from ..files import existing_file, read_json


def read_config(directory: Path) -> PreTrainedConfig:
    """The configuration in `config.json`; no code that it may name is run.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, of no known model type, or for weights quantized in a way other
            than bitsandbytes' NF4.
    """
    path = existing_file(directory / "config.json", "model configuration")
    values = read_json(path)
    if not isinstance(values, dict) or "model_type" not in values:
        raise ValueError(f"{path} names no model_type")
    quantized = values.get("quantization_config")
    nf4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    if quantized and not (isinstance(quantized, dict) and nf4.items() <= quantized.items()):
        raise ValueError(f"{path}: the model is quantized, expected plain weights or NF4")
    try:
        return AutoConfig.for_model(**values)
    except Exception as error:
        raise ValueError(f"{path} is no configuration that transformers knows: {error}") from None


class Shards(Mapping[str, torch.Tensor]):
    """The tensors of `model.safetensors`, or of the files its index names; read when asked for.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the index is damaged.
        RuntimeError: a safetensors file is damaged or lacks a tensor the index puts there.
    """

    def __init__(self, directory: Path) -> None:
        index, whole = (directory / f"model.safetensors{end}" for end in (".index.json", ""))
        if index.is_file():
            self._files = {name: directory / file for name, file in weight_map(index).items()}
        else:
            with _opened(whole) as file:
                self._files = dict.fromkeys(file.keys(), whole)

    def __getitem__(self, name: str) -> torch.Tensor:
        with _opened(self._files[name]) as file:
            if name not in file.keys():  # noqa: SIM118, a safetensors file is no mapping
                raise RuntimeError(f"{self._files[name]} does not hold {name}")
            return file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _opened(path: Path):
    """A safetensors file as a context manager."""
    try:
        return safe_open(existing_file(path, "safetensors weights"), framework="pt")
    except SafetensorError as error:
        raise RuntimeError(f"{path} is not a readable safetensors file: {error}") from None


def weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> file name; one that leaves the directory is refused."""
    content = read_json(index)
    files = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(files, dict) or not files:
        raise ValueError(f"{index} has no weight_map")
    for file in files.values():
        if not isinstance(file, str) or Path(file).name != file:
            raise ValueError(f"{index} names {file!r}, expected a file beside it")
    return files
