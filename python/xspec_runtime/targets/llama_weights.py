"""Weights of the Llama family as `LlamaTarget` wants them: checked, fused, one tuple a layer.

They come from a loaded transformers model or straight from safetensors files. q, k and v become one
matrix by rows; gate and up become one with rows gate_0, up_0, gate_1, ..., so that one product ends
in SiLU(gate) * up without a second pass. All other matrices are used as they are. Matrices in NF4
(modules of `nf4_model`, or files that bitsandbytes wrote) stay in NF4.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from xspec_kernels import NF4Weight, interleave_gate, nf4

from ..nf4_model import NF4Linear
from .checkpoint import Shards, read_config

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
ROPE_TYPES = ("default", "llama3")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Matrix = torch.Tensor | NF4Weight


@dataclass(frozen=True, slots=True)
class LlamaShape:
    """Sizes of a model; `vocab` rows of the embedding, `eps` of its norms."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    eps: float
    qk_norm: bool

    @classmethod
    def of(cls, config: PreTrainedConfig) -> LlamaShape:
        """The sizes in a text configuration.

        Raises:
            ValueError: another family, or a feature that `LlamaTarget` has not; the message names
                it.
        """
        _check_supported(config)
        head_dim = getattr(config, "head_dim", None)
        shape = cls(
            config.num_hidden_layers,
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            head_dim or config.hidden_size // config.num_attention_heads,
            config.intermediate_size,
            config.vocab_size,
            config.rms_norm_eps,
            config.model_type == "qwen3",
        )
        widths = (shape.hidden, shape.intermediate, shape.qkv[0])
        if any(width % 64 for width in widths):
            raise ValueError(
                "LlamaTarget: hidden, intermediate and attention width are "
                f"{', '.join(map(str, widths))}, expected multiples of 64"
            )
        return shape

    @property
    def qkv(self) -> tuple[int, int, int]:
        """Rows of q, k and v in the fused matrix."""
        kv = self.kv_heads * self.head_dim
        return self.heads * self.head_dim, kv, kv


class Layer(NamedTuple):
    """One decoder layer; matrices are ``[out, in]``, absent parts None."""

    input_norm: torch.Tensor
    qkv: Matrix
    qkv_bias: torch.Tensor | None
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    o: Matrix
    o_bias: torch.Tensor | None
    mlp_norm: torch.Tensor
    gate_up: Matrix
    down: Matrix


@dataclass(frozen=True, slots=True)
class LlamaWeights:
    """A model without its towers.

    Attributes:
        config: the text configuration.
        embed, head: ``[V, D]``; the same tensor where they are tied.
        norm: ``[D]``, before the head.
    """

    config: PreTrainedConfig
    shape: LlamaShape
    embed: torch.Tensor
    layers: list[Layer]
    norm: torch.Tensor
    head: torch.Tensor

    @classmethod
    def of(cls, model: PreTrainedModel, share: bool = False) -> LlamaWeights:
        """The weights of a loaded model.

        Args:
            share: let the model's own q, k, v, gate and up be views of the fused matrices. It works
                as before, possibly slower, and nothing is held twice. NF4 matrices are not shared.

        Raises:
            ValueError: the model is of another family, quantized in a way other than `NF4Linear`,
                or not in one floating dtype.
        """
        packed = {
            f"{name}.weight": module.weight
            for name, module in model.named_modules()
            if isinstance(module, NF4Linear)
        }
        if getattr(model.config, "quantization_config", None) and not packed:
            raise ValueError(
                f"{type(model).__name__} is quantized, expected plain weights or `NF4Linear` "
                "(`replace_linear4bit`)"
            )

        def replace(name: str, view: torch.Tensor) -> None:
            if name not in packed:
                model.get_parameter(name).data = view

        tensors = {**dict(model.named_parameters(remove_duplicate=False)), **packed}
        swap = replace if share else None
        return _assemble(model.config, tensors, model.device, model.dtype, swap)

    @classmethod
    def load(
        cls,
        directory: str | Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
    ) -> LlamaWeights:
        """Read `config.json` and the safetensors files of a directory; no model is built.

        Args:
            dtype: of the weights; by default the one that the embedding is stored in.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: the configuration is not supported, or a tensor has another shape than it
                says.
            RuntimeError: a file is damaged or a tensor is missing.
        """
        directory = Path(directory)
        config = read_config(directory)
        return _assemble(config, Shards(directory), torch.device(device), dtype)


def inverse_frequencies(config: PreTrainedConfig, head_dim: int) -> torch.Tensor:
    """Of the rotary embedding, float32 ``[D / 2]``."""
    rope = config.rope_parameters
    if rope["rope_type"] == "default":
        return 1.0 / rope["rope_theta"] ** (torch.arange(0, head_dim, 2).float() / head_dim)
    return ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"))[0]


def _check_supported(config: PreTrainedConfig) -> None:
    """Raise `ValueError` naming the first thing that this decoder does not do."""

    def refuse(what: str, expected: str) -> None:
        raise ValueError(f"LlamaTarget: {what}, expected {expected}")

    if config.model_type not in FAMILIES:
        refuse(f"model_type {config.model_type!r}", " or ".join(FAMILIES))
    kinds = {*(getattr(config, "layer_types", None) or [])} - {"full_attention"}
    if kinds or getattr(config, "sliding_window", None):
        refuse(f"{sorted(kinds) or 'a sliding window'}", "full attention in every layer")
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") not in ROPE_TYPES:
        refuse(f"rope_type {rope.get('rope_type')!r}", " or ".join(ROPE_TYPES))
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        refuse(f"partial_rotary_factor {rope['partial_rotary_factor']}", "whole heads rotated")
    if config.hidden_act != "silu":
        refuse(f"hidden_act {config.hidden_act!r}", "silu")
    if getattr(config, "mlp_bias", False):
        refuse("mlp_bias", "an MLP without bias")


