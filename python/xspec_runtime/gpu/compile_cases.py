"""The kernels of the verify path as a decoder of a given model launches them.

Ops are called on empty tensors and their launches recorded, so that what is compiled is what the
JIT would compile: types, constants and options are those of the launchers themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

import xspec_kernels as xspec

from .machine_code import Source, recorded, source_of

ARCHS = (80, 86, 89, 90, 100)
_DTYPE = torch.bfloat16
_ROWS, _SLOTS = 22, 4096


class Model(NamedTuple):
    """The shape of a model of the Llama family."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    layers: int


MODELS = {
    "Llama-7B": Model(4096, 32, 32, 128, 11008, 32000, 32),
    "Llama-3-8B": Model(4096, 32, 8, 128, 14336, 128256, 32),
    "SmolLM2-135M": Model(576, 9, 3, 64, 1536, 49152, 30),
}


def _new(*shape: int, dtype: torch.dtype = _DTYPE) -> torch.Tensor:
    # Never written nor read, so a weight of a gigabyte takes no memory.
    return torch.empty(shape, dtype=dtype)


def _attention(model: Model) -> None:
    cache = _new(1, model.kv_heads, _SLOTS, model.head_dim)
    xspec.tree_attention(
        _new(1, _ROWS, model.heads, model.head_dim), cache, cache,
        _new(1, _ROWS, dtype=torch.int32), _new(1, _ROWS, 32, dtype=torch.int32),
        _new(1, dtype=torch.int32), backend="triton",
    )  # fmt: skip


def _linear(out: int, width: int, **options: bool) -> None:
    residual = _new(_ROWS, out) if options.pop("residual", False) else None
    bias = _new(out) if options.pop("bias", False) else None
    xspec.skinny_linear(
        _new(_ROWS, width), _new(out, width), residual=residual, bias=bias, backend="triton",
        **options,
    )  # fmt: skip


def _rope(model: Model) -> None:
    width = (model.heads + 2 * model.kv_heads) * model.head_dim
    table = _new(_SLOTS, model.head_dim)
    cache = _new(1, model.kv_heads, _SLOTS, model.head_dim)
    xspec.rope_append(
        _new(_ROWS, width), table, table, _new(1, _ROWS, dtype=torch.int32),
        _new(1, dtype=torch.int32), cache, cache, backend="triton",
    )  # fmt: skip


def _tail(model: Model) -> None:
    wide, narrow = _new(1, _ROWS, dtype=torch.int64), _new(1, _ROWS, dtype=torch.int32)
    one = _new(1, dtype=torch.int64)
    shape = (1, model.kv_heads, _SLOTS, model.head_dim)
    xspec.verify_tail(
        wide, narrow, wide, narrow, wide, [_new(*shape) for _ in range(2)],
        _new(1, dtype=torch.int32), one, one, _new(1, xspec.TOKENS + _ROWS, dtype=torch.int64),
        max_new=_new(1, dtype=torch.int32), backend="triton",
    )  # fmt: skip


def _calls(model: Model) -> list[tuple[tuple[str, ...], Callable[[], object]]]:
    """(names of the kernels that the call launches, the call), in the order of a forward pass."""
    width, inner = model.heads * model.head_dim, model.intermediate
    qkv = width + 2 * model.kv_heads * model.head_dim
    x, weight = _new(_ROWS, model.hidden), _new(model.hidden)
    ids = _new(_ROWS, dtype=torch.int64)
    head = _new(model.vocab, model.hidden)
    return [
        (("embed",), lambda: xspec.embed(ids, head, backend="triton")),
        (("norm_act",), lambda: xspec.norm_act(x, weight, 1e-5, backend="triton")),
        (
            ("norm_act_residual",),
            lambda: xspec.norm_act(x, weight, 1e-5, residual=x, backend="triton"),
        ),
        (("qkv",), lambda: _linear(qkv, model.hidden)),
        (("rope_append",), lambda: _rope(model)),
        (("tree_attention", "attention_merge"), lambda: _attention(model)),
        (("o",), lambda: _linear(model.hidden, width, residual=True)),
        (("gate_up",), lambda: _linear(2 * inner, model.hidden, gate=True)),
        (("down",), lambda: _linear(model.hidden, inner, residual=True)),
        (
            ("lm_head", "lm_head_join"),
            lambda: xspec.lm_head_argmax(x, head, round_to=_DTYPE, backend="triton"),
        ),
        (("accept", "commit"), lambda: _tail(model)),
    ]


class Case(NamedTuple):
    """One kernel of one model on one card; `rows` are those that one program computes."""

    kernel: str
    model: str
    arch: int
    rows: int
    source: Source

    @property
    def name(self) -> str:
        return f"{self.kernel} {self.model} sm_{self.arch}"


def cases(models: Iterable[str] = tuple(MODELS), archs: Iterable[int] = ARCHS) -> list[Case]:
    """Every kernel of the verify path, not compiled yet.

    Raises:
        RuntimeError: Triton is missing, or runs as an interpreter.
    """
    found = []
    for arch in archs:
        for model in models:
            names: list[str] = []
            with recorded(arch) as launches:
                for kernels, call in _calls(MODELS[model]):
                    call()
                    names += kernels
            for name, launch in zip(names, launches, strict=True):
                source = source_of(launch, arch)
                sizes = (source.constants.get(size) for size in ("BM", "RB", "NODES"))
                rows = next((size for size in sizes if size), 1)
                found.append(Case(name, model, arch, rows, source))
    return found
