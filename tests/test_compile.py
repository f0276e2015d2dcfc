"""The Triton kernels compile for GPUs that are not here, and the machine code is what was meant."""

from __future__ import annotations

import pytest

from machine_code import facts
from xspec_kernels.kernels.kv_commit import _kv_commit_kernel
from xspec_kernels.kernels.tree_mask import _tree_mask_kernel
from xspec_kernels.kernels.verify_greedy import _verify_greedy_kernel

triton = pytest.importorskip("triton")
I32, I64, PTR32, PTR64 = "i32", "i64", "*i32", "*i64"


def compiled(kernel, cc: int, types: dict[str, str], num_warps: int, **constants):
    """The kernel's compiled form for compute capability `cc`; needs no driver."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    absent = {name: None for name in names if name not in types and name not in constants}
    source = ASTSource(fn=kernel, signature=signature, constexprs={**constants, **absent})
    return triton.compile(
        source, target=GPUTarget("cuda", cc, 32), options={"num_warps": num_warps}
    )


def tree_mask_types(rows: bool) -> dict[str, str]:
    types = {"parent_idx": PTR32, "ancestor_bits": PTR64, "depth_out": PTR32}
    types |= {"path_slot": PTR32, "status_out": PTR32, "N": I32}
    return types | ({"num_rows": PTR32} if rows else {})


def verify_types(rows: bool) -> dict[str, str]:
    types = {"token_ids": PTR64, "parent_idx": PTR32, "target_ids": PTR64, "ancestor_bits": PTR64}
    types |= {"accept_len": PTR32, "accept_path": PTR32, "output_ids": PTR64, "N": I32}
    return types | ({"num_rows": PTR32} if rows else {})


COMMIT_TYPES = {
    "caches": PTR64,
    **dict.fromkeys(("accept_path", "accept_len", "cache_seqlens", "new_seqlens"), PTR32),
    **dict.fromkeys(("P", "slots", "stride_batch", "stride_head", "stride_slot"), I32),
}


@pytest.mark.parametrize("rows", [True, False], ids=["ragged", "full"])
@pytest.mark.parametrize("cc", [80, 90])
def test_tree_mask(cc, rows):
    for depth in (32, 64):
        types = tree_mask_types(rows)
        binary = compiled(_tree_mask_kernel, cc, types, 2, NODES=64, DEPTH=depth)
        assert facts(binary).spilled == 0


@pytest.mark.parametrize("rows", [True, False], ids=["ragged", "full"])
@pytest.mark.parametrize("cc", [80, 90])
def test_verify_greedy(cc, rows):
    binary = compiled(_verify_greedy_kernel, cc, verify_types(rows), 2, NODES=64)
    assert facts(binary).spilled == 0


@pytest.mark.parametrize("word", [8, 16, 32, 64])
@pytest.mark.parametrize("cc", [80, 90])
def test_kv_commit_reads_every_row_before_it_writes_one(cc, word):
    from triton import language as tl

    binary = compiled(
        _kv_commit_kernel, cc, COMMIT_TYPES, 4,
        HEADS=8, ROW_WORDS=32, WORD=getattr(tl, f"int{word}"), NODES=64, BLOCK=32,
    )  # fmt: skip
    lines = binary.asm["ptx"].splitlines()
    loads, stores, barriers = (
        [number for number, line in enumerate(lines) if mnemonic in line]
        for mnemonic in ("ld.global", "st.global", "bar.sync")
    )
    first_row_store = max(loads)
    assert any(first_row_store < barrier < max(stores) for barrier in barriers)
    last_barrier = max(barriers)
    row_stores = [store for store in stores if store > last_barrier]
    assert row_stores, "the rows are stored after the barrier"
    assert facts(binary).spilled == 0