class _Reader:
    """Takes tensors from `source` by name, checks their shapes, brings them to device and dtype."""

    def __init__(
        self,
        source: Mapping[str, Matrix],
        shape: LlamaShape,
        device: torch.device,
        dtype: torch.dtype | None,
    ) -> None:
        places = [name for name in source if name.endswith("embed_tokens.weight")]
        if len(places) != 1:
            raise ValueError(f"expected one embed_tokens.weight among the weights, got {places}")
        self.source, self.device, self.dtype = source, device, dtype
        self.prefix = places[0].removesuffix("embed_tokens.weight")
        self.embed = self.take("embed_tokens.weight", shape.vocab, shape.hidden)
        self.dtype = self.embed.dtype
        if self.dtype not in DTYPES:
            raise ValueError(f"weights are {self.dtype}, expected one of {DTYPES}")

    def take(self, name: str, *shape: int) -> torch.Tensor:
        """A tensor of the decoder."""
        return self._whole(self.prefix + name, shape)

    def matrix(self, name: str, *shape: int) -> Matrix:
        """As `take`; NF4 stays NF4."""
        name = self.prefix + name
        if f"{name}.quant_state.bitsandbytes__nf4" in self.source:
            found = nf4.from_tensors(self.source, name)
        else:
            found = self.source.get(name)
        if not isinstance(found, NF4Weight):
            return self._whole(name, shape)
        if found.shape != shape:
            raise ValueError(f"weight {name} is {list(found.shape)}, expected {list(shape)}")
        return found.to(self.device)

    def maybe(self, name: str, *shape: int) -> torch.Tensor | None:
        """As `take`; None where there is none."""
        return self.take(name, *shape) if self.prefix + name in self.source else None

    def head(self, tied: bool) -> torch.Tensor:
        """The matrix of the head."""
        names = [name for name in self.source if name.endswith("lm_head.weight")]
        return self.embed if tied else self._whole((*names, "lm_head.weight")[0], self.embed.shape)

    def _whole(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if name not in self.source:
            raise ValueError(f"weight {name} is missing")
        tensor = self.source[name]
        if tensor.shape != shape:
            raise ValueError(f"weight {name} is {list(tensor.shape)}, expected {list(shape)}")
        return tensor.detach().to(self.device, self.dtype).contiguous()


@torch.no_grad()
def _assemble(
    config: PreTrainedConfig,
    source: Mapping[str, Matrix],
    device: torch.device,
    dtype: torch.dtype | None,
    replace: Callable[[str, torch.Tensor], None] | None = None,
) -> LlamaWeights:
    """Checks first, then the layers one by one; `replace` takes the parts of fused matrices."""
    text = config.get_text_config()
    shape = LlamaShape.of(text)
    read = _Reader(source, shape, device, dtype)
    layers = []
    for i in range(shape.layers):
        layer = _layer(read, shape, f"layers.{i}.")
        layers.append(layer)
        if replace and isinstance(layer.qkv, torch.Tensor):
            prefix = f"{read.prefix}layers.{i}."
            parts = (*layer.qkv.split(shape.qkv), layer.gate_up[::2], layer.gate_up[1::2])
            for name, part in zip(_FUSED, parts, strict=True):
                replace(f"{prefix}{name}.weight", part)
    norm = read.take("norm.weight", shape.hidden)
    return LlamaWeights(
        text, shape, read.embed, layers, norm, read.head(config.tie_word_embeddings)
    )


_FUSED = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj",
)  # fmt: skip


def _layer(read: _Reader, shape: LlamaShape, prefix: str) -> Layer:
    width, inner, head_dim = shape.hidden, shape.intermediate, shape.head_dim
    rows = (*shape.qkv, inner, inner)
    sized = list(zip(_FUSED, rows, strict=True))
    *qkv, gate, up = (read.matrix(f"{prefix}{name}.weight", size, width) for name, size in sized)
    biases = [read.maybe(f"{prefix}{name}.bias", size) for name, size in sized[:3]]
    norms = [None, None]
    if shape.qk_norm:
        norms = [read.take(f"{prefix}self_attn.{part}_norm.weight", head_dim) for part in "qk"]
    return Layer(
        read.take(f"{prefix}input_layernorm.weight", width),
        _joined(qkv, torch.cat, nf4.cat),
        None if biases[0] is None else torch.cat(biases),
        *norms,
        read.matrix(f"{prefix}self_attn.o_proj.weight", width, shape.qkv[0]),
        read.maybe(f"{prefix}self_attn.o_proj.bias", width),
        read.take(f"{prefix}post_attention_layernorm.weight", width),
        _joined(
            (gate, up), lambda pair: interleave_gate(*pair), lambda pair: nf4.interleave(*pair)
        ),
        read.matrix(f"{prefix}mlp.down_proj.weight", width, inner),
    )


def _joined(
    parts: Sequence[Matrix], plain: Callable[..., torch.Tensor], packed: Callable[..., NF4Weight]
) -> Matrix:
    """One matrix of several that are all plain or all NF4."""
    quantized = [isinstance(part, NF4Weight) for part in parts]
    if any(quantized) and not all(quantized):
        raise ValueError("some of q, k, v or of gate and up are in NF4, expected all or none")
    return packed(parts) if all(quantized) else plain(parts)
