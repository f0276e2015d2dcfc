"""skinny_linear and lm_head_argmax as machine code for GPUs that are not here."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from machine_code import (
    Facts,
    facts,
    operands_outlive,
    publishes_partials,
    specialized,
    waits_first,
)
from xspec_kernels._triton import TensorDescriptor, tl
from xspec_kernels.kernels.lm_head_argmax import _lm_head_join_kernel, _lm_head_tiles_kernel
from xspec_kernels.kernels.skinny_linear import _skinny_linear_kernel
from xspec_kernels.tiles import Tile, tile_of

pytest.importorskip("triton")
ROWS = [1, 2, 15, 16, 17, 22, 33, 64]
# Bytes of shared memory that one program may have.
SHARED = {80: 163 * 1024, 90: 227 * 1024}
MATRIX = {80: "HMMA.16816.F32.BF16", 90: "HGMMA.64x"}
HEAD = "argmax"


class Weight:
    """What the JIT looks at in a tensor, without its memory."""

    def __init__(self, *shape: int, dtype: torch.dtype = torch.bfloat16, address: int = 4096):
        self.shape, self.dtype, self.address = shape, dtype, address

    def data_ptr(self) -> int:
        return self.address


def norm_arguments(x: Any, kind: str, parts: str = "PARTS") -> dict[str, Any]:
    """Of a kernel that normalizes x, whose maker had 32 tiles, or leaves squares of its own."""
    sums = Weight(64, dtype=torch.float32)
    return {
        "norm": x if "norm" in kind else None,
        "squares": sums if "norm" in kind else None,
        "squares_out": sums if "squares" in kind else None,
        "eps": 1e-5,
        parts: 32 if "norm" in kind else 0,
    }


def launch_arguments(cc: int, N: int, K: int, kind: str, M: int = 22, **changes: Any):
    """(kernel, its arguments, launch options) of a launch with M rows on compute capability cc."""
    dtype = changes.pop("dtype", torch.bfloat16)
    tile: Tile = tile_of(N, K, dtype, cc)
    x, w = Weight(M, K, dtype=dtype), Weight(N, K, dtype=dtype)
    sums, counts = Weight(64, dtype=torch.float32), Weight(64, dtype=torch.int32)
    block = [tile.block_n, tile.block_k]
    arguments = {
        "x": x,
        "w": TensorDescriptor(w, [N, K], [K, 1], block) if tile.tma else w,
        "weights": w if cc >= 90 else None,
        "partial": sums if tile.split_k > 1 else None,
        "semaphore": counts,
        "num_rows": counts,
        "M": M,
        "bounded": int(M > 1),
        "N": N,
        "K": K,
        "BM": 64,
        "BN": tile.block_n,
        "BK": tile.block_k,
        "SPLIT_K": tile.split_k,
        "TMA": tile.tma,
        "INTERPRETED": False,
    }
    if kind == HEAD:
        kernel = _lm_head_tiles_kernel
        arguments |= {"tile_best": sums, "tile_second": sums, "tile_index": counts}
        arguments["bias"] = None
        arguments["ROUND_TO"] = tl.bfloat16
    else:
        kernel = _skinny_linear_kernel
        arguments |= {"y": x, "GATE": "gate" in kind} | norm_arguments(x, kind)
        arguments |= {name: x if name in kind else None for name in ("bias", "residual")}
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    return kernel, arguments | changes, options | ({"launch_pdl": True} if cc >= 90 else {})


def compiled(cc: int, N: int, K: int, kind: str, **changes: Any) -> Any:
    kernel, arguments, options = launch_arguments(cc, N, K, kind, **changes)
    return specialized(kernel, cc, arguments, **options)[1]()


def built(cc: int, N: int, K: int, kind: str, **changes: Any) -> Facts:
    return facts(compiled(cc, N, K, kind, **changes))


SHAPES = {
    "Llama-7B o": (4096, 4096, "residual squares"),
    "Llama-7B gate and up": (22016, 4096, "norm gate"),
    "Llama-7B plain gate and up": (22016, 4096, "gate"),
    "Llama-7B head": (32000, 4096, HEAD),
    "Llama-3-8B qkv": (6144, 4096, "norm bias"),
    "SmolLM2 down": (576, 1536, "residual"),
}


@pytest.mark.parametrize("cc", [80, 90])
@pytest.mark.parametrize("name", SHAPES)
def test_machine_code(cc, name):
    found = built(cc, *SHAPES[name])
    assert found.spilled == 0 and found.shared <= SHARED[cc]
    assert found.matrix and all(opcode.startswith(MATRIX[cc]) for opcode in found.matrix)
    assert len(found.matrix) == 1
    assert found.wide("LDGSTS"), "x, and W where it goes through pointers, 16 bytes a thread"
    operations = found.operations
    assert ("UTMALDG.2D" in operations) == (cc == 90), "W through a tensor descriptor"
    waits = [operations[name] for name in ("CCTL.E.PF2", "ACQBULK", "PREEXIT")]
    assert all(waits) == (cc == 90) and any(waits) == (cc == 90)


@pytest.mark.parametrize("cc", [80, 90])
@pytest.mark.parametrize("name", SHAPES)
def test_order_of_what_other_programs_see(cc, name):
    N, K, kind = SHAPES[name]
    ptx = compiled(cc, N, K, kind).asm["ptx"]
    assert waits_first(ptx) == (cc == 90)
    assert publishes_partials(ptx) == (tile_of(N, K, torch.bfloat16, cc).split_k > 1)


@pytest.mark.parametrize("name", SHAPES)
def test_no_register_is_written_while_a_matrix_instruction_reads_it(name):
    """A norm leaves x in registers, elsewhere it lies in shared memory."""
    assert operands_outlive(compiled(90, *SHAPES[name]).asm["ptx"])


@pytest.mark.parametrize("cc", [80, 90])
@pytest.mark.parametrize("kind", ["residual squares", "norm gate", HEAD])
def test_one_key_for_every_number_of_rows(cc, kind):
    launches = [launch_arguments(cc, 4096, 4096, kind, M) for M in ROWS]
    assert len({specialized(kernel, cc, given)[0] for kernel, given, _ in launches}) == 1


def test_one_key_wherever_the_row_count_lies():
    kernel, arguments, _ = launch_arguments(90, 4096, 4096, "residual")
    places = [Weight(1, dtype=torch.int32, address=address) for address in (4096, 4100)]
    keys = {specialized(kernel, 90, arguments | {"num_rows": place})[0] for place in places}
    assert len(keys) == 1


@pytest.mark.parametrize("cc", [80, 90])
def test_one_binary_for_every_number_of_rows(cc, monkeypatch):
    """Compiled anew for each M: the same bits of machine code."""
    monkeypatch.setenv("TRITON_ALWAYS_COMPILE", "1")
    kind = "norm residual squares"
    digests = {built(cc, 576, 576, kind, M=M).digest for M in (1, 64)}
    assert len(digests) == 1


def test_rows_as_plain_integers_would_be_many_kernels():
    """The mutant: the same kernel without do_not_specialize."""
    from triton.runtime.jit import JITFunction

    careless = JITFunction(_skinny_linear_kernel.fn)
    arguments = [launch_arguments(90, 4096, 4096, "norm residual squares", M)[1] for M in ROWS]
    assert len({specialized(careless, 90, given)[0] for given in arguments}) > 2


@pytest.mark.parametrize("cc", [80, 90])
def test_float32_never_goes_through_tf32(cc):
    found = built(cc, 576, 576, "norm residual squares", dtype=torch.float32)
    assert found.spilled == 0 and not found.matrix


@pytest.mark.parametrize("cc", [80, 90])
def test_join(cc):
    sums, counts = Weight(64, dtype=torch.float32), Weight(64, dtype=torch.int32)
    wide = Weight(64, dtype=torch.int64)
    given = dict.fromkeys(("tile_index", "num_rows", "flags"), counts)
    given |= {"tile_best": sums, "tile_second": sums, "best_out": sums, "ids": wide}
    given |= {"TWO_ULP": 2.0**-6, "TILES": 1002, "WIDTH": 1024, "EARLY": cc >= 90}
    keys = {
        specialized(_lm_head_join_kernel, cc, given | {"M": M, "bounded": M % 2})[0] for M in ROWS
    }
    assert len(keys) == 1
    build = specialized(_lm_head_join_kernel, cc, given | {"M": 22, "bounded": 1}, num_warps=4)[1]
    assert facts(build()).spilled == 0
