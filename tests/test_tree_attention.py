from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

from attention_cases import Tree, random_round, shuffled, straight, violations
from op_cases import int32
from xspec_kernels.kernels import _tree_attention_triton as kernels
from xspec_kernels.kernels.tree_attention import tree_attention
from xspec_kernels.workspace import Workspace

pytestmark = pytest.mark.usefixtures("poisoned")
NAN = math.nan
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Case(NamedTuple):
    """A ragged batch: every slot and row that is not in use holds NaN."""

    trees: list[Tree]
    lengths: list[int]
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    depth: torch.Tensor
    path_slot: torch.Tensor

    def run(self, backend: str, num_rows: bool = True, **options) -> torch.Tensor:
        device = self.q.device
        rows = int32([len(tree.row) for tree in self.trees], device) if num_rows else None
        tables = self.depth.to(device), self.path_slot.to(device)
        seqlens = int32(self.lengths, device)
        return tree_attention(
            self.q, self.k, self.v, *tables, seqlens, rows, backend=backend, **options
        )

    def keys(self, request: int, row: int) -> list[int]:
        """Slots that the row attends to."""
        n, own = self.lengths[request], int(self.depth[request, row]) + 1
        return [*range(n), *(n + s for s in self.path_slot[request, row, :own].tolist())]

    def attention(self, request: int, row: int, dtype: torch.dtype) -> torch.Tensor:
        """[H_q, D] by torch's own attention in `dtype`."""
        slots = self.keys(request, row)
        group = self.q.shape[2] // self.k.shape[1]
        k, v = (
            cache[request][:, slots].to(dtype).repeat_interleave(group, 0)[None]
            for cache in (self.k, self.v)
        )
        q = self.q[request, row].to(dtype)[None, :, None]
        return F.scaled_dot_product_attention(q, k, v)[0, :, 0]


def make(
    rng, trees, lengths, heads=(2, 1), head_dim=32, dtype=torch.float32, width=32, nodes=None,
    slots=None, device="cpu",
) -> Case:  # fmt: skip
    nodes = nodes or max(len(tree.row) for tree in trees)
    slots = slots or max(n + len(t.row) for n, t in zip(lengths, trees, strict=True)) + 3
    q = torch.full((len(trees), nodes, heads[0], head_dim), NAN)
    k, v = (torch.full((len(trees), heads[1], slots, head_dim), NAN) for _ in "kv")
    depth = torch.full((len(trees), nodes), -99, dtype=torch.int32)
    path_slot = torch.full((len(trees), nodes, width), -99, dtype=torch.int32)
    for b, (tree, n) in enumerate(zip(trees, lengths, strict=True)):
        rows = len(tree.row)
        q[b, :rows] = torch.randn_like(q[b, :rows])
        for cache in (k, v):
            cache[b, :, : n + rows] = torch.randn_like(cache[b, :, : n + rows])
        depth[b, :rows], path_slot[b, :rows] = tree.tables(width)
    q, k, v = (x.to(dtype).to(device) for x in (q, k, v))
    return Case(trees, lengths, q, k, v, depth, path_slot)


