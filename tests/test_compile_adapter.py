"""The kernels of adapter_forward for GPUs that are not here: one binary for every number of rows.

What each costs as machine code is in the compile table.
"""

from __future__ import annotations

import hashlib

import pytest
import torch

from machine_code import operands_outlive, waits_first
from xspec_kernels import adapter_forward
from xspec_runtime.gpu import compile_adapters
from xspec_runtime.gpu.machine_code import Launch, recorded, source_of

pytest.importorskip("triton")
ROWS = [1, 2, 5, 15, 16, 17, 33, 64]


def launches(cc: int, network, rows: int, shift: int = 0, dtype=torch.bfloat16) -> list[Launch]:
    """Of one call; the number of rows lies `shift` words behind an aligned address."""
    width = None if hasattr(network, "position") else network.head.shape[1]
    fed = torch.empty(rows, dtype=torch.int64) if width is None else torch.empty(
        rows, width, dtype=dtype
    )  # fmt: skip
    count = torch.empty(1 + shift, dtype=torch.int32)[shift:] if rows != 5 else None
    with recorded(cc) as found:
        adapter_forward(network, fed, count, round_to=dtype, backend="triton")
    return found


@pytest.mark.parametrize("cc", [80, 90])
@pytest.mark.parametrize("kind", ["TokenAdapter", "L1", "L3", "L4"])
def test_one_key_for_every_number_of_rows(kind, cc):
    """Also where no number of rows is given, and wherever it lies."""
    network = compile_adapters.network(kind)
    keys = [
        [source_of(one, cc).digest for one in launches(cc, network, rows, rows % 3)]
        for rows in ROWS
    ]
    assert all(key == keys[0] for key in keys)
    # Two layers of a TokenAdapter; blocks of L3.
    assert len(keys[0]) == {"TokenAdapter": 14, "L1": 6, "L3": 8, "L4": 9}[kind]


def test_one_binary_for_every_number_of_rows(monkeypatch):
    """Compiled anew for each M: the same bits of machine code."""
    monkeypatch.setenv("TRITON_ALWAYS_COMPILE", "1")
    network = compile_adapters.network("TokenAdapter")
    cubins = []
    for rows in (1, 64):
        # Attention; the product behind a norm, before GELU.
        chosen = [launches(90, network, rows)[place] for place in (2, 4)]
        made = [source_of(one, 90).compile().asm for one in chosen]
        cubins.append([hashlib.sha256(binary["cubin"]).hexdigest() for binary in made])
    assert cubins[0] == cubins[1]
    assert all(waits_first(one["ptx"]) for one in made)
    assert operands_outlive(made[1]["ptx"])


@pytest.mark.parametrize("place", [-3, -1], ids=["layer_norm", "lm_head_join"])
def test_early_kernels_wait_before_they_read(place):
    """And before they may end, as the kernel behind relies on a chain of waits."""
    found = launches(90, compile_adapters.network("TokenAdapter"), 16)[place]
    assert found.given["launch_pdl"] and waits_first(source_of(found, 90).compile().asm["ptx"])
