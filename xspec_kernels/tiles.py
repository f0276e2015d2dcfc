"""How the kernels cut y = x W^T into tiles, per weight shape, dtype and card.

The cut decides the order of every sum and with it the bits of the result, so it is a function of
(N, K, dtype, card) and of nothing else: never of the number of rows. All shapes use row blocks of
64. The table holds starting points worked out from bytes in flight and waves over the
multiprocessors; none has been tuned on a device.
"""

from __future__ import annotations

import hashlib
import os
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from xspec_kernels import _triton

BLOCK_M = 64
K_MULTIPLE = 64
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Tile(NamedTuple):
    """One cut of a product.

    Attributes:
        block_n: rows of W in a tile, a power of two.
        block_k: columns of W a step loads.
        split_k: programs that share a tile's sum; partial sums are added in ascending order.
        num_warps, num_stages: Triton's launch options.
        tma: W is read through a host tensor descriptor instead of pointers.
    """

    block_n: int
    block_k: int
    split_k: int
    num_warps: int
    num_stages: int
    tma: bool = False


# (card, N, K) -> tile for float16 and bfloat16. H200: 132 multiprocessors, 227 KiB each.
_TABLE = {
    (90, 12288, 4096): Tile(128, 64, 1, 4, 6, True),
    (90, 6144, 4096): Tile(128, 64, 2, 4, 6, True),
    (90, 4096, 4096): Tile(128, 64, 4, 4, 6, True),
    (90, 22016, 4096): Tile(256, 64, 3, 8, 5, True),
    (90, 28672, 4096): Tile(256, 64, 1, 8, 5, True),
    (90, 4096, 11008): Tile(128, 64, 4, 4, 6, True),
    (90, 4096, 14336): Tile(128, 64, 4, 4, 6, True),
    (90, 32000, 4096): Tile(256, 64, 1, 8, 5, True),
    (90, 32064, 4096): Tile(256, 64, 1, 8, 5, True),
    (90, 128256, 4096): Tile(256, 64, 1, 8, 5, True),
}
# Stages that leave room for two programs on a multiprocessor; 100 KiB of shared memory on 8.6, 8.9.
_NF4_STAGES = {80: 4, 90: 5, 100: 5}
_MULTIPROCESSORS = {80: 108, 86: 84, 89: 128, 90: 132, 100: 148, 120: 170}
_MAX_SPLIT = 8
_MIN_STEPS = 4
INTERPRETER = 0


def card_of(device: torch.device) -> int:
    """Compute capability of the device, 90 for 9.0; `INTERPRETER` where there is no GPU."""
    return _capability(device.index) if device.type == "cuda" else INTERPRETER


@cache
def _capability(index: int | None) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


@cache
def tile_of(N: int, K: int, dtype: torch.dtype, card: int) -> Tile:
    """The tile for a weight [N, K]; K is a multiple of `K_MULTIPLE`."""
    if card == INTERPRETER:
        return Tile(32, 64, min(3, K // 64), 4, 1)
    if dtype == torch.float32:
        return Tile(32, 32, _split(N, K, 32, 32, card), 4, 2)
    if (card, N, K) in _TABLE:
        return _TABLE[card, N, K]
    split = _split(N, K, 128, 64, card)
    few = 2 * split * -(-N // 128) <= _MULTIPROCESSORS.get(card, 80)
    block_n = 64 if few else 128
    # On capability 10.0, four warps of the narrow tile spill one register with the gate.
    return Tile(
        block_n=block_n,
        block_k=64,
        split_k=_split(N, K, block_n, 64, card),
        num_warps=8 if few and card == 100 else 4,
        num_stages=6 if card == 90 else 4,
        tma=card == 90,
    )


def nf4_tile_of(N: int, K: int, dtype: torch.dtype, card: int) -> Tile:
    """The tile for a weight [N, K] in NF4: that of `tile_of` with a step of one block of 64
    weights, so a function of the same four things.
    """
    tile = tile_of(N, K, dtype, card)
    if card == INTERPRETER:
        return tile
    if dtype == torch.float32:
        # A step of 64 columns without matrix units is long; a wider tile would spill registers.
        return Tile(16, K_MULTIPLE, tile.split_k, 8, 2)
    warps = max(4, tile.block_n // 32)
    return Tile(tile.block_n, K_MULTIPLE, tile.split_k, warps, _NF4_STAGES.get(card, 3))


def _split(N: int, K: int, block_n: int, block_k: int, card: int) -> int:
    """The programs a tile that fill one wave, each left with enough steps to pipeline."""
    wave = _MULTIPROCESSORS.get(card, 80) // -(-N // block_n)
    return max(1, min(_MAX_SPLIT, wave, K // block_k // _MIN_STEPS))


def early_launch(card: int) -> bool:
    """Whether kernels start before the previous one has ended and fetch weights meanwhile.

    Programmatic dependent launch, on cards that have it; XSPEC_PDL=0 switches it off. It moves no
    arithmetic, so results do not depend on it.
    """
    return card >= 90 and os.environ.get("XSPEC_PDL") != "0"


def config_hash(card: int) -> str:
    """12 hex digits for results to carry: another hash may mean other bits from the same weights.

    Covers the tiles of the products (this file), the constants of attention (the file of its
    kernels), Triton's version and the card.
    """
    version = _triton.MISSING or _triton.triton.__version__
    here = Path(__file__)
    files = (here, here.parent / "kernels" / "_tree_attention_triton.py")
    key = b"".join([f"{version} {card}\n".encode(), *(file.read_bytes() for file in files)])
    return hashlib.sha256(key).hexdigest()[:12]
