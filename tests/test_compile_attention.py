"""One binary of tree_attention for every N, length and capacity, compiled for GPUs not at hand."""

from __future__ import annotations

import os
import re
import subprocess
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from xspec_kernels.kernels import _tree_attention_triton as attention

triton = pytest.importorskip("triton")

NODES = [1, 2, 15, 16, 17, 22, 33, 64]
CAPACITIES = [256, 4096, 4352, 32768]
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
OPCODE = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]+)", re.M)
SHARED = {80: 163, 90: 227}  # KiB a program may use


class Machine(NamedTuple):
    """What a binary holds: how often each instruction, bytes of stack, bytes of shared memory."""

    opcodes: Counter
    stack: int
    shared: int

    @property
    def matrix(self) -> dict[str, int]:
        return {op: n for op, n in self.opcodes.items() if re.match("HMMA|HGMMA|UTCHMMA", op)}

    @property
    def spills(self) -> int:
        return self.stack + sum(
            n for op, n in self.opcodes.items() if op.startswith(("STL", "LDL"))
        )


def specialized(kernel, cc: int, arguments: dict, **options):
    """(the key under which Triton would look for a binary, a function that makes that binary)."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    target = GPUTarget("cuda", cc, 32)
    backend = make_backend(target)
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, key, _ = binder(**arguments)
    parsed, signature, constants, attributes = kernel._pack_args(
        backend, dict(options), bound, key, options
    )
    source = ASTSource(kernel, signature, constants, attributes)
    return repr(key), lambda: triton.compile(source, target=target, options=parsed.__dict__)


def inspect(binary, tmp_path: Path) -> Machine:
    if not os.access(TOOLS / "nvdisasm", os.X_OK):
        pytest.skip("this Triton carries no nvdisasm")
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(binary.asm["cubin"])

    def output(tool: str, option: str) -> str:
        command = [TOOLS / tool, option, cubin]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    usage = output("cuobjdump", "--dump-resource-usage")
    return Machine(
        Counter(OPCODE.findall(output("nvdisasm", "-c"))),
        sum(int(n) for n in re.findall(r"(?:STACK|LOCAL):(\d+)", usage)),
        binary.metadata.shared,
    )


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
def test_one_binary_for_every_n_and_capacity(cc, tmp_path):
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
    machine = inspect(next(iter(made.values())), tmp_path)
    assert machine.spills == 0 and machine.shared <= SHARED[cc] * 1024
    assert all(op.startswith("HGMMA" if cc == 90 else "HMMA.16816") for op in machine.matrix)
    # 128 / 16 products for q k^T and 32 / 16 for w v: the body of the tile loop exists once.
    assert cc != 90 or sum(machine.matrix.values()) == 10
    wide = sum(n for op, n in machine.opcodes.items() if re.match(r"LDG(STS)?\..*128", op))
    assert wide > 0


@pytest.mark.parametrize("head_dim", [32, 128, 256])
def test_one_merge_binary(head_dim, tmp_path):
    made = {}
    for case in CASES:
        arguments, options = merge(*case, head_dim)
        key, build = specialized(attention._merge_kernel, 90, arguments, **options)
        made[key] = build
    assert len(made) == 1
    assert inspect(next(iter(made.values()))(), tmp_path).spills == 0


@pytest.mark.parametrize(
    ("heads", "head_dim", "dtype"),
    [
        ((14, 2), 64, torch.float16),
        ((8, 2), 256, torch.bfloat16),
        ((4, 4), 32, torch.float32),
        ((8, 2), 256, torch.float32),
    ],
)
def test_budget(heads, head_dim, dtype, tmp_path):
    arguments, options = partials(80, 22, 4096, heads, head_dim, dtype)
    machine = inspect(
        specialized(attention._partials_kernel, 80, arguments, **options)[1](), tmp_path
    )
    # 99 KiB is what cards of compute capability 8.6 and 8.9 give.
    assert machine.spills == 0 and machine.shared <= 99 * 1024
    # fp32 runs on the ordinary units: TF32 would be another precision.
    assert bool(machine.matrix) == (dtype != torch.float32)


def test_kernel_that_specializes_on_numbers_is_noticed():
    from triton.runtime.jit import JITFunction

    careless = JITFunction(attention._partials_kernel.fn)
    keys = {specialized(careless, 90, partials(90, *case)[0])[0] for case in CASES}
    assert len(keys) > 3
