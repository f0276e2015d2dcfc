"""nf4_linear as machine code for GPUs that are not here."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from machine_code import facts, operands_outlive, specialized
from test_compile_linear import norm_arguments
from xspec_kernels import nf4
from xspec_kernels.kernels._nf4_linear_triton import nf4_linear_kernel
from xspec_kernels.kernels.nf4_linear import looks_through, nf4_tile_of
from xspec_kernels.nf4 import GROUP

triton = pytest.importorskip("triton")
ROWS = [1, 2, 15, 16, 17, 22, 33, 64]
SHARED = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}
MATRIX = {80: "HMMA.16816.F32", 89: "HMMA.16816.F32", 90: "HGMMA.64x"}
# Of the inner loop, a block of 64 weights from each row of a tile, loads and products included.
# Where x is normalized on its way, so are 64 columns of 64 rows: half as many numbers as weights.
MOST_PER_WEIGHT = {"plain": 8.0, "double": 9.0}
NORM_PER_WEIGHT = 0.5


class Tensor:
    """What the JIT looks at in a tensor, without its memory."""

    def __init__(self, dtype: torch.dtype, address: int = 4096):
        self.dtype, self.address = dtype, address

    def data_ptr(self) -> int:
        return self.address


def launch_arguments(cc: int, N: int, K: int, kind: str, M: int = 22, dtype=torch.bfloat16):
    """(arguments, options) of a launch with M rows on compute capability cc."""
    tile = nf4_tile_of(N, K, dtype, cc)
    x, words = Tensor(dtype), Tensor(torch.int32)
    floats = Tensor(torch.float32)
    double, parts = "double" in kind, 2 if "gate" in kind else 1
    rows = N // parts
    given: dict[str, Any] = {
        "x": x,
        "words": words,
        "early": words if cc >= 90 else None,
        "scales": Tensor(torch.uint8) if double else floats,
        "code": floats,
        "scale_code": floats if double else None,
        "levels": floats if double else None,
        "y": x,
        "bias": x if "bias" in kind else None,
        "residual": x if "residual" in kind else None,
        **norm_arguments(x, kind, "NORM_PARTS"),
        "partial": floats if tile.split_k > 1 else None,
        "semaphore": words,
        "num_rows": words,
        "M": M,
        "bounded": int(M > 1),
        "N": N,
        "K": K,
        "BM": 64,
        "BN": tile.block_n,
        "BK": tile.block_k,
        "SPLIT_K": tile.split_k,
        "GROUPS": parts * -(-rows * (K // nf4.BLOCK) // GROUP) if double else 0,
        "PARTS": parts,
        "GROUP_SIZE": GROUP,
        "GATE": "gate" in kind,
        "OPAQUE": looks_through(cc),
        "INTERPRETED": False,
    }
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    return given, options | ({"launch_pdl": True} if cc >= 90 else {})


def compiled(cc: int, N: int, K: int, kind: str, **changes: Any):
    given, options = launch_arguments(cc, N, K, kind, **changes)
    return specialized(nf4_linear_kernel, cc, given, **options)[1]()


def inner_loop(binary: Any) -> list[str]:
    """Opcodes of the longest loop around a matrix instruction."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True)
    places: dict[str, int] = {}
    opcodes: list[str] = []
    loop: list[str] = []
    for line in text.stdout.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            places[label[1]] = len(opcodes)
        found = re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)(.*)", line)
        if not found:
            continue
        opcodes.append(found[1])
        target = re.search(r"\.L_x_\d+", found[2])
        if found[1].startswith("BRA") and target and target[0] in places:
            body = opcodes[places[target[0]] :]
            if any("MMA" in opcode for opcode in body) and len(body) > len(loop):
                loop = body
    return loop


# Matrices of a 7B; q, k, v and down have the tile of o.
CASES = [
    (80, 4096, 4096, "residual squares", "double"),
    (89, 4096, 4096, "residual squares", "double"),
    (90, 4096, 4096, "residual squares", "double"),
    (90, 4096, 4096, "residual squares", "plain"),
    (80, 22016, 4096, "gate", "double"),
    (90, 22016, 4096, "gate", "double"),
    (80, 22016, 4096, "norm gate", "double"),
    (89, 12288, 4096, "norm", "double"),
    (90, 22016, 4096, "norm gate", "double"),
    (90, 12288, 4096, "norm", "double"),
]


@pytest.mark.parametrize(("cc", "N", "K", "kind", "scales"), CASES)
def test_machine_code(cc, N, K, kind, scales):
    binary = compiled(cc, N, K, f"{kind} {scales}")
    found, tile = facts(binary), nf4_tile_of(N, K, torch.bfloat16, cc)
    assert found.spilled == 0 and found.shared <= SHARED[cc]
    assert len(found.matrix) == 1 and next(iter(found.matrix)).startswith(MATRIX[cc])
    assert cc < 90 or operands_outlive(binary.asm["ptx"])
    per_thread = tile.block_n * tile.block_k / (32 * tile.num_warps)
    cost = len(inner_loop(binary)) / per_thread
    print(f"sm_{cc} {kind} {scales}: {cost:.2f} instructions a weight, {found.registers} registers")
    # On 9.x, where a step is issued in fewer instructions, the norm fits within the same number.
    more = NORM_PER_WEIGHT if "norm" in kind and cc < 90 else 0
    assert 2 < cost <= MOST_PER_WEIGHT[scales] + more
    assert found.wide("LDGSTS.E.BYPASS"), "x and the packed weights, 16 bytes a thread"


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_activations(dtype):
    found = facts(compiled(80, 576, 576, "residual", dtype=dtype))
    assert found.spilled == 0
    assert bool(found.matrix) == (dtype != torch.float32), "float32 never goes through TF32"


@pytest.mark.parametrize("cc", [80, 89, 90])
@pytest.mark.parametrize("kind", ["residual squares", "norm gate double"])
def test_one_key_for_every_number_of_rows(cc, kind):
    launches = [launch_arguments(cc, 4096, 4096, kind, M)[0] for M in ROWS]
    assert len({specialized(nf4_linear_kernel, cc, given)[0] for given in launches}) == 1


def test_one_binary_for_every_number_of_rows(monkeypatch):
    """Compiled anew for each M: the same bits of machine code."""
    monkeypatch.setenv("TRITON_ALWAYS_COMPILE", "1")
    kind = "norm squares double"
    digests = {facts(compiled(80, 576, 576, kind, M=M)).digest for M in (1, 64)}
    assert len(digests) == 1


def test_scales_are_rounded_twice():
    """mul and add of a quantized scale must not become one fused operation."""
    ptx = compiled(80, 576, 576, "double").asm["ptx"]
    assert "mul.rn.f32 a, " in ptx and "add.rn.f32 " in ptx
