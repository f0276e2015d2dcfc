"""row_attention: M rows attend to each other, all of them or those before; no cache.

For networks over a draft of at most some hundred rows. One program computes 16 rows of 64 columns
of one head: at these sizes what counts is that the launch fills the card, so the scores of a wide
head are computed again for each part of its columns.

Keys are taken in tiles of 64 from row 0 on, whatever M is. What a row may not see has weight 0 in a
sum whose order is fixed, so under the causal mask a row's bits depend on itself and on the rows
before it alone; without the mask, on the rows that count.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from xspec_kernels._dispatch import check_tensor, exact, register
from xspec_kernels._triton import INTERPRETED, jit, launch, tl
from xspec_kernels.kernels._product import narrow
from xspec_kernels.kernels.norm_act import require_aligned
from xspec_kernels.tiles import DTYPES, card_of, early_launch

_ROWS, _KEYS, _COLUMNS = 16, 64, 64


def _heads(qkv: torch.Tensor, heads: int) -> list[torch.Tensor]:
    """Queries, keys, values, each [H, M, D]."""
    return [part.unflatten(1, (heads, -1)).transpose(0, 1) for part in qkv.chunk(3, 1)]


def row_attention_ref(
    qkv: torch.Tensor,
    num_rows: torch.Tensor | None,
    token_ids: torch.Tensor | None,
    pad: int,
    heads: int,
    causal: bool,
) -> torch.Tensor:
    """The definition; rows past `num_rows` are computed from zeros, and a row of NaN makes NaN of
    those that see it alone.
    """
    rows = qkv.shape[0]
    row = torch.arange(rows, device=qkv.device)
    count = rows if num_rows is None else num_rows
    invalid = qkv.isnan().any(1) & (row < count)
    qkv = torch.where(((row < count) & ~invalid)[:, None], qkv, 0)
    keys = row < count
    if token_ids is not None:
        keys = keys & (token_ids != pad)
    # Every row sees the first, those that do not count too.
    keys = keys | (row == 0)
    seen = keys & (row <= row[:, None]) if causal else keys.expand(rows, rows)
    if exact():
        out = _tiled(qkv, seen, heads, causal)
    else:
        out = F.scaled_dot_product_attention(*_heads(qkv, heads), seen)
        out = out.transpose(0, 1).flatten(1)
    return out.masked_fill(((seen & invalid).any(1) | invalid)[:, None], float("nan"))


def _tiled(qkv: torch.Tensor, seen: torch.Tensor, heads: int, causal: bool) -> torch.Tensor:
    """64 rows at a time over whole tiles of keys: shapes that M has no part in."""
    rows, fill = len(qkv), -len(qkv) % _KEYS
    q, k, v = _heads(F.pad(qkv, (0, 0, 0, fill)), heads)
    seen = F.pad(seen, (0, fill, 0, fill))
    seen[:, 0] = True
    parts = []
    for first in range(0, rows, _KEYS):
        here = slice(first, first + _KEYS)
        last = here.stop if causal else rows + fill
        part = _attend(q[:, here], k[:, :last], v[:, :last], seen[here, :last])
        parts.append(part.transpose(0, 1).flatten(1))
    return torch.cat(parts)[:rows]


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    scores = (q.float() @ k.float().transpose(1, 2)) * q.shape[2] ** -0.5
    weights = scores.masked_fill(~seen, float("-inf")).softmax(2)
    return (weights @ v.float()).to(q.dtype)


@jit(do_not_specialize=["M", "bounded"], do_not_specialize_on_alignment=["num_rows", "token_ids"])
def _row_attention_kernel(
    qkv,  # [M, 3, HEADS, D]
    out,  # [M, HEADS, D]
    token_ids,  # [M] int32 or int64, or None
    num_rows,  # [1] int32, read if `bounded`
    scale,
    M,
    bounded,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    PAD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    CAUSAL: tl.constexpr,
    EARLY: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    if EARLY:
        tl.extra.cuda.gdc_wait()
    head = tl.program_id(0)
    block = tl.program_id(1)
    part = tl.program_id(2)
    rows = tl.minimum(M, tl.load(num_rows, mask=bounded != 0, other=M))
    if block * BM >= rows:
        return
    WIDTH: tl.constexpr = HEADS * D
    m = block * BM + tl.arange(0, BM)
    column = tl.arange(0, BD)
    q_at = qkv + m.to(tl.int64)[:, None] * (3 * WIDTH) + head * D + column[None, :]
    best = tl.full((BM,), float("-inf"), tl.float32)
    weight = tl.zeros((BM,), tl.float32)
    total = tl.zeros((BM, BD), tl.float32)
    end = rows
    if CAUSAL:
        end = tl.minimum(rows, (block + 1) * BM)
    for start in tl.range(0, end, BN):
        n = start + tl.arange(0, BN)
        n_at = qkv + n.to(tl.int64)[:, None] * (3 * WIDTH) + head * D + column[None, :]
        scores = tl.zeros((BM, BN), tl.float32)
        for first in tl.range(0, D, BD):
            inside = (first + column < D)[None, :]
            q = tl.load(q_at + first, mask=inside & (m < rows)[:, None], other=0.0)
            k = tl.load(n_at + WIDTH + first, mask=inside & (n < rows)[:, None], other=0.0)
            if INTERPRETED:
                q = q.to(tl.float32)
                k = k.to(tl.float32)
            scores = tl.dot(q, tl.trans(k), scores, input_precision="ieee")
        kept = n < rows
        if token_ids is not None:
            kept = kept & ((n == 0) | (tl.load(token_ids + n, mask=kept, other=0) != PAD))
        seen = kept[None, :]
        if CAUSAL:
            seen = seen & (n[None, :] <= m[:, None])
        scores = tl.where(seen, scores * scale, float("-inf"))
        # Every row sees key 0, so the largest is a number from the first tile on.
        larger = tl.maximum(best, tl.max(scores, 1))
        shares = tl.exp(scores - larger[:, None])
        before = tl.exp(best - larger)
        inside = (part * BD + column < D)[None, :] & (n < rows)[:, None]
        v = tl.load(n_at + 2 * WIDTH + part * BD, mask=inside, other=0.0)
        # A weight of 0 must not make NaN of a row that cannot be seen; who sees it has its score.
        v = tl.where(v == v, v, 0.0)
        weight = weight * before + tl.sum(shares, 1)
        shares = narrow(shares, v.dtype, INTERPRETED)
        if INTERPRETED:
            shares = shares.to(tl.float32)
            v = v.to(tl.float32)
        total = tl.dot(shares, v, total * before[:, None], input_precision="ieee")
        best = larger
    total = narrow(total / weight[:, None], out.dtype.element_ty, INTERPRETED)
    at = out + m.to(tl.int64)[:, None] * WIDTH + head * D + part * BD + column[None, :]
    tl.store(at, total, mask=(m < rows)[:, None] & (part * BD + column < D)[None, :])


def _triton(
    qkv: torch.Tensor,
    num_rows: torch.Tensor | None,
    token_ids: torch.Tensor | None,
    pad: int,
    heads: int,
    causal: bool,
) -> torch.Tensor:
    require_aligned("row_attention", qkv=qkv)
    out = _fake(qkv)
    rows, width = out.shape
    size = width // heads
    early = early_launch(card_of(qkv.device))
    limit = qkv.new_empty(1, dtype=torch.int32) if num_rows is None else num_rows
    launch(
        _row_attention_kernel, (heads, -(-rows // _ROWS), -(-size // _COLUMNS)), qkv.device, qkv,
        out, token_ids, limit, size**-0.5, rows, int(num_rows is not None), HEADS=heads, D=size,
        PAD=pad, BM=_ROWS, BN=_KEYS, BD=_COLUMNS, CAUSAL=causal, EARLY=early,
        INTERPRETED=INTERPRETED, num_warps=4, **({"launch_pdl": True} if early else {}),
    )  # fmt: skip
    return out


def _check(
    qkv: torch.Tensor,
    num_rows: torch.Tensor | None,
    token_ids: torch.Tensor | None,
    pad: int,
    heads: int,
    causal: bool,
) -> torch.device:
    op, device = "row_attention", qkv.device
    if qkv.dim() != 2 or 0 in qkv.shape or heads < 1 or qkv.shape[1] % (3 * heads):
        raise ValueError(
            f"{op}: qkv has shape {list(qkv.shape)}, expected [M, 3 * {heads} * D] with M, D >= 1"
        )
    check_tensor(op, "qkv", qkv, qkv.shape, DTYPES, device)
    if num_rows is not None:
        check_tensor(op, "num_rows", num_rows, (1,), (torch.int32,), device)
    if token_ids is not None:
        integers = (torch.int32, torch.int64)
        check_tensor(op, "token_ids", token_ids, qkv.shape[:1], integers, device)
    return device


def _fake(qkv: torch.Tensor, *others: object) -> torch.Tensor:
    return qkv.new_empty(qkv.shape[0], qkv.shape[1] // 3)


_OP = register(
    "row_attention",
    "(Tensor qkv, Tensor? num_rows, Tensor? token_ids, int pad, int heads, bool causal,"
    " str backend) -> Tensor",
    check=_check,
    fake=_fake,
    torch=row_attention_ref,
    triton=_triton,
)


def row_attention(
    qkv: torch.Tensor,
    num_rows: torch.Tensor | None = None,
    *,
    heads: int,
    causal: bool = False,
    token_ids: torch.Tensor | None = None,
    pad: int = 0,
    backend: str = "auto",
) -> torch.Tensor:
    """Softmax attention of M rows over each other, scaled by 1 / sqrt(D).

    Args:
        qkv: [M, 3 * heads * D] float32, float16 or bfloat16: all queries of a row, all keys, all
            values, as `torch.nn.MultiheadAttention` projects them.
        num_rows: [1] int32 on the device, rows that count, 1 at least; None means all M. The others
            are not read, and theirs of the result are unspecified.
        heads: as many of D columns.
        causal: row i sees rows 0 .. i alone.
        token_ids: [M] int32 or int64: nobody sees rows whose id is `pad`, the first row excepted.
        backend: see `xspec_kernels`. `torch` keeps the bits of a causal row independent of M where
            XSPEC_EXACT=1.

    Returns:
        [M, heads * D], dtype of qkv.

    Raises:
        ValueError: a shape, dtype or device is wrong, qkv is not contiguous or, for Triton, not
            aligned to 16 bytes.
    """
    return _OP(qkv, num_rows, token_ids, pad, heads, causal, backend)
