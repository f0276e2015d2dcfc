from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from op_cases import int32, padded
from xspec_kernels import kv_commit

pytestmark = pytest.mark.usefixtures("poisoned")
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float64]


def bits(cache: torch.Tensor) -> torch.Tensor:
    return cache.view(BITS[cache.element_size()])


def make(shape, dtype=torch.float32, layout="BHSD", device="cpu") -> torch.Tensor:
    """A cache of random bits, NaN patterns among them, in one of the layouts that are allowed."""
    batch, heads, slots, width = shape
    stored = {
        "BHSD": (batch, heads, slots, width),
        "BSHD": (batch, slots, heads, width),
        "wide": (batch, heads, slots + 3, width + 5),
    }[layout]
    word = BITS[dtype.itemsize]
    limits = torch.iinfo(word)
    cache = torch.randint(limits.min, limits.max, stored, dtype=word).to(device).view(dtype)
    if layout == "BSHD":
        return cache.transpose(1, 2)
    return cache[:, :, 1 : slots + 1, :width] if layout == "wide" else cache


def check(caches, paths, starts, op_backend, nodes=16):
    """Run and compare every bit, moved or not, with a copy made row by row."""
    want = [bits(cache).clone() for cache in caches]
    for old, cache in zip(want, caches, strict=True):
        source = bits(cache).clone()
        for b, (path, start) in enumerate(zip(paths, starts, strict=True)):
            for j, node in enumerate(path or []):
                old[b, :, start + 1 + j] = source[b, :, start + node]
    device = op_backend.device
    lengths = [-1 if path is None else len(path) for path in paths]
    seqlens = int32(starts, device)
    got = kv_commit(
        caches,
        int32([padded(list(path or []), nodes) for path in paths], device),
        int32(lengths, device),
        seqlens,
        backend=op_backend.name,
    )
    assert got.dtype == torch.int32
    assert got.tolist() == [a + n + 1 for a, n in zip(starts, lengths, strict=True)]
    assert seqlens.tolist() == starts
    for cache, expected in zip(caches, want, strict=True):
        assert torch.equal(bits(cache), expected)


def ascending(rng, nodes: int) -> list[int]:
    return sorted(rng.sample(range(1, nodes), rng.randint(0, nodes - 1))) if nodes > 1 else []


def test_example(op_backend):
    cache = torch.arange(8.0, device=op_backend.device).reshape(1, 1, 8, 1)
    device = op_backend.device
    path, length, start = int32([[2, 3, -1]], device), int32([2], device), int32([4], device)
    new = kv_commit([cache], path, length, start, backend=op_backend.name)
    assert cache.flatten().tolist() == [0, 1, 2, 3, 4, 6, 7, 7]
    assert new.tolist() == [7]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("layout", ["BHSD", "BSHD", "wide"])
@pytest.mark.parametrize("width", [3, 40, 64])
def test_dtypes_and_layouts(dtype, layout, width, op_backend, rng):
    caches = [make((2, 2, 40, width), dtype, layout, op_backend.device) for _ in range(3)]
    check(caches, [ascending(rng, 16), [2, 3, 4]], [20, 0], op_backend)


@pytest.mark.parametrize("nodes", [1, 2, 7, 33, 64])
@pytest.mark.parametrize("batch", [1, 7])
def test_sizes(nodes, batch, op_backend, rng):
    caches = [make((batch, 1, 70, 8), device=op_backend.device) for _ in range(2)]
    starts = [rng.randint(0, 70 - nodes) for _ in range(batch)]
    check(caches, [ascending(rng, nodes) for _ in range(batch)], starts, op_backend, nodes)


def test_every_destination_is_the_next_source(op_backend):
    cache = make((1, 2, 70, 128), device=op_backend.device)
    check([cache], [list(range(2, 64))], [3], op_backend, 64)


def test_chain_moves_nothing(op_backend):
    cache = make((1, 2, 20, 8), device=op_backend.device)
    before = bits(cache).clone()
    check([cache], [[1, 2, 3]], [5], op_backend)
    assert torch.equal(bits(cache), before)


