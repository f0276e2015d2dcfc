"""The kernels of the verify path as a decoder of a given model launches them.

Ops are called on empty tensors and their launches recorded, so that what is compiled is what the
JIT would compile: types, constants and options are those of the launchers themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

import xspec_kernels as xspec
from xspec_kernels import nf4, tiles

from . import compile_adapters
from .machine_code import Launch, Source, recorded, source_of

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


# Whose products are compiled for NF4 weights too.
IN_NF4 = ("Llama-7B",)


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


class Products:
    """The products of a layer, with the norms and residuals that belong to them.

    Args:
        arch: the card, whose tiles say how many squares a row has.
        packed: weights in NF4.
    """

    def __init__(self, model: Model, arch: int, packed: bool) -> None:
        self.width, self.hidden = model.heads * model.head_dim, model.hidden
        self.wide = self.width + 2 * model.kv_heads * model.head_dim
        self.inner, self.arch, self.packed = model.intermediate, arch, packed

    def first_qkv(self) -> None:
        """Of the first layer: nobody has left squares."""
        self._run(self.wide, self.hidden, norm=self._norm())

    def qkv(self) -> None:
        self._run(self.wide, self.hidden, norm=self._norm(self.inner))

    def o(self) -> None:
        self._run(self.hidden, self.width, residual=_new(_ROWS, self.hidden), with_squares=True)

    def gate_up(self) -> None:
        self._run(2 * self.inner, self.hidden, norm=self._norm(self.width), gate=True)

    def down(self) -> None:
        self._run(self.hidden, self.inner, residual=_new(_ROWS, self.hidden), with_squares=True)

    def _norm(self, maker: int | None = None) -> xspec.RowNorm:
        """Of rows that a weight [hidden, maker] made."""
        squares = None
        if maker is not None:
            cut = tiles.nf4_tile_of if self.packed else tiles.tile_of
            tile = cut(self.hidden, maker, _DTYPE, self.arch)
            squares = _new(-(-self.hidden // tile.block_n), _ROWS, dtype=torch.float32)
        return xspec.RowNorm(_new(self.hidden), 1e-5, squares)

    def _run(self, out: int, width: int, **options: Any) -> None:
        x, options["backend"] = _new(_ROWS, width), "triton"
        if self.packed:
            xspec.nf4_linear(x, _nf4(out, width, 2 if "gate" in options else 1), **options)
        else:
            xspec.skinny_linear(x, _new(out, width), **options)


def _nf4(out: int, width: int, parts: int) -> xspec.NF4Weight:
    """A weight with quantized scales, of `parts` interleaved matrices."""
    blocks = width // nf4.BLOCK
    groups = parts * -(-(out // parts) * blocks // nf4.GROUP)
    code, levels = (_new(*shape, dtype=torch.float32) for shape in ((256,), (2, groups)))
    words, scales = (_new(out, size, dtype=torch.uint8) for size in (width // 2, blocks))
    return xspec.NF4Weight(words, scales, _DTYPE, nf4.Nested(code, levels, parts))


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


def _calls(
    model: Model, arch: int, quantized: bool
) -> list[tuple[tuple[str, ...], Callable[[], object]]]:
    """(names of the kernels that the call launches, the call), in the order of a forward pass; the
    NF4 forms of its products where `quantized`.
    """
    plain, packed = (Products(model, arch, packed) for packed in (False, True))
    names = ("qkv", "o", "gate_up", "down")
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
        (("row_squares", "first_qkv"), plain.first_qkv),
        (("qkv",), plain.qkv),
        (("rope_append",), lambda: _rope(model)),
        (("tree_attention", "attention_merge"), lambda: _attention(model)),
        (("o",), plain.o),
        (("gate_up",), plain.gate_up),
        (("down",), plain.down),
        *(((f"nf4_{name}",), getattr(packed, name)) for name in names if quantized),
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


def cases(
    models: Iterable[str] = (*MODELS, *compile_adapters.calls()), archs: Iterable[int] = ARCHS
) -> list[Case]:
    """Every kernel of the verify path and of the adapters behind it, not compiled yet.

    Raises:
        RuntimeError: Triton is missing, or runs as an interpreter.
    """
    found = []
    for arch in archs:
        for model in models:
            wanted = (
                [compile_adapters.calls()[model]]
                if model not in MODELS
                else _calls(MODELS[model], arch, model in IN_NF4)
            )
            names: list[str | None] = []
            with recorded(arch) as launches:
                for kernels, call in wanted:
                    call()
                    names += kernels
            pairs = zip(names, launches, strict=True)
            found += [_case(name, model, arch, launch) for name, launch in pairs if name]
    return found


def _case(name: str, model: str, arch: int, launch: Launch) -> Case:
    source = source_of(launch, arch)
    sizes = (source.constants.get(size) for size in ("BM", "RB", "NODES"))
    rows = next((size for size in sizes if size), 1)
    return Case(name, model, arch, rows, source)
