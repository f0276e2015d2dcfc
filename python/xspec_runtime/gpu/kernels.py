"""Phase `kernels`: GB/s of every op of the forward pass at the shapes of a 7B model.

One timed call is a CUDA graph of the op over several copies of what it reads, so that no cache of
the card serves it; torch's own ops on the same copies stand beside it. A result that differs from
torch's is an error and gives no time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right

from xspec_kernels import (
    RowNorm,
    Workspace,
    lm_head_argmax,
    norm_act,
    rope_append,
    rope_table,
    skinny_linear,
    tree_attention,
    tree_mask,
)

from .adapters import adapters
from .cases import chain, relative_error
from .clock import captured, interleaved
from .decoder import Shape
from .parts import CheckFailed, Context, Options, Part

TOLERANCE = 0.02


@dataclass(frozen=True, slots=True)
class Scale:
    """Sizes of the phase; `footprint` bytes are what the copies take at least."""

    shape: Shape = field(default_factory=Shape)
    rows: tuple[int, ...] = (1, 22, 64)
    prompt_tokens: tuple[int, ...] = (2076, 4124)
    footprint: int = 512 << 20
    repeats: int = 8


FULL = Scale()
TINY = Scale(Shape(2, 128, 4, 256, 512), (1, 6), (40,), 1, 1)


def parts(options: Options) -> list[Part]:
    """Products, everything else, whole adapters."""
    return [
        Part("kernels", "linear", linear, 40),
        Part("kernels", "others", others, 40),
        Part("kernels", "adapters", adapters, 40),
    ]


@dataclass(frozen=True, slots=True)
class Work:
    """One op over copies of its inputs.

    Attributes:
        op: as results name it.
        nbytes: read and written by one call.
        ours, theirs: one call a copy; `theirs` may be empty.
        compared: picks what has to agree from either one's result.
    """

    op: str
    rows: int
    nbytes: int
    ours: list[Callable[[], object]]
    theirs: list[Callable[[], object]]
    compared: Callable[[object], torch.Tensor] = lambda result: result


class Maker:
    """Random inputs on the device, in bfloat16."""

    def __init__(self, context: Context) -> None:
        options = context.options
        self.sizes = TINY if options.dry_run else FULL
        self.device = options.device
        self._draw = torch.Generator(self.device).manual_seed(options.seed)
        self.workspace = Workspace(self.device)

    def normal(self, *size: int, scale: float = 1.0) -> torch.Tensor:
        """Random numbers."""
        like = {"device": self.device, "dtype": torch.bfloat16, "generator": self._draw}
        return torch.randn(*size, **like).mul_(scale)

    def copies(self, *size: int, scale: float = 1.0) -> list[torch.Tensor]:
        """As many as the footprint takes."""
        nbytes = 2 * torch.Size(size).numel()
        count = max(2, -(-self.sizes.footprint // nbytes))
        return [self.normal(*size, scale=scale) for _ in range(min(count, 64))]


def linear(context: Context) -> Iterator[dict]:
    """The products of a layer, alone and with their part of the norms, and the head."""
    make = Maker(context)
    s = make.sizes.shape
    with torch.inference_mode():
        for name, n, k, epilogue in (
            ("qkv", 3 * s.width, s.width, "none"),
            ("o", s.width, s.width, "residual"),
            ("gate_up", 2 * s.inner, s.width, "gate"),
            ("down", s.width, s.inner, "residual"),
        ):
            weights = make.copies(n, k, scale=k**-0.5)
            for normed in (False, True):
                works = [_product(make, name, rows, weights, epilogue, normed)
                         for rows in make.sizes.rows]  # fmt: skip
                yield from _timed(context, make, works)
        heads = make.copies(s.vocab, s.width, scale=s.width**-0.5)
        yield from _timed(context, make, [_head(make, rows, heads) for rows in make.sizes.rows])


def _product(
    make: Maker, name: str, rows: int, weights: list[torch.Tensor], epilogue: str, normed: bool
) -> Work:
    """With a residual, `normed` means that the product leaves squares; without, that it takes
    those of 32 tiles and normalizes x.
    """
    n, k = weights[0].shape
    x, residual = make.normal(rows, k), make.normal(rows, n)
    norm = make.normal(k)
    options = {"gate": True} if epilogue == "gate" else {}
    options |= {"residual": residual} if epilogue == "residual" else {}
    if normed and epilogue == "residual":
        options["with_squares"] = True
    elif normed:
        squares = x.float().square().view(rows, 32, -1).sum(2).T.contiguous()
        options["norm"] = RowNorm(norm, make.sizes.shape.eps, squares)

    def theirs(w: torch.Tensor) -> torch.Tensor:
        if "norm" in options:
            return multiplied(F.rms_norm(x, (k,), norm, make.sizes.shape.eps), w)
        return multiplied(x, w)

    def multiplied(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        if epilogue == "residual":
            return torch.addmm(residual, x, w.t())
        product = F.linear(x, w)
        if epilogue == "none":
            return product
        gate, up = product.unflatten(1, (-1, 2)).unbind(2)
        return F.silu(gate) * up

    out = n // 2 if epilogue == "gate" else n
    moved = n * k + rows * (k + out + (n if epilogue == "residual" else 0))
    return Work(
        f"skinny_linear {name}{' with norm' if normed else ''}", rows, 2 * moved,
        [lambda w=w: skinny_linear(x, w, workspace=make.workspace, **options) for w in weights],
        [lambda w=w: theirs(w) for w in weights],
        lambda found: found[0] if isinstance(found, tuple) else found,
    )  # fmt: skip


def _head(make: Maker, rows: int, weights: list[torch.Tensor]) -> Work:
    n, k = weights[0].shape
    x = make.normal(rows, k)

    def best(result: object) -> torch.Tensor:
        # Of near ties either token will do: what is compared is the largest logit.
        return result.best if hasattr(result, "best") else result.values.float()

    return Work(
        "lm_head_argmax", rows, 2 * (n * k + rows * k),
        [lambda w=w: lm_head_argmax(x, w, round_to=x.dtype, workspace=make.workspace)
         for w in weights],
        [lambda w=w: F.linear(x, w).max(-1) for w in weights],
        best,
    )  # fmt: skip


def others(context: Context) -> Iterator[dict]:
    """Attention, rotation and norm."""
    make = Maker(context)
    s = make.sizes.shape
    with torch.inference_mode():
        for tokens in make.sizes.prompt_tokens:
            slots = tokens + max(make.sizes.rows)
            caches = make.copies(2, 1, s.heads, slots, s.head_dim)
            works = [_attention(make, rows, tokens, caches) for rows in make.sizes.rows]
            yield from _timed(context, make, works)
        works = [_rotation(make, rows, caches) for rows in make.sizes.rows]
        yield from _timed(context, make, works)
        yield from _timed(context, make, [_norm(make, rows) for rows in make.sizes.rows])


def _tables(make: Maker, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """depth and path_slot of a chain."""
    parents = torch.tensor([chain(rows)], dtype=torch.int32, device=make.device)
    mask = tree_mask(parents, max_depth=32 if rows <= 32 else 64)
    return mask.depth, mask.path_slot


def _attention(make: Maker, rows: int, tokens: int, caches: list[torch.Tensor]) -> Work:
    s, end = make.sizes.shape, tokens + rows
    q, tables = make.normal(1, rows, s.heads, s.head_dim), _tables(make, rows)
    length = torch.tensor([tokens], dtype=torch.int32, device=make.device)
    mask = causal_lower_right(rows, end) if rows > 1 else None

    def theirs(kv: torch.Tensor) -> torch.Tensor:
        k, v = kv[:, :, :, :end]
        return F.scaled_dot_product_attention(q.transpose(1, 2), k, v, mask).transpose(1, 2)

    moved = 2 * s.heads * end * s.head_dim + 2 * q.numel()
    return Work(
        f"tree_attention {tokens}", rows, 2 * moved,
        [lambda kv=kv: tree_attention(q, *kv, *tables, length, workspace=make.workspace)
         for kv in caches],
        [lambda kv=kv: theirs(kv) for kv in caches],
    )  # fmt: skip


def _rotation(make: Maker, rows: int, caches: list[torch.Tensor]) -> Work:
    s, slots = make.sizes.shape, caches[0].shape[3]
    qkv, (depth, _) = make.normal(rows, 3 * s.width), _tables(make, rows)
    half = torch.arange(0, s.head_dim, 2, device=make.device) / s.head_dim
    table = rope_table(s.theta**-half, slots, torch.bfloat16)
    length = torch.tensor([slots - rows], dtype=torch.int32, device=make.device)

    def run(kv: torch.Tensor, backend: str = "auto") -> torch.Tensor:
        q = rope_append(qkv, *table, depth, length, *kv, backend=backend)
        return torch.cat([q[0].flatten(), kv[:, 0, :, slots - rows :].flatten()])

    mine, want = run(caches[0]), run(caches[0].clone(), "torch")
    _check("rope_append", rows, mine, want)
    return Work(
        "rope_append", rows, 2 * (2 * qkv.numel() + 2 * rows * s.head_dim),
        [lambda kv=kv: rope_append(qkv, *table, depth, length, *kv) for kv in caches], [],
    )  # fmt: skip


def _norm(make: Maker, rows: int) -> Work:
    s = make.sizes.shape
    inputs, weight = [make.normal(rows, s.width) for _ in range(16)], make.normal(s.width)
    return Work(
        "norm_act", rows, 2 * (2 * rows + 1) * s.width,
        [lambda x=x: norm_act(x, weight, s.eps) for x in inputs],
        [lambda x=x: F.rms_norm(x, (s.width,), weight, s.eps) for x in inputs],
    )  # fmt: skip


def _check(op: str, rows: int, got: torch.Tensor, want: torch.Tensor) -> None:
    error = relative_error(got, want)
    if not error < TOLERANCE:
        raise CheckFailed(f"{op}, {rows} rows: off by {error:.3g} from torch")


def _timed(context: Context, make: Maker, works: list[Work]) -> Iterator[dict]:
    """Ours and torch's in rotating order, each as one graph over all copies."""
    calls: dict[tuple[int, str], Callable[[], object]] = {}
    for index, work in enumerate(works):
        for mine, other in zip(work.ours[:1], work.theirs[:1], strict=False):
            _check(work.op, work.rows, work.compared(mine()), work.compared(other()))
        for name, runs in (("ours", work.ours), ("theirs", work.theirs)):
            if runs:
                each = lambda runs=runs: [run() for run in runs]  # noqa: E731
                calls[index, name] = captured(each, make.device)
    timings = interleaved(calls, make.device, make.sizes.repeats)
    copy = context.known.get("baseline.machine", {}).get("copy_gbps")
    for index, work in enumerate(works):
        mine, other = timings[index, "ours"], timings.get((index, "theirs"))
        us = mine.ms * 1e3 / len(work.ours)
        gbps = work.nbytes / us / 1e3
        torch_us = other.ms * 1e3 / len(work.theirs) if other else None
        row = {"op": work.op, "rows": work.rows, "us": us, "gbps": gbps, "torch_us": torch_us,
               "bytes": work.nbytes, "of_copy": gbps / copy if copy else None,
               "spread": mine.spread, "calls": mine.calls * len(work.ours)}  # fmt: skip
        yield {"kernels": [row]}
        beside = "" if torch_us is None else f", torch {torch_us:.1f} us"
        context.log(f"{work.op}, {work.rows} rows: {us:.1f} us, {gbps:.0f} GB/s{beside}")
