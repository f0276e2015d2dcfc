"""Fixtures and oracles that the tests of skinny_linear and lm_head_argmax share."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from xspec_kernels.kernels import lm_head_argmax as head_module
from xspec_kernels.kernels import skinny_linear as linear_module
from xspec_kernels.kernels._row_norm import RowNorm
from xspec_kernels.tiles import Tile

MODULES = (linear_module, head_module)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPILOGUES = ["none", "bias", "residual", "bias+residual", "gate", "bias+gate"]


def operands(M: int, N: int, K: int, dtype: torch.dtype, device: str = "cpu"):
    """x [M, K] and w [N, K] with products of about unit size."""
    x = torch.randn(M, K).to(device, dtype)
    return x, (torch.randn(N, K) / K**0.5).to(device, dtype)


def epilogue(name: str, M: int, N: int, dtype: torch.dtype, device: str = "cpu") -> dict[str, Any]:
    """Keyword arguments of skinny_linear."""
    given: dict[str, Any] = {}
    if "bias" in name:
        given["bias"] = torch.randn(N).to(device, dtype)
    if "residual" in name:
        given["residual"] = torch.randn(M, N).to(device, dtype)
    if "gate" in name:
        given["gate"] = True
    return given


EPS = 1e-5


def row_norm(x: torch.Tensor, parts: int | None) -> RowNorm:
    """A norm of x with random weights, and the squares as a maker with so many tiles leaves them;
    with None the kernel sums them."""
    weight = torch.randn(x.shape[1]).to(x)
    if parts is None:
        return RowNorm(weight, EPS)
    pieces = [piece.float().square().sum(1) for piece in x.tensor_split(parts, 1)]
    return RowNorm(weight, EPS, torch.stack(pieces))


def flips(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """What each element of x W^T may change by where two elements of x are rounded the other way,
    since the sum of a row's squares was taken in another order, [M, N]."""
    ulp = 0 if x.dtype == torch.float32 else torch.finfo(x.dtype).eps
    x, w = x.nan_to_num().abs().float(), w.abs().float()
    return 2 * ulp * (x[:, None] * w[None]).amax(2).double()


def oracle(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    gate: bool = False,
) -> torch.Tensor:
    """The same in float64, rounded once."""
    y = x.double() @ w.double().T
    if bias is not None:
        y = y + bias.double()
    if gate:
        y = y[:, 0::2] / (1 + (-y[:, 0::2]).exp()) * y[:, 1::2]
    return y if residual is None else y + residual.double()


def cut(
    monkeypatch: pytest.MonkeyPatch, block_n: int = 32, split_k: int = 3, tma: bool = False
) -> None:
    """Make both ops use this tile, whatever the shape."""
    tile = Tile(block_n, 64, split_k, 4, 1, tma)
    for module in MODULES:
        monkeypatch.setattr(module, "tile_of", lambda *_: tile)


def arrive(monkeypatch: pytest.MonkeyPatch, order: list[int]) -> None:
    """Run the splits of every tile in this order instead of ascending."""
    from triton.runtime.interpreter import interpreter_builder

    original = type(interpreter_builder).set_grid_idx

    def permuted(x: int, y: int, z: int) -> None:
        splits = interpreter_builder.grid_dim[1]
        original(interpreter_builder, x, order[y] if splits == len(order) else y, z)

    monkeypatch.setattr(interpreter_builder, "set_grid_idx", permuted)


def mutant(function: Any, old: str, new: str, folder: Path) -> Any:
    """The Triton function with one piece of its source replaced."""
    source = inspect.getsource(function.fn)
    assert source.count(old) == 1, f"{old!r} occurs {source.count(old)} times"
    file = folder / "mutant.py"
    header = "from xspec_kernels._triton import jit, tl, triton\n" + "".join(
        f"from xspec_kernels.kernels.{name} import *\n" for name in ("_product", "_row_norm")
    )
    file.write_text(header + source.replace(old, new))
    spec = importlib.util.spec_from_file_location("mutant", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, function.fn.__name__)


def plant(monkeypatch: pytest.MonkeyPatch, name: str, old: str, new: str, folder: Path) -> None:
    """Replace the Triton function `name` by a mutant in both ops."""
    for module in MODULES:
        if hasattr(module, name):
            changed = mutant(getattr(module, name), old, new, folder)
            monkeypatch.setattr(module, name, changed)


def rejected(check: Callable[[], None]) -> bool:
    """Whether `check` finds fault."""
    try:
        check()
    except AssertionError:
        return True
    return False
