"""One binary of tree_attention for every N, length and capacity, compiled for GPUs not at hand."""

from __future__ import annotations

import re

import pytest
import torch

from machine_code import facts, operands_outlive, specialized
from xspec_kernels.kernels import _tree_attention_triton as attention

pytest.importorskip("triton")

NODES = [1, 2, 15, 16, 17, 22, 33, 64]
CAPACITIES = [256, 4096, 4352, 32768]
SHARED = {80: 163, 90: 227}  # KiB a program may use


def partials(cc: int, nodes=1, slots=256, heads=(32, 8), head_dim=128, dtype=torch.bfloat16):
    """Arguments and options as `run` launches them, with slices that start anywhere."""
    numbers, elements = (
        torch.zeros(64, dtype=torch.int32)[nodes % 2 :],
        torch.zeros(64, dtype=dtype),
    )
    config = attention.config(cc, head_dim, dtype.itemsize)._asdict()
    options = {name: config.pop(name) for name in ("num_warps", "num_stages")}
    arguments = dict(
        q=elements, k=elements, v=elements, depth=numbers, path_slot=numbers, cache_seqlens=numbers,
        num_rows=numbers, scratch=torch.zeros(64), scale=0.1275, N=nodes,
        max_splits=attention.max_splits(slots), ragged=nodes % 2, slots=slots,
        kv_batch=slots * heads[1], kv_head=slots, HQ=heads[0], HKV=heads[1], D=head_dim,
        ROW=head_dim + 8, SLOT=1, TILE=attention.TILE, SPLIT=attention.SPLIT, WINDOW=32,
        INTERPRETED=False, **config,
    )  # fmt: skip
    return arguments, options


def merge(nodes: int, slots: int, head_dim: int = 128):
    arguments, _ = partials(90, nodes, slots, head_dim=head_dim)
    names = attention._merge_kernel.arg_names
    shared = {name: value for name, value in arguments.items() if name in names}
    constants = {"RB": max(1, 128 // head_dim), "CHUNK": 32}
    return {**shared, "out": arguments["q"], **constants}, {"num_warps": 1}


CASES = [(nodes, slots) for nodes in NODES for slots in CAPACITIES]


@pytest.mark.parametrize("cc", [80, 90])
def test_one_binary_for_every_n_and_capacity(cc):
    keys, made = set(), {}
    for nodes, slots in CASES:
        arguments, options = partials(cc, nodes, slots)
        key, build = specialized(attention._partials_kernel, cc, arguments, **options)
        keys.add(key)
        if slots == 4096:
            binary = build()
            made[binary.asm["cubin"]] = binary
    # One binary is one set of instructions, in one order.
    assert len(keys) == 1 and len(made) == 1
    (binary,) = made.values()
    assert cc != 90 or operands_outlive(binary.asm["ptx"])
    machine = facts(binary)
    assert machine.spilled == 0 and machine.shared <= SHARED[cc] * 1024
    assert all(op.startswith("HGMMA" if cc == 90 else "HMMA.16816") for op in machine.matrix)
    # 128 / 16 products for q k^T and 32 / 16 for w v: the body of the tile loop exists once.
    assert cc != 90 or sum(machine.matrix.values()) == 10
    wide = sum(n for op, n in machine.operations.items() if re.match(r"LDG(STS)?\..*128", op))
    assert wide > 0


@pytest.mark.parametrize("head_dim", [32, 128, 256])
def test_one_merge_binary(head_dim):
    made = {}
    for case in CASES:
        arguments, options = merge(*case, head_dim)
        key, build = specialized(attention._merge_kernel, 90, arguments, **options)
        made[key] = build
    assert len(made) == 1
    assert facts(next(iter(made.values()))()).spilled == 0


@pytest.mark.parametrize(
    ("heads", "head_dim", "dtype"),
    [
        ((14, 2), 64, torch.float16),
        ((8, 2), 256, torch.bfloat16),
        ((4, 4), 32, torch.float32),
        ((8, 2), 256, torch.float32),
    ],
)
def test_budget(heads, head_dim, dtype):
    arguments, options = partials(80, 22, 4096, heads, head_dim, dtype)
    machine = facts(specialized(attention._partials_kernel, 80, arguments, **options)[1]())
    # 99 KiB is what cards of compute capability 8.6 and 8.9 give.
    assert machine.spilled == 0 and machine.shared <= 99 * 1024
    # fp32 runs on the ordinary units: TF32 would be another precision.
    assert bool(machine.matrix) == (dtype != torch.float32)


def test_kernel_that_specializes_on_numbers_is_noticed():
    from triton.runtime.jit import JITFunction

    careless = JITFunction(attention._partials_kernel.fn)
    keys = {specialized(careless, 90, partials(90, *case)[0])[0] for case in CASES}
    assert len(keys) > 3
