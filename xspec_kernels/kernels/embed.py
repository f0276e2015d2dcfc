"""embed: the embedding rows of M tokens.

An id outside 0..V-1, such as the -1 that stands for a token nobody could compute, gives a row of
NaN: it travels to lm_head_argmax and verify_tail, which report it, and no check waits for a device.
Rows are copied, so their bits are the table's; with a table of positions, row i is the sum of the
token's row and of position i's, rounded once.
"""

from __future__ import annotations

import torch

from xspec_kernels._dispatch import check_tensor, register
from xspec_kernels._triton import INTERPRETED, jit, launch, tl
from xspec_kernels.kernels._product import narrow

_MAX_BLOCK = 1024


def embed_ref(
    token_ids: torch.Tensor, weight: torch.Tensor, position: torch.Tensor | None
) -> torch.Tensor:
    """The definition."""
    known = (token_ids >= 0) & (token_ids < weight.shape[0])
    rows = weight[torch.where(known, token_ids, 0).long()]
    rows.masked_fill_(~known[:, None], float("nan"))
    return rows if position is None else rows + position[: len(rows)]


@jit(do_not_specialize=["vocab"], do_not_specialize_on_alignment=["token_ids"])
def _embed_kernel(
    token_ids,  # [M] int32 or int64
    weight,  # [V, D]
    position,  # [P, D] or None
    out,  # [M, D]
    vocab,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < D
    token = tl.load(token_ids + row).to(tl.int64)
    known = (token >= 0) & (token < vocab)
    values = tl.load(weight + token * D + column, mask=inside & known, other=float("nan"))
    if position is not None:
        there = tl.load(position + row * D + column, mask=inside, other=0.0)
        total = values.to(tl.float32) + there.to(tl.float32)
        values = narrow(total, out.dtype.element_ty, INTERPRETED)
    tl.store(out + row * D + column, values, mask=inside)


def _empty(
    token_ids: torch.Tensor, weight: torch.Tensor, position: torch.Tensor | None
) -> torch.Tensor:
    return weight.new_empty((token_ids.shape[0], weight.shape[1]))


def _triton(
    token_ids: torch.Tensor, weight: torch.Tensor, position: torch.Tensor | None
) -> torch.Tensor:
    out = _empty(token_ids, weight, position)
    vocab, width = weight.shape
    block = min(1 << (width - 1).bit_length(), _MAX_BLOCK)
    launch(
        _embed_kernel, (token_ids.shape[0], -(-width // block)), token_ids.device, token_ids,
        weight, position, out, vocab, D=width, BLOCK=block, INTERPRETED=INTERPRETED,
        num_warps=max(1, block // 256),
    )  # fmt: skip
    return out


def _check(
    token_ids: torch.Tensor, weight: torch.Tensor, position: torch.Tensor | None
) -> torch.device:
    op, device = "embed", weight.device
    if token_ids.dim() != 1 or not token_ids.shape[0]:
        raise ValueError(
            f"{op}: token_ids has shape {list(token_ids.shape)}, expected [M] with M >= 1"
        )
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(f"{op}: weight has shape {list(weight.shape)}, expected [V, D]")
    integers = (torch.int32, torch.int64)
    check_tensor(op, "token_ids", token_ids, token_ids.shape, integers, device)
    floats = (torch.float32, torch.float16, torch.bfloat16)
    check_tensor(op, "weight", weight, weight.shape, floats, device)
    if position is not None:
        if len(position) < len(token_ids):
            raise ValueError(f"{op}: {len(token_ids)} ids and {len(position)} positions")
        shape = (len(position), weight.shape[1])
        check_tensor(op, "position", position, shape, (weight.dtype,), device)
    return device


_OP = register(
    "embed",
    "(Tensor token_ids, Tensor weight, Tensor? position, str backend) -> Tensor",
    check=_check,
    fake=_empty,
    torch=embed_ref,
    triton=_triton,
)


def embed(
    token_ids: torch.Tensor,
    weight: torch.Tensor,
    *,
    position: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Rows of the embedding table.

    Args:
        token_ids: [M] int32 or int64; one outside 0..V-1 gives NaN.
        weight: [V, D] float32, float16 or bfloat16.
        position: [P, D], dtype of weight, P >= M: its row i is added to row i.
        backend: see `xspec_kernels`.

    Returns:
        [M, D], dtype of weight.

    Raises:
        ValueError: a shape, dtype or device is wrong, or a tensor is not contiguous.
    """
    return _OP(token_ids, weight, position, backend)