@pytest.mark.parametrize("path", [[], [15], list(range(1, 16)), [1, 3, 15]])
def test_cache_edge(path, op_backend):
    caches = [make((1, 2, 32, 8), device=op_backend.device) for _ in range(2)]
    check(caches, [path], [16], op_backend)


def test_idle_request_stays(op_backend):
    cache = make((3, 1, 12, 8), device=op_backend.device)
    check([cache], [None, [2], None], [12, 4, 0], op_backend, 4)


def test_all_layers_in_one_call(op_backend, rng):
    caches = [make((1, 1, 24, 8), torch.bfloat16, device=op_backend.device) for _ in range(24)]
    check(caches, [[2, 5, 9]], [8], op_backend)


def test_second_round_on_the_same_caches(op_backend):
    caches = [make((1, 2, 40, 16), device=op_backend.device) for _ in range(2)]
    check(caches, [[2, 5]], [8], op_backend)
    check(caches, [[3]], [11], op_backend)


@given(data=st.data())
def test_any_path(data, op_backend):
    batch, heads = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 2))
    nodes, width = data.draw(st.integers(1, 64)), data.draw(st.integers(1, 9))
    slots = nodes + data.draw(st.integers(0, 5))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    cache = make((batch, heads, slots, width), dtype, device=op_backend.device)
    subsets = st.sets(st.integers(1, nodes - 1)) if nodes > 1 else st.just(set())
    paths = [sorted(data.draw(subsets)) for _ in range(batch)]
    starts = [data.draw(st.integers(0, slots - nodes)) for _ in range(batch)]
    check([cache], paths, starts, op_backend, nodes)


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize(
    ("path", "length", "start"),
    [
        ([3, 2, -1, -1], 2, 0),
        ([1, 1, -1, -1], 2, 0),
        ([0, 1, -1, -1], 2, 0),
        ([1, -1, -1, -1], 2, 0),
        ([1, 2, 3, 4], 5, 0),
        ([3, -1, -1, -1], 1, 7),
        ([-1, -1, -1, -1], 0, 10),
        ([1, -1, -1, -1], 1, -1),
    ],
)
def test_bad_path_moves_nothing(path, length, start, backend):
    cache = make((2, 1, 10, 4))
    before = bits(cache).clone()
    paths, lengths = int32([[2, 3, -1, -1], path]), int32([2, length])
    with pytest.raises(ValueError, match="request 1 commits"):
        kv_commit([cache], paths, lengths, int32([0, start]), backend=backend)
    assert torch.equal(bits(cache), before)


@pytest.mark.interpreter
def test_kernel_skips_rows_outside_the_cache():
    cache = make((1, 1, 8, 4))
    before = bits(cache).clone()
    kv_commit([cache], int32([[3, 5]]), int32([2]), int32([5]), backend="triton")
    assert torch.equal(bits(cache), before)


GOOD = torch.zeros(2, 1, 8, 4)


@pytest.mark.parametrize(
    ("caches", "message"),
    [
        ([], "caches is empty"),
        ([torch.zeros(2, 8, 4)], r"shape \[2, 8, 4\]"),
        ([torch.zeros(3, 1, 8, 4)], r"expected \[2, H_kv, S, D\]"),
        ([torch.zeros(2, 1, 8, 8)[..., ::2]], "contiguous"),
        ([torch.zeros(2, 1, 1, 4).expand(2, 1, 8, 4)], "do not overlap"),
        ([GOOD, torch.zeros(2, 1, 9, 4)], r"caches\[1\] is torch.float32 \[2, 1, 9, 4\]"),
        ([GOOD, GOOD.half()], r"caches\[1\] is torch.float16"),
        ([GOOD, torch.zeros(2, 8, 1, 4).transpose(1, 2)], r"caches\[1\].*strides"),
        ([GOOD.to("meta")], "on meta"),
    ],
)
def test_bad_caches(caches, message):
    with pytest.raises(ValueError, match=message):
        kv_commit(caches, int32([[1], [1]]), int32([1, 1]), int32([0, 0]))


def test_opcheck():
    caches = [torch.randn(1, 2, 12, 4) for _ in range(2)]
    made = (caches, int32([[2, 3, -1]]), int32([2]), int32([4]), "auto")
    torch.library.opcheck(torch.ops.xspec.kv_commit, made)
