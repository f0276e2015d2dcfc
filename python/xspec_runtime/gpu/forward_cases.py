"""Random inputs of the ops of the forward pass and of its tail, at odd shapes, NaN wherever no op
may look.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import torch

from xspec_kernels import (
    TOKENS,
    embed,
    lm_head_argmax,
    norm_act,
    rope_append,
    rope_table,
    tree_attention,
    tree_mask,
    verify_tail,
)

from .cases import WORDS, Case, Tensors, chain, trees

# Of a row, in the Euclidean norm: the roundings of a reference that works in the same dtype.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
_DTYPES = tuple(TOLERANCE)
# Each shape is a kernel to compile, so there are few; rows, lengths and trees cost nothing.
_WIDTHS = dict(zip(_DTYPES, (40, 4096, 576), strict=True))
_VOCABULARY = dict(zip(_DTYPES, ((500, 64), (1031, 192), (3, 64)), strict=True))
_HEADS = dict(zip(_DTYPES, ((3, 1, 32), (2, 2, 128), (4, 2, 64)), strict=True))


def draws(rng: random.Random) -> torch.Generator:
    """Of tensors, seeded by `rng`."""
    return torch.Generator().manual_seed(rng.randrange(2**31))


def _word(tensor: torch.Tensor) -> torch.Tensor:
    """The same bits as integers, so that NaN equals itself."""
    return tensor.contiguous().view(WORDS[tensor.element_size()])


def embed_cases(rng: random.Random, sizes: tuple[int, ...]) -> Iterator[Case]:
    """Ids outside the table among them."""

    def call(given: Tensors, backend: str) -> list[torch.Tensor]:
        found = embed(*given, backend=backend)
        return [_word(found.nan_to_num(7.0)), found.isnan()]

    for rows in sizes:
        for dtype in _DTYPES:
            width = _WIDTHS[dtype]
            table = torch.randn(97, width, generator=draws(rng)).to(dtype)
            ids = torch.tensor([rng.randint(-2, 98) for _ in range(rows)])
            name = f"{rows} ids of 97 x {width}, {str(dtype)[6:]}"
            yield Case("embed", name, [ids, table], call, ("rows", "missing"))


def norm_act_cases(rng: random.Random, sizes: tuple[int, ...]) -> Iterator[Case]:
    """With and without a residual, whose sum is exact."""

    def call(given: Tensors, backend: str) -> list[torch.Tensor]:
        x, weight, residual = given
        if residual is None:
            return [norm_act(x, weight, 1e-5, backend=backend)]
        found, total = norm_act(x, weight, 1e-5, residual=residual, backend=backend)
        return [found, _word(total)]

    for rows in sizes:
        for dtype in _DTYPES:
            for added in (False, True):
                width, draw = _WIDTHS[dtype], draws(rng)
                x, other = (torch.randn(rows, width, generator=draw).to(dtype) for _ in "ab")
                weight = torch.randn(width, generator=draw).to(dtype)
                inputs: Tensors = [x, weight, other if added else None]
                name = f"{rows} x {width}, {str(dtype)[6:]}{', residual' if added else ''}"
                outputs = ("normed", "sum") if added else ("normed",)
                yield Case("norm_act", name, inputs, call, outputs, TOLERANCE[dtype])


def lm_head_cases(rng: random.Random, sizes: tuple[int, ...]) -> Iterator[Case]:
    """Small whole numbers: sums are exact, ties are common, and every output has to be equal."""

    def call(given: Tensors, backend: str) -> list[torch.Tensor]:
        found = lm_head_argmax(*given, round_to=given[0].dtype, backend=backend)
        return [found.ids, found.flags, found.best.nan_to_num(-7.0)]

    for rows in sizes:
        for dtype in _DTYPES:
            (N, K), draw = _VOCABULARY[dtype], draws(rng)
            x, w = (torch.randint(-2, 3, (n, K), generator=draw).to(dtype) for n in (rows, N))
            x[rng.randrange(rows), 5] = torch.nan
            name = f"{rows} rows, {N} x {K}, {str(dtype)[6:]}"
            yield Case("lm_head_argmax", name, [x, w], call, ("ids", "flags", "best"))


def rope_append_cases(rng: random.Random, sizes: tuple[int, ...]) -> Iterator[Case]:
    """Ragged trees, grouped heads, norms of heads; slots that are no row's keep their bits."""
    for nodes in sizes:
        for dtype in _DTYPES:
            yield _rope_case(rng, nodes, dtype, _HEADS[dtype], dtype == torch.bfloat16)


