"""Small kernels of the verify path: one binary for every number of rows, wide loads, no spills."""

from __future__ import annotations

import hashlib
import re

import pytest
import torch

from machine_code import facts, specialized
from xspec_kernels.kernels._rope_append_triton import _rope_append_kernel
from xspec_kernels.kernels._verify_tail_triton import _accept_kernel
from xspec_kernels.kernels.embed import _embed_kernel
from xspec_kernels.kernels.kv_commit import _kv_commit_kernel
from xspec_kernels.kernels.norm_act import _norm_act_kernel

pytest.importorskip("triton")
ROWS = [1, 2, 15, 16, 17, 22, 33, 64]
CARDS = [80, 90]
WIDE_LOAD = re.compile(r"ld\.global(?:\.\w+)*\.v4\.b32")


def ints(count: int, shift: int = 0) -> torch.Tensor:
    """[count] int32 that starts `shift` words behind an aligned address."""
    return torch.zeros(count + shift, dtype=torch.int32)[shift:]


def embed_case(rows, width=4096, dtype=torch.bfloat16):
    weight = torch.zeros(8, width, dtype=dtype)
    return {
        "token_ids": torch.zeros(rows + 1, dtype=torch.int64)[rows % 2 :],
        "weight": weight,
        "position": None,
        "out": torch.zeros(rows, width, dtype=dtype),
        "vocab": 32000 + rows,
        "D": width,
        "BLOCK": 1024,
        "INTERPRETED": False,
    }, {"num_warps": 4}


