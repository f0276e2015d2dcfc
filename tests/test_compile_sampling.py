"""Kernels of sampling: one binary for every number of rows, no spills, nothing fused."""

from __future__ import annotations

import pytest
import torch

from machine_code import Facts, facts, specialized
from xspec_kernels.kernels import _sampling_triton, _verify_sampling_triton
from xspec_kernels.kernels.sample_tokens import Law

pytest.importorskip("triton")
VOCAB = 32000
LAW = Law(1.25, 50, 0.9)


def shifted(count: int, dtype: torch.dtype) -> torch.Tensor:
    """[count] that starts one item behind an aligned address for odd counts."""
    return torch.zeros(count + 1, dtype=dtype)[count % 2 :]


def launch(kernel: str, nodes: int, dtype: torch.dtype) -> tuple:
    """(the kernel, its arguments, its options) for one tree."""
    wide, narrow = shifted(nodes, torch.int64), shifted(nodes, torch.int32)
    shared = {
        "logits": torch.zeros(VOCAB, dtype=dtype),
        "uniforms": shifted(nodes, torch.float64),
        "num_rows": narrow,
        "N": nodes,
        "inverse": LAW.inverse,
        "top_k": nodes,
        "top_p": LAW.top_p,
    }
    if kernel == "sample":
        module, function = _sampling_triton, _sampling_triton._sample_tokens_kernel
        shared["ids"] = wide
    else:
        module, function = _verify_sampling_triton, _verify_sampling_triton._verify_rejection_kernel
        shared |= {
            "token_ids": wide,
            "parent_idx": narrow,
            "draft_probs": torch.zeros(VOCAB),
            "law": torch.zeros(VOCAB, dtype=torch.int64),
            "accept_len": narrow,
            "accept_path": narrow,
            "output_ids": wide,
            "NODES": 64,
        }
    chosen = _sampling_triton.options(VOCAB, LAW, module.BLOCK, module.SHARE)
    constants = {name: chosen.pop(name) for name in list(chosen) if name.isupper()}
    return function, shared | constants, chosen


def built(kernel: str, cc: int, dtype: torch.dtype) -> tuple[Facts, str]:
    function, arguments, options = launch(kernel, 16, dtype)
    binary = specialized(function, cc, arguments, **options)[1]()
    return facts(binary), binary.asm["ptx"]


@pytest.mark.parametrize("kernel", ["sample", "rejection"])
def test_one_binary_for_every_number_of_rows(kernel):
    keys = set()
    for nodes in (1, 2, 15, 16, 17, 22, 64):
        function, arguments, options = launch(kernel, nodes, torch.bfloat16)
        keys.add(specialized(function, 90, arguments, **options)[0])
    # An address that is not aligned has its own, for the small tensors alone.
    assert len(keys) <= 2


@pytest.mark.parametrize(
    ("kernel", "cc", "dtype"),
    [
        ("sample", 80, torch.float32),
        ("sample", 90, torch.bfloat16),
        ("rejection", 90, torch.bfloat16),
    ],
)
def test_nothing_spills_and_nothing_is_fused(kernel, cc, dtype):
    found, ptx = built(kernel, cc, dtype)
    assert found.spilled == 0 and found.registers <= 128
    assert "fma" not in ptx
    if kernel == "sample":
        # The rejections divide in float64, which takes fused operations of its own.
        assert not any(name.startswith(("FFMA", "DFMA")) for name in found.operations)