def _rope_case(
    rng: random.Random, nodes: int, dtype: torch.dtype, size: tuple[int, int, int], normed: bool
) -> Case:
    heads, kv_heads, width = size
    draw, slots = draws(rng), nodes + 12
    _, (parent_idx, rows) = trees(rng, 3, nodes, True)
    depth = tree_mask(parent_idx, rows, backend="torch").depth
    starts = torch.tensor([rng.randint(0, 12) for _ in range(3)], dtype=torch.int32)
    qkv = torch.randn(3 * nodes, (heads + 2 * kv_heads) * width, generator=draw).to(dtype)
    frequencies = 1e4 ** -(torch.arange(0, width, 2) / width)
    table = rope_table(frequencies, slots + 3, dtype)
    caches = [torch.randn(3, kv_heads, slots, width, generator=draw).to(dtype) for _ in "kv"]
    norms = [torch.rand(width, generator=draw).add(0.5).to(dtype) for _ in "qk"]

    def call(given: Tensors, backend: str) -> list[torch.Tensor]:
        *rest, q_norm, k_norm = given
        q = rope_append(*rest, q_norm=q_norm, k_norm=k_norm, eps=1e-5, backend=backend)
        return [q, given[5], _word(given[6])]

    inputs: Tensors = [qkv, *table, depth, starts, *caches, rows]
    inputs += norms if normed else [None, None]
    name = f"3 trees of {nodes}, {heads}/{kv_heads} heads of {width}, {str(dtype)[6:]}"
    tolerance = 2 * TOLERANCE[dtype]
    return Case("rope_append", name, inputs, call, ("q", "k_cache", "v_cache"), tolerance)


def tree_attention_cases(rng: random.Random, sizes: tuple[int, ...]) -> Iterator[Case]:
    """Lengths around tile and split edges; chains under 64 columns."""
    edges = (0, 1, 31, 33, 63, 95, 256, 287, 289, 545)
    for nodes in sizes:
        for dtype in _DTYPES:
            starts = [rng.choice(edges) for _ in range(3)]
            yield _attention_case(rng, nodes, dtype, _HEADS[dtype], starts, 32)
        yield _attention_case(rng, nodes, torch.bfloat16, (4, 2, 64), [90, 31, 300], 64)


def _attention_case(
    rng: random.Random, nodes: int, dtype: torch.dtype, size: tuple[int, int, int],
    starts: list[int], columns: int,
) -> Case:  # fmt: skip
    heads, kv_heads, width = size
    draw, slots = draws(rng), max(starts) + nodes + 5
    _, (parent_idx, rows) = trees(rng, 3, nodes, True)
    if columns == 64:
        parent_idx = torch.tensor([chain(nodes)] * 3, dtype=torch.int32)
    mask = tree_mask(parent_idx, rows, max_depth=columns, backend="torch")
    q = torch.randn(3, nodes, heads, width, generator=draw).to(dtype)
    caches = [torch.randn(3, kv_heads, slots, width, generator=draw).to(dtype) for _ in "kv"]
    for request, start in enumerate(starts):
        for cache in caches:
            cache[request, :, start + int(rows[request]) :] = torch.nan

    def call(given: Tensors, backend: str) -> list[torch.Tensor]:
        return [tree_attention(*given, backend=backend)]

    inputs = [q, *caches, mask.depth, mask.path_slot, torch.tensor(starts, dtype=torch.int32), rows]
    name = f"3 trees of {nodes} behind {starts}, {heads}/{kv_heads} heads of {width}, "
    name += f"{str(dtype)[6:]}, {columns} columns"
    return Case("tree_attention", name, inputs, call, ("out",), TOLERANCE[dtype])


def verify_tail_cases(rng: random.Random, sizes: tuple[int, ...]) -> Iterator[Case]:
    """Some accepted, flags of every kind, requests that are idle or cut short."""

    def call(given: Tensors, backend: str) -> list[torch.Tensor]:
        (*tree, k, v, lengths, root, sequence, record, rows, most) = given
        found = verify_tail(*tree, [k, v], lengths, root, sequence, record, rows, max_new=most,
                            backend=backend)  # fmt: skip
        return [*found, _word(k), _word(v), lengths, root, sequence, record]

    outputs = ("accept_len", "accept_path", "k", "v", "cache_seqlens", "root", "sequence", "record")
    for nodes in sizes:
        batch, draw = 5, draws(rng)
        _, (parent_idx, rows) = trees(rng, batch, nodes, True)
        bits = tree_mask(parent_idx, rows, backend="torch").ancestor_bits
        targets, tokens = torch.randint(0, 2, (2, batch, nodes), generator=draw)
        flags = torch.tensor([[rng.choice((0, 0, 0, 1, 2)) for _ in range(nodes)]
                              for _ in range(batch)], dtype=torch.int32)  # fmt: skip
        caches = [torch.randn(batch, 2, nodes + 9, 64, generator=draw).bfloat16() for _ in "kv"]
        lengths = torch.tensor([rng.randint(0, 9) for _ in range(batch)], dtype=torch.int32)
        most = torch.tensor([rng.choice((0, 1, 3, 99)) for _ in range(batch)], dtype=torch.int32)
        numbers = [torch.arange(batch), torch.zeros(batch, dtype=torch.int64),
                   torch.zeros(batch, TOKENS + nodes, dtype=torch.int64)]  # fmt: skip
        inputs = [targets, flags, tokens, parent_idx, bits, *caches, lengths, *numbers, rows, most]
        yield Case("verify_tail", f"{batch} trees of {nodes}", inputs, call, outputs)