def norm_case(rows, width=4096, dtype=torch.bfloat16, added=True):
    x = torch.zeros(rows, width, dtype=dtype)
    block = 1 << (width - 1).bit_length()
    return {
        "x": x,
        "weight": x[0],
        "residual": x if added else None,
        "y": x,
        "total": x if added else None,
        "eps": 1e-5,
        "D": width,
        "BLOCK": block,
    }, {"num_warps": min(8, max(1, block // 256)), "enable_fp_fusion": False}


def rope_case(rows, width=128, dtype=torch.bfloat16, normed=True):
    heads, slots = (32, 8), 64 * rows + rows % 3
    pad, half = ints(rows, rows % 4), width // 2
    some = torch.zeros(rows, width, dtype=dtype)
    return {
        **dict.fromkeys(("qkv", "cos", "sin", "k_cache", "v_cache", "out"), some),
        **dict.fromkeys(("depth", "cache_seqlens", "num_rows"), pad),
        **dict.fromkeys(("q_norm", "k_norm"), some[0] if normed else None),
        "eps": 1e-6,
        "N": rows,
        "slots": slots,
        "positions": slots,
        "stride_batch": heads[1] * slots,
        "stride_head": slots,
        "stride_slot": 1 if rows > 2 else heads[1],
        "HQ": heads[0],
        "HKV": heads[1],
        "D": width,
        "HEADS": 256 // half,
        "HALF": half,
    }, {"num_warps": 1, "enable_fp_fusion": False}


def accept_case(rows, limited=True):
    narrow, wide = ints(rows, rows % 4), torch.zeros(rows + 1, dtype=torch.int64)[rows % 2 :]
    return {
        **dict.fromkeys(("target_ids", "token_ids", "ancestor_bits"), wide),
        **dict.fromkeys(("root", "sequence", "record"), wide),
        **dict.fromkeys(("flags", "parent_idx", "cache_seqlens", "num_rows"), narrow),
        **dict.fromkeys(("accept_len", "accept_path", "start_out"), narrow),
        "max_new": narrow if limited else None,
        "N": rows,
        "slots": 512 + rows,
        "stride_record": 5 + rows,
        "NODES": 64,
        "INTERPRET": False,
    }, {"num_warps": 2}


def commit_case(rows):
    from triton import language as tl

    narrow = ints(rows, rows % 4)
    return {
        "caches": torch.zeros(4, dtype=torch.int64),
        **dict.fromkeys(("accept_path", "accept_len", "cache_seqlens", "new_seqlens"), narrow),
        "P": rows,
        "slots": 512,
        "stride_batch": 8 * 512 * 32,
        "stride_head": 512 * 32,
        "stride_slot": 32,
        "HEADS": 8,
        "ROW_WORDS": 32,
        "WORD": tl.int64,
        "NODES": 64,
        "BLOCK": 32,
    }, {"num_warps": 4}


KERNELS = {
    "embed": (_embed_kernel, embed_case),
    "norm_act": (_norm_act_kernel, norm_case),
    "rope_append": (_rope_append_kernel, rope_case),
    "accept": (_accept_kernel, accept_case),
    "commit": (_kv_commit_kernel, commit_case),
}


def compiled(name: str, cc: int, rows: int = 16, **case):
    kernel, make = KERNELS[name]
    arguments, options = make(rows, **case)
    return specialized(kernel, cc, arguments, **options)[1]()


@pytest.mark.parametrize("cc", CARDS)
@pytest.mark.parametrize("name", KERNELS)
def test_one_binary_for_every_number_of_rows(name, cc):
    kernel, make = KERNELS[name]
    made = [specialized(kernel, cc, make(rows)[0], **make(rows)[1]) for rows in ROWS]
    assert len({key for key, _ in made}) == 1
    few, many = made[0][1](), made[-1][1]()
    assert len({hashlib.sha256(one.asm["cubin"]).hexdigest() for one in (few, many)}) == 1
    assert facts(few).spilled == 0


@pytest.mark.parametrize("name", ["embed", "rope_append", "accept", "commit"])
def test_a_kernel_that_specializes_has_several(name):
    from triton.runtime.jit import JITFunction

    kernel, make = KERNELS[name]
    plain = JITFunction(kernel.fn)
    assert len({specialized(plain, 90, make(rows)[0], **make(rows)[1])[0] for rows in ROWS}) > 2


@pytest.mark.parametrize("cc", CARDS)
@pytest.mark.parametrize(
    ("name", "case", "loads"),
    [
        # Loads of 16 bytes: a lane's share of each tensor that is read.
        ("embed", {}, 1),
        ("embed", {"width": 576, "dtype": torch.float32}, 2),
        ("norm_act", {}, 6),
        ("norm_act", {"width": 576, "added": False}, 2),
        ("rope_append", {"normed": False}, 6),
        ("rope_append", {"width": 64}, 8),
        ("rope_append", {"width": 256, "dtype": torch.float32, "normed": False}, 12),
    ],
)
def test_rows_are_read_16_bytes_at_a_time(name, case, loads, cc):
    binary = compiled(name, cc, **case)
    assert len(WIDE_LOAD.findall(binary.asm["ptx"])) == loads
    assert facts(binary).spilled == 0


@pytest.mark.parametrize("cc", CARDS)
def test_nothing_is_fused_into_a_rounding_that_transformers_makes(cc):
    for name in ("norm_act", "rope_append"):
        assert "fma" not in compiled(name, cc, dtype=torch.float32).asm["ptx"]


@pytest.mark.parametrize("limited", [True, False])
@pytest.mark.parametrize("cc", CARDS)
def test_the_number_of_a_round_is_stored_last(limited, cc):
    binary = compiled("accept", cc, limited=limited)
    lines = binary.asm["ptx"].splitlines()

    def at(mnemonic):
        return [number for number, line in enumerate(lines) if mnemonic in line]

    (release,) = at("st.release.sys.global.b64")
    stores = at("st.global")
    assert stores and max(stores) < release
    assert any(max(stores) < barrier < release for barrier in at("bar.sync"))
    assert facts(binary).spilled == 0


@pytest.mark.parametrize("cc", CARDS)
def test_the_commit_reads_every_row_before_it_writes_one(cc):
    lines = compiled("commit", cc).asm["ptx"].splitlines()
    loads, stores, barriers = (
        [number for number, line in enumerate(lines) if mnemonic in line]
        for mnemonic in ("ld.global", "st.global", "bar.sync")
    )
    assert any(max(loads) < barrier < max(stores) for barrier in barriers)
