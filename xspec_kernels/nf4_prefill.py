"""y = x W^T for many rows and W in NF4: dequantized once, into a bounded buffer, then multiplied.

nf4_linear looks its weights up anew for every 64 rows. A prompt has thousands: here each part of
the matrix is dequantized once, by one kernel, and multiplied by the library. The parts are as large
as the buffer, so the memory it takes does not grow with the matrix.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from xspec_kernels import nf4
from xspec_kernels._dispatch import choose
from xspec_kernels._triton import INTERPRETED, jit, launch, tl
from xspec_kernels.kernels._product import narrow
from xspec_kernels.kernels.nf4_linear import nf4_linear
from xspec_kernels.workspace import Workspace

# Rows up to which nf4_linear is the faster of the two. With Triton from instruction counts, not
# measured: `bench/nf4.py` measures it. torch has no fused way to begin with: on a CPU, parts of
# 4 MiB came within 9 % of the best of 1, 4, 16 and 256 MiB and of nf4_linear, at 1 to 512 rows.
FUSED_ROWS = {"triton": 256, "torch": 0}
# Bytes of the buffer: what a CPU's cache holds; enough on a GPU that each product fills it.
BUFFER_BYTES = {"cpu": 4 << 20, "cuda": 32 << 20}
_BYTES = 1024


@jit()
def _dequantize_kernel(
    packed,  # [COUNT] uint8
    scales,  # [COUNT/32] fp32
    code,  # [16] fp32
    out,  # [2 COUNT]
    count,
    SIZE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = at < count
    byte = tl.load(packed + at, mask=inside, other=0).to(tl.int32)
    scale = tl.load(scales + at // 32, mask=inside, other=0.0)
    even = tl.load(code + (byte >> 4)) * scale
    odd = tl.load(code + (byte & 15)) * scale
    place = tl.program_id(0).to(tl.int64) * (2 * SIZE) + tl.arange(0, 2 * SIZE)
    value = narrow(tl.interleave(even, odd), out.dtype.element_ty, INTERPRETED)
    tl.store(out + place, value, mask=place < 2 * count)


def dequantize_into(
    out: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor, backend: str
) -> None:
    """Rows of a weight, packed [R, K/2] and float32 scales [R, K/64], to contiguous `out` [R, K];
    the bits of `nf4.dequantize`. `backend` is "torch" or "triton".
    """
    if backend != "triton":
        nf4.dequantize_rows(packed, scales, out.dtype, out)
        return
    count = packed.numel()
    launch(
        _dequantize_kernel, (-(-count // _BYTES),), out.device, packed, scales,
        nf4.codebook(out.device), out, count, SIZE=_BYTES, INTERPRETED=INTERPRETED, num_warps=4,
    )  # fmt: skip


def prefill_linear(
    x: torch.Tensor,
    w: nf4.NF4Weight,
    bias: torch.Tensor | None = None,
    *,
    workspace: Workspace | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """x W^T, plus bias, of a prompt's rows.

    The weights are those of `nf4.dequantize(w, x.dtype)`. Up to `FUSED_ROWS` rows this is
    `nf4_linear`; `w.dense`, where it has x's dtype, is used as it lies.

    Args:
        x: [M, K] float32, float16 or bfloat16, contiguous.
        bias: [N], dtype of x.
        workspace: holds the buffer, at most `BUFFER_BYTES` or two rows of W; None allocates it.
        backend: see `xspec_kernels`.

    Returns:
        [M, N], dtype of x.

    Raises:
        ValueError: x is not [M, K], or as `nf4_linear`.
    """
    width = w.shape[1]
    if x.dim() != 2 or x.shape[1] != width:
        raise ValueError(f"prefill_linear: x has shape {list(x.shape)}, expected [M, {width}]")
    chosen = choose("nf4_linear", backend, x.device.type)
    if w.dense is not None and w.dense.dtype == x.dtype and chosen == "torch":
        return F.linear(x, w.dense, bias)
    if len(x) <= FUSED_ROWS[chosen]:
        return nf4_linear(x, w, bias=bias, workspace=workspace, backend=backend)
    return by_parts(x, w, bias, workspace=workspace, backend=chosen)


def by_parts(
    x: torch.Tensor,
    w: nf4.NF4Weight,
    bias: torch.Tensor | None = None,
    *,
    workspace: Workspace | None = None,
    backend: str = "torch",
) -> torch.Tensor:
    """As `prefill_linear`, through the buffer whatever M is; `backend` is "torch" or "triton"."""
    rows, width = w.shape
    # One size for every matrix, so that the buffer never grows.
    room = max(BUFFER_BYTES[x.device.type] // x.itemsize, 2 * width)
    buffer = (workspace or Workspace(x.device)).buffer(f"nf4.{x.dtype}", (room,), x.dtype)
    step = room // width & -2
    scales, y = nf4.absmax(w), x.new_empty(len(x), rows)
    for low in range(0, rows, step):
        part = slice(low, min(low + step, rows))
        weights = buffer[: (part.stop - low) * width].view(-1, width)
        dequantize_into(weights, w.packed[part], scales[part], backend)
        if bias is None:
            torch.mm(x, weights.t(), out=y[:, part])
        else:
            torch.addmm(bias[part], x, weights.t(), out=y[:, part])
    return y
