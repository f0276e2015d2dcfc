"""A folder that bitsandbytes and transformers wrote, as a transformers model without bitsandbytes.

Packed weights become `NF4Linear` modules as they lie in the files; nothing is converted, and the
float matrices that they stand for are never made.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.initialization import no_init_weights

from xspec_kernels import nf4

from .files import read_json
from .nf4_model import NF4Linear
from .targets.checkpoint import Shards, read_config


def is_nf4(directory: str | Path) -> bool:
    """Whether `config.json` there says that the weights are in bitsandbytes' NF4.

    Raises:
        FileNotFoundError, ValueError: as `load_nf4`.
    """
    path = Path(directory) / "config.json"
    read_config(path.parent)
    return bool(read_json(path).get("quantization_config"))


def load_nf4(
    directory: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> PreTrainedModel:
    """The model in `directory`: `config.json` and safetensors, in one file or in shards.

    Args:
        dtype: of everything that is not packed, and of products. By default what is not packed has
            the configuration's dtype, and products are computed in `bnb_4bit_compute_dtype`.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the weights are not in NF4, the architecture is not one of transformers', a
            weight is damaged or of another shape than the configuration says, or the files hold
            other tensors than the model; the message names them.
        RuntimeError: a safetensors file is damaged.
    """
    directory = Path(directory)
    config, compute_dtype = _configuration(directory)
    tensors = Shards(directory)
    kind = _model_class(config)
    # What this leaves uninitialized is replaced below, every part of it.
    with no_init_weights():
        model = kind._from_config(config, dtype=dtype or config.dtype or torch.float32)
    names = _module_names(model, tensors)
    packed = [name for name in tensors if nf4.is_packed(tensors, name)]
    if not packed:
        raise ValueError(f"{directory} holds no weight in NF4")
    floats = {
        ours: tensors[theirs]
        for theirs, ours in names.items()
        if not any(theirs == name or theirs.startswith(f"{name}.") for name in packed)
    }
    for name in packed:
        _put(model, names[name], name, tensors, dtype or compute_dtype)
    _fill(model, floats, directory)
    if (directory / "generation_config.json").is_file() and model.can_generate():
        model.generation_config = GenerationConfig.from_pretrained(directory)
    return model.eval().to(device).requires_grad_(False)


def _configuration(directory: Path) -> tuple[PreTrainedConfig, torch.dtype | None]:
    """The configuration without quantization, and the dtype of products."""
    config = read_config(directory)
    quantized = getattr(config, "quantization_config", None)
    if not quantized:
        raise ValueError(f"{directory} has plain weights, expected bitsandbytes' NF4")
    named = str(quantized.get("bnb_4bit_compute_dtype")).removeprefix("torch.")
    dtypes = {str(dtype).removeprefix("torch."): dtype for dtype in nf4.DTYPES}
    del config.quantization_config
    return config, dtypes.get(named)


def _model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class that the configuration names, if it is transformers' own and made for it."""
    named = (config.architectures or [""])[0]
    found = getattr(transformers, named, None) if isinstance(named, str) else None
    made = isinstance(found, type) and issubclass(found, PreTrainedModel)
    if not made or found.config_class is not type(config):
        raise ValueError(
            f"architecture {named!r} is no model of transformers for {type(config).__name__}"
        )
    return found


def _module_names(model: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Name in the files -> name in the model, which transformers writes under older ones."""
    changes = get_model_conversion_mapping(model)
    renamings = [change for change in changes if isinstance(change, WeightRenaming)]
    prefix, known = model.base_model_prefix, dict(model.state_dict())
    return {name: rename_source_key(name, renamings, [], prefix, known)[0] for name in tensors}


def _put(
    model: PreTrainedModel,
    ours: str,
    theirs: str,
    tensors: Mapping[str, torch.Tensor],
    compute_dtype: torch.dtype | None,
) -> None:
    """An `NF4Linear` in the place of a linear layer, whose bias is still to be filled in."""
    path = ours.removesuffix(".weight")
    try:
        linear = model.get_submodule(path)
    except AttributeError:
        linear = None
    if not isinstance(linear, nn.Linear):
        raise ValueError(f"{theirs} is in NF4, but {type(model).__name__} has no such linear layer")
    weight = nf4.from_tensors(tensors, theirs)
    if weight.shape != linear.weight.shape:
        raise ValueError(
            f"weight {theirs} is {list(weight.shape)}, expected {list(linear.weight.shape)}"
        )
    model.set_submodule(path, NF4Linear(weight, linear.bias, compute_dtype))


def _fill(model: PreTrainedModel, floats: dict[str, torch.Tensor], directory: Path) -> None:
    """Everything that is not packed, in the place of what the model was made with."""
    # Tied weights are one tensor before and after, so one that is stored is enough.
    model.tie_weights()
    expected = model.state_dict()
    wrong = [
        f"weight {name} is {list(tensor.shape)}, expected {list(expected[name].shape)}"
        for name, tensor in floats.items()
        if name in expected and tensor.shape != expected[name].shape
    ]
    if wrong:
        raise ValueError(wrong[0])
    given = {expected[name].data_ptr() for name in floats if name in expected}
    missing = [name for name, tensor in expected.items() if tensor.data_ptr() not in given]
    extra = [name for name in floats if name not in expected]
    if missing or extra:
        raise ValueError(
            f"{directory} does not fit {type(model).__name__}: missing {missing[:3]}, "
            f"unexpected {extra[:3]}"
        )
    model.load_state_dict(floats, strict=False)