def errors(case: Case, out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The op's and torch's own distances from attention in fp64, over all real rows."""
    ours, theirs = [], []
    for b, tree in enumerate(case.trees):
        for row in range(len(tree.row)):
            want = case.attention(b, row, torch.float64)
            ours.append(out[b, row].double() - want)
            theirs.append(case.attention(b, row, case.q.dtype).double() - want)
    return torch.stack(ours).abs(), torch.stack(theirs).abs()


CASES = [
    (1, (4, 4), 32, "fp32", [0, 40]),
    (6, (4, 1), 64, "fp16", [255, 63]),
    (22, (2, 1), 32, "bf16", [300, 513]),
    (64, (2, 1), 32, "fp32", [95, 31]),
    (16, (1, 1), 128, "bf16", [64, 288]),
    (5, (2, 1), 256, "fp16", [257, 1]),
]


@pytest.mark.parametrize(("nodes", "heads", "head_dim", "dtype", "lengths"), CASES)
def test_close_to_attention(nodes, heads, head_dim, dtype, lengths, op_backend, rng):
    trees = [shuffled(rng, nodes, 32), shuffled(rng, max(1, nodes - 3), 32)]
    case = make(rng, trees, lengths, heads, head_dim, DTYPES[dtype], device=op_backend.device)
    out = case.run(op_backend.name)
    assert out.dtype == case.q.dtype and out.shape == case.q.shape
    ours, theirs = errors(case, out)
    assert ours.square().mean().sqrt() <= 2 * theirs.square().mean().sqrt()
    assert ours.max() <= 2 * theirs.max()
    for b, tree in enumerate(trees):
        assert (out[b, len(tree.row) :] == 0).all()


def test_exact_torch_is_close_to_attention(rng, monkeypatch):
    monkeypatch.setenv("XSPEC_EXACT", "1")
    for dtype in DTYPES.values():
        case = make(rng, [shuffled(rng, 20, 32)], [300], (6, 2), 64, dtype)
        ours, theirs = errors(case, case.run("torch"))
        assert ours.max() <= 2 * theirs.max()


def test_sixty_four_columns_take_a_deep_chain(op_backend, rng):
    case = make(rng, [straight(64)], [70], width=64, device=op_backend.device)
    ours, _ = errors(case, case.run(op_backend.name))
    assert ours.max() < 2e-6


def test_scale(op_backend, rng):
    case = make(rng, [straight(2)], [5], device=op_backend.device)
    flat = case.run(op_backend.name, scale=0.0)
    mean = case.v[0, 0, :6].mean(0)
    torch.testing.assert_close(flat[0, 0, 0], mean)
    assert torch.equal(case.run(op_backend.name, scale=32**-0.5), case.run(op_backend.name))


def test_request_without_rows_and_full_cache(op_backend, rng):
    trees = [shuffled(rng, 4, 32), Tree([], []), straight(2)]
    case = make(rng, trees, [36, 40, 38], nodes=5, slots=40, device=op_backend.device)
    out = case.run(op_backend.name)
    ours, _ = errors(case, out)
    assert ours.max() < 2e-6
    assert (out[0, 4:] == 0).all() and (out[1] == 0).all() and (out[2, 2:] == 0).all()


def test_what_must_not_touch_the_bits(op_backend, rng):
    """Bound, capacity, layout, workspace, and whether the number of rows is given."""
    case = make(rng, [shuffled(rng, 6, 32)], [280], device=op_backend.device)
    want = case.run(op_backend.name)
    workspace = Workspace(op_backend.device)
    assert torch.equal(case.run(op_backend.name, False, max_seqlen=280, workspace=workspace), want)
    longer = [F.pad(x, (0, 0, 0, 300), value=NAN) for x in (case.k, case.v)]
    longer = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in longer]
    moved = case._replace(k=longer[0], v=longer[1])
    assert torch.equal(moved.run(op_backend.name, workspace=workspace), want)


def op_attention(backend: str):
    """The op as `violations` calls it."""

    def attention(q, k, v, n, depth, path_slot):
        caches = [torch.full((1, x.shape[1], len(x) + 3, x.shape[2]), NAN) for x in (k, v)]
        for cache, x in zip(caches, (k, v), strict=True):
            cache[0, :, : len(x)] = x.transpose(0, 1)
        tables = depth[None], path_slot[None], int32([n])
        return tree_attention(q[None], *caches, *tables, max_seqlen=n, backend=backend)[0]

    return attention


@pytest.mark.interpreter
@pytest.mark.parametrize(("n", "width"), [(1, 32), (60, 32), (280, 32), (288, 32), (90, 64)])
def test_kernel_holds_the_law(n, width, rng):
    whole = random_round(rng, n, 24, 2, 1, max_depth=width, dtype=torch.float32)
    assert violations(op_attention("triton"), whole, rng, width, nodes=2) == 0


MUTANTS = {
    "path_slot is ignored": [("n + slot, pos", "pos, pos")],
    "rows past their far end take the tile": [("use = start < end", "use = end > -1")],
    "one split too many is merged": [
        ("last = tl.max(splits, 0)", "last = tl.max(splits, 0) + 1"),
        ("use = i < splits", "use = i < splits + 1"),
    ],
    "position from the row's index": [("tl.load(depth + node, mask=ok, other=0)", "row")],
    "the key behind the row counts": [
        ("p - first + 1, 0", "p - first + 2, 0"),
        ("ok & (pos <= p)", "ok & (pos <= p + 1)"),
    ],
}


@pytest.mark.interpreter
@pytest.mark.parametrize("name", [None, *MUTANTS])
def test_planted_error_is_found(name, rng, tmp_path, monkeypatch):
    """At a length where rows of one tree differ in their far end."""
    source = Path(kernels.__file__).read_text()
    for old, new in MUTANTS.get(name, []):
        assert source.count(old) == 1
        source = source.replace(old, new)
    file = tmp_path / "planted.py"
    file.write_text(source)
    spec = importlib.util.spec_from_file_location("planted", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(kernels, "run", module.run)
    case = make(rng, [Tree([-1, *range(11), 0, 0], [*range(13, -1, -1)])], [92])
    ours, _ = errors(case, case.run("triton"))
    assert bool(ours.max() < 2e-6) == (name is None)


@pytest.mark.interpreter
def test_kernel_answers_nan_where_rows_do_not_fit(rng):
    case = make(rng, [straight(2), straight(2)], [3, 4], slots=12)
    full = case._replace(lengths=[3, 11]).run("triton", False)
    assert full[0].isfinite().all() and full[1].isnan().all()
    over = case._replace(lengths=[-1, 4]).run("triton", False, max_seqlen=0)
    assert over.isnan().all()


@pytest.mark.interpreter
def test_kernel_takes_four_head_sizes_and_aligned_tensors(rng):
    case = make(rng, [straight(1)], [1], head_dim=48)
    with pytest.raises(ValueError, match=r"head sizes .*got 48"):
        case.run("triton")
    case = make(rng, [straight(1)], [1])
    odd = torch.zeros(case.q.numel() + 1)[1:].view_as(case.q)
    with pytest.raises(ValueError, match="q starts at"):
        case._replace(q=odd).run("triton")


def test_torch_takes_any_head_size(rng):
    if kernels.INTERPRETED:
        pytest.skip("for the other process")
    case = make(rng, [straight(3)], [9], head_dim=20)
    ours, _ = errors(case, case.run("auto"))
    assert ours.max() < 2e-6


@pytest.mark.parametrize(
    ("lengths", "options", "message"),
    [
        ([3, 11], {}, "request 1 has 11 committed and 2 new rows.*12 in all"),
        ([-1, 3], {}, "request 0 has -1"),
        ([3, 9], {"max_seqlen": 8}, "max_seqlen = 8"),
    ],
)
def test_lengths_that_do_not_fit(lengths, options, message, rng):
    case = make(rng, [straight(2), straight(2)], [3, 4], slots=12)
    with pytest.raises(ValueError, match=message):
        case._replace(lengths=lengths).run("torch", **options)


@pytest.mark.parametrize(("table", "value"), [("depth", 32), ("depth", -1), ("path_slot", 2)])
def test_tables_out_of_range(table, value, rng):
    case = make(rng, [straight(2)], [3])
    broken = getattr(case, table).clone()
    broken[0, 1, ...] = value
    with pytest.raises(ValueError, match="row 1 of request 0 has depth"):
        case._replace(**{table: broken}).run("torch")


def arguments(**changes) -> list:
    """Positional arguments of the op, one or more of them spoiled."""
    good = dict(
        q=torch.zeros(1, 2, 4, 32), k=torch.zeros(1, 2, 8, 32), v=torch.zeros(1, 2, 8, 32),
        depth=int32([[0, 1]]), path_slot=int32([[[0] + [-1] * 31, [0, 1] + [-1] * 30]]),
        seqlens=int32([3]), rows=int32([2]),
    )  # fmt: skip
    return list({**good, **changes}.values())


SPOILED = [
    ({"depth": int32([[0] * 65])}, r"depth has shape \[1, 65\]"),
    ({"depth": torch.zeros(1, 2)}, "depth is torch.float32"),
    ({"path_slot": int32([[[0] * 16] * 2])}, r"path_slot has shape \[1, 2, 16\].*32\]"),
    ({"seqlens": int32([3, 3])}, r"cache_seqlens has shape \[2\]"),
    ({"rows": torch.zeros(1)}, "num_rows is torch.float32"),
    ({"q": torch.zeros(1, 2, 128)}, r"q has shape \[1, 2, 128\].*H_q, D\]"),
    ({"q": torch.zeros(1, 2, 4, 0)}, r"q has shape \[1, 2, 4, 0\].* with D >= 1"),
    ({"q": torch.zeros(())}, r"q has shape \[\], expected \[B, N, H_q, D\]"),
    ({"k": torch.zeros(3)}, r"k_cache has shape \[3\], expected \[B, H_kv, S, D\]"),
    ({"q": torch.zeros(1, 3, 4, 32)}, r"q has shape \[1, 3, 4, 32\], expected \[1, 2"),
    ({"q": torch.zeros(1, 2, 4, 32).double()}, "q is torch.float64"),
    ({"q": torch.zeros(1, 4, 2, 32).transpose(1, 2)}, "q must be contiguous"),
    ({"k": torch.zeros(1, 2, 8, 64), "v": torch.zeros(1, 2, 8, 64)}, r"\[1, H_kv, S, 32\] with"),
    ({"k": torch.zeros(1, 3, 8, 32), "v": torch.zeros(1, 3, 8, 32)}, "a divisor of 4"),
    ({"k": torch.zeros(1, 2, 8, 40)[..., :32], "v": torch.zeros(1, 2, 8, 40)[..., :32]}, "strides"),
    ({"v": torch.zeros(1, 2, 9, 32)}, r"caches\[1\]"),
    ({"v": torch.zeros(1, 2, 8, 32).half()}, r"caches\[1\] is torch.float16"),
    ({"k": torch.zeros(1, 2, 8, 32).half(), "v": torch.zeros(1, 2, 8, 32).half()}, "torch.float32"),
]


@pytest.mark.parametrize(("changes", "message"), SPOILED)
def test_bad_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        tree_attention(*arguments(**changes))


def test_bad_options():
    with pytest.raises(ValueError, match=r"max_seqlen is 9, expected 0..8"):
        tree_attention(*arguments(), max_seqlen=9)
    with pytest.raises(RuntimeError, match="no cuda kernel"):
        tree_attention(*arguments(), backend="cuda")


@pytest.mark.parametrize("scratch", [False, True])
def test_opcheck(scratch):
    made = arguments()
    space = torch.zeros(kernels.scratch_floats(made[0], 8)) if scratch else None
    op = torch.ops.xspec.tree_attention
    torch.library.opcheck(op, (*made, space, 0.2, 8, "auto"))
