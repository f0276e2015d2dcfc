"""Loaded transformers models on `nf4_linear`: bitsandbytes' layers replaced, or floats quantized.

Modules are swapped in place, one for one, so the model's own code, `generate` included, runs as
before. A decoder that wants q, k, v or gate and up in one product takes the modules' weights and
joins them with `nf4.cat` and `nf4.interleave`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from xspec_kernels import MAX_NODES, NF4Weight, exact, nf4, nf4_linear, prefill_linear

__all__ = ["NF4Linear", "quantize_model", "replace_linear4bit"]


class NF4Linear(nn.Module):
    """y = x W^T + bias with W in NF4.

    Args:
        weight: [N, K].
        bias: [N] or None.
        compute_dtype: x is multiplied in this dtype; None for its own. The result has x's.

    Attributes:
        weight: no parameter: it has no gradient and is not in the state dict, follows the module to
            another device and ignores casts to another dtype.
    """

    def __init__(
        self,
        weight: NF4Weight,
        bias: torch.Tensor | None = None,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight, self.compute_dtype = weight, compute_dtype
        self.out_features, self.in_features = weight.shape
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., K] -> [..., N]"""
        if self._whole(x) and not exact():
            return F.linear(x, self.weight.dense, self.bias)
        rows = x.reshape(-1, self.in_features).to(self.compute_dtype or x.dtype).contiguous()
        bias = None if self.bias is None else self.bias.to(rows.dtype)
        few = len(rows) <= MAX_NODES or exact()
        y = (nf4_linear if few else prefill_linear)(rows, self.weight, bias=bias)
        return y.view(*x.shape[:-1], self.out_features).to(x.dtype)

    def _whole(self, x: torch.Tensor) -> bool:
        """Whether torch's own product serves: of a small model, an op's dispatch would take longer
        than its work.
        """
        dense, bias = self.weight.dense, self.bias
        kinds = {x.dtype, self.compute_dtype or x.dtype, x.dtype if bias is None else bias.dtype}
        return dense is not None and not x.is_cuda and kinds == {dense.dtype}

    def keep_dense(self, dtype: torch.dtype | None = None) -> None:
        """Keep the dequantized weights as well, for a CPU that has the memory."""
        self.weight = self.weight.with_dense(dtype)

    def _apply(self, fn, recurse: bool = True) -> NF4Linear:
        super()._apply(fn, recurse)
        device = fn(torch.empty(0, device=self.weight.device)).device
        if device != self.weight.device:
            dense = self.weight.dense
            self.weight = self.weight.to(device)
            if dense is not None:
                self.weight = replace(self.weight, dense=dense.to(device))
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def replace_linear4bit(model: nn.Module) -> list[str]:
    """Put an `NF4Linear` in the place of every Linear4bit of bitsandbytes.

    Call it before the first forward pass: on some CPUs that repacks the weights, with loss. The
    packed weights are used where they lie.

    Returns:
        Names of the modules replaced.

    Raises:
        ValueError: there are none, or one is not NF4 in blocks of 64 (the message names it); the
            model is unchanged then.
    """
    found = {}
    for name, module in model.named_modules():
        if not _is_linear4bit(module):
            continue
        state = getattr(module.weight, "quant_state", None) or getattr(module, "quant_state", None)
        weight = nf4.from_bitsandbytes(module.weight.data, state, f"{name}.weight")
        found[name] = NF4Linear(weight, module.bias, module.compute_dtype)
    if not found:
        raise ValueError(f"{type(model).__name__} has no Linear4bit modules")
    return _swapped(model, found)


@torch.no_grad()
def quantize_model(
    model: PreTrainedModel, *, double: bool = True, skip: Collection[str] = ()
) -> list[str]:
    """Quantize every `nn.Linear` but the language-model head to NF4, without bitsandbytes.

    Layers whose input width is no multiple of 64 stay as they are.

    Args:
        double: quantize the scales too.
        skip: names of modules to leave alone, with all they contain.

    Returns:
        Names of the modules replaced.

    Raises:
        ValueError: there is none to replace, or `skip` names one that does not exist.
    """
    modules = dict(model.named_modules())
    unknown = [name for name in skip if name not in modules]
    if unknown:
        raise ValueError(f"{type(model).__name__} has no module {unknown[0]!r} to skip")
    head = model.get_output_embeddings()
    names = [
        name
        for name, module in modules.items()
        if type(module) is nn.Linear
        and module is not head
        and module.in_features % nf4.BLOCK == 0
        and not any(name == left or name.startswith(f"{left}.") for left in skip)
    ]
    if not names:
        raise ValueError(f"{type(model).__name__} has no linear layers to quantize")
    for name in names:
        module = modules[name]
        # One at a time: a float matrix is freed before the next one is quantized.
        _swapped(model, {name: NF4Linear(nf4.quantize(module.weight, double=double), module.bias)})
        del modules[name], module
    return names


def _is_linear4bit(module: nn.Module) -> bool:
    return any(
        kind.__name__ == "Linear4bit" and kind.__module__.startswith("bitsandbytes")
        for kind in type(module).__mro__
    )


def _swapped(model: nn.Module, modules: dict[str, NF4Linear]) -> list[str]:
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module)
    return list(modules)
