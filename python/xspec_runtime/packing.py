"""Linear layers of a CPU model with weights packed for short matrices.

torch hands a float32 linear layer of 2 to about 30 rows to a matrix product that repacks the whole
weight on every call, so that a verify of 4 rows takes 1.4 times as long as one of a single row.
Packed once by oneDNN it takes no longer, and one row or a whole prompt is no slower than before.
"""

from __future__ import annotations

import torch
from torch import nn

# The layout is chosen for this many rows; it serves all.
ROWS = 16
# Fewer rows take longer than so many: at SmolLM2's shapes one row 1.1 to 1.3 times as long as four.
FEW = 4


def can_pack() -> bool:
    """Whether this build of torch has oneDNN's packed linear layers."""
    ops = torch.ops.mkldnn
    return torch.backends.mkldnn.is_available() and all(
        hasattr(ops, name) for name in ("_reorder_linear_weight", "_linear_pointwise")
    )


class PackedLinear(nn.Module):
    """``y = x W^T + b`` in float32 on the CPU, for inference only.

    Args:
        linear: the layer to take over; its weight is copied.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        # An opaque layout: neither a buffer to be moved nor a parameter to be saved.
        self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), ROWS)
        self._bias = None if linear.bias is None else linear.bias.detach()
        # Found once: a single row takes so little time that the search would show.
        self._apply_packed = torch.ops.mkldnn._linear_pointwise.default

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """float32 ``[..., in]`` -> ``[..., out]``."""
        rows = x.reshape(-1, self.in_features)
        missing = FEW - len(rows)
        if missing > 0:
            rows = nn.functional.pad(rows, (0, 0, 0, missing))
        y = self._apply_packed(rows, self._packed, self._bias, "none", [], "")
        if missing > 0:
            y = y[:-missing]
        return y.view(*x.shape[:-1], self.out_features)


def pack_linears(model: nn.Module) -> int:
    """Replace the float32 CPU linear layers of `model`; returns how many.

    0 where torch cannot pack. The model is for inference from then on and cannot be saved whole; an
    embedding that shares a weight keeps it.
    """
    if not can_pack():
        return 0
    found = [
        (parent, name, layer)
        for parent in model.modules()
        for name, layer in parent.named_children()
        if type(layer) is nn.Linear
        and layer.weight.dtype == torch.float32
        and layer.weight.device.type == "cpu"
    ]
    for parent, name, layer in found:
        setattr(parent, name, PackedLinear(layer))
    return len(found)
