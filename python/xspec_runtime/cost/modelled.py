"""Modelled times of a verify on a GPU: bytes and operations over stated rates. None is a
measurement, and everything that leaves this module says so.

A pass is a list of launches. Each takes the longest of four times, what it brings from memory, what
it moves through L2, its matrix operations and its other instructions, and a fixed time for filling
and draining the card. Counts follow `targets.llama_decoder` and `xspec_kernels.tiles`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from math import ceil

import torch

from xspec_kernels import tiles

from ..targets.llama_weights import LlamaShape

SCHEMA = "xspec.modelled/1"
PROMPTS = (2076, 4124)
ROWS = (1, 22, 64)
# Bytes a weight: NF4 has half a byte, an 8-bit scale for 64 weights, an fp32 one for 256 of those.
WEIGHTS = {"bf16": 2.0, "nf4": 0.5 + 1 / 64 + 4 / (64 * 256)}
ACTIVATION, PARTIAL = 2, 4
# Keys that attention gathers along a row's path, and keys of one split before them.
NEAR, SPLIT = 63, 256


@dataclass(frozen=True, slots=True)
class Card:
    """Rates of a card.

    Attributes:
        capability: 90 for 9.0; picks the tiles.
        bandwidth: GB/s of its memory, data sheet.
        matrix: TFLOP/s in bf16, dense, fp32 sums, data sheet.
        multiprocessors, clock: data sheet; clock in GHz, boost.
        l2: GB/s, assumed.
    """

    title: str
    capability: int
    bandwidth: float
    matrix: float
    multiprocessors: int
    clock: float
    l2: float

    @property
    def issue(self) -> float:
        """Lane instructions a second: four warps of 32 a clock and multiprocessor."""
        return 1e9 * self.multiprocessors * 128 * self.clock


CARDS = {
    "h200": Card("NVIDIA H200 SXM", 90, 4800, 989.5, 132, 1.98, 5500),
    "h100": Card("NVIDIA H100 SXM", 90, 3350, 989.5, 132, 1.98, 5500),
    "a100": Card("NVIDIA A100 SXM 80 GB", 80, 2039, 312, 108, 1.41, 4000),
    "4090": Card("NVIDIA GeForce RTX 4090", 89, 1008, 165.2, 128, 2.52, 5000),
    "3090": Card("NVIDIA GeForce RTX 3090", 86, 936, 71, 82, 1.695, 2500),
}


@dataclass(frozen=True, slots=True)
class Assumed:
    """What no data sheet says; every value is an assumption.

    Attributes:
        copy: share of the data sheet's bandwidth that a plain copy reaches; the floor uses it.
        weights, cache: shares of the copy's bandwidth reached on weights, and on K and V.
        matrix: share of the data sheet's matrix rate.
        instructions: of one NF4 weight; the compiled Triton kernel has 6 to 7.3.
        launch_us: filling and draining the card, a launch inside a graph.
        launch_range_us: the least and most of that, for the range of every time.
    """

    copy: float = 0.90
    weights: float = 0.97
    cache: float = 0.90
    matrix: float = 0.80
    instructions: float = 7.0
    launch_us: float = 2.0
    launch_range_us: tuple[float, float] = (1.0, 4.0)


@dataclass(frozen=True, slots=True)
class Launch:
    """What one kind of launch of a pass does, each time.

    Attributes:
        times: launches of this kind in a pass.
        weights, cache: bytes from memory.
        l2: bytes between L2 and the multiprocessors.
        matrix: operations of the matrix units, padding rows included.
        codes: NF4 weights to look up.
        instructions: lane instructions besides.
    """

    name: str
    times: int
    weights: float = 0.0
    cache: float = 0.0
    l2: float = 0.0
    matrix: float = 0.0
    codes: float = 0.0
    instructions: float = 0.0

    def parts(self, card: Card, assumed: Assumed) -> dict[str, float]:
        """Microseconds by what could bound it."""
        copy = 1e9 * card.bandwidth * assumed.copy
        memory = self.weights / assumed.weights + self.cache / assumed.cache
        return {
            "memory": 1e6 * memory / copy,
            "L2": 1e-3 * (self.weights + self.cache + self.l2) / card.l2,
            "matrix": 1e-6 * self.matrix / (card.matrix * assumed.matrix),
            "issue": 1e6 * (self.instructions + self.codes * assumed.instructions) / card.issue,
        }


def verify_launches(
    shape: LlamaShape, weights: str, prompt: int, rows: int, card: Card
) -> list[Launch]:
    """The launches of a pass over `rows` rows behind `prompt` tokens.

    Raises:
        ValueError: unknown weights, or rows outside 1..64.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights must be one of {', '.join(WEIGHTS)}, got {weights!r}")
    if not 1 <= rows <= tiles.BLOCK_M:
        raise ValueError(f"rows must be in 1..{tiles.BLOCK_M}, got {rows}")
    s, width = shape, shape.heads * shape.head_dim

    def product(name: str, n: int, k: int, times: int, kind: str = weights) -> Launch:
        tile = tiles.tile_of(n, k, torch.bfloat16, card.capability)
        again = ceil(n / tile.block_n) * rows * k * ACTIVATION
        partial = 2 * tile.split_k * rows * n * PARTIAL if tile.split_k > 1 else 0
        return Launch(
            name, times, n * k * WEIGHTS[kind], l2=again + partial + rows * n * ACTIVATION,
            matrix=2 * tiles.BLOCK_M * n * k,
            codes=n * k if kind == "nf4" else 0.0,
        )  # fmt: skip

    blocks = ceil(rows * s.heads / s.kv_heads / tiles.BLOCK_M) * tiles.BLOCK_M
    scratch = 2 * rows * s.heads * (ceil(prompt / SPLIT) + 1) * (s.head_dim + 2) * PARTIAL
    few = rows * s.hidden * ACTIVATION
    return [
        product("q, k, v", sum(s.qkv), s.hidden, s.layers),
        Launch("rotary and append", s.layers, l2=2 * rows * sum(s.qkv) * ACTIVATION),
        Launch(
            "attention", s.layers,
            cache=2 * (prompt + rows) * s.kv_heads * s.head_dim * ACTIVATION,
            l2=scratch / 2, matrix=4 * blocks * s.kv_heads * prompt * s.head_dim,
            instructions=4 * rows * s.heads * NEAR * s.head_dim,
        ),
        Launch("attention merge", s.layers, l2=scratch / 2),
        product("o", s.hidden, width, s.layers),
        product("gate, up", 2 * s.intermediate, s.hidden, s.layers),
        product("down", s.hidden, s.intermediate, s.layers),
        product("head", s.vocab, s.hidden, 1, "bf16"),
        # Tree in, tree_mask, embed, squares, last norm; join of the head, accept, commit.
        Launch("once a pass", 8, l2=8 * few),
    ]  # fmt: skip


def floor_bytes(launches: Sequence[Launch]) -> float:
    """The fewest bytes that a pass brings from memory."""
    return sum(launch.times * (launch.weights + launch.cache) for launch in launches)


def pass_ms(
    launches: Sequence[Launch], card: Card, assumed: Assumed, launch_us: float
) -> tuple[float, str]:
    """Milliseconds of a pass, and what bounds most of that time."""
    by = {"launches": 0.0}
    for launch in launches:
        parts = launch.parts(card, assumed)
        bound = max(parts, key=parts.__getitem__)
        by[bound] = by.get(bound, 0.0) + launch.times * parts[bound]
        by["launches"] += launch.times * launch_us
    return sum(by.values()) / 1e3, max(by, key=by.__getitem__)


def modelled_rows(
    shape: LlamaShape,
    card_name: str,
    weights: Sequence[str] = tuple(WEIGHTS),
    prompts: Sequence[int] = PROMPTS,
    rows: Sequence[int] = ROWS,
    assumed: Assumed = Assumed(),
) -> Iterator[dict[str, object]]:
    """One row of the table for every weights, prompt and number of rows.

    Raises:
        ValueError: an unknown card, weights, or rows outside 1..64.
    """
    card = find_card(card_name)
    for kind in weights:
        for prompt in prompts:
            passes = {m: verify_launches(shape, kind, prompt, m, card) for m in {1, *rows}}
            one = pass_ms(passes[1], card, assumed, assumed.launch_us)[0]
            for m in sorted(rows):
                ms, bound = pass_ms(passes[m], card, assumed, assumed.launch_us)
                least, most = (
                    pass_ms(passes[m], card, assumed, us)[0] for us in assumed.launch_range_us
                )
                nbytes = floor_bytes(passes[m])
                floor = 1e-6 * nbytes / (card.bandwidth * assumed.copy)
                yield {
                    "card": card_name, "weights": kind, "prompt_tokens": prompt, "rows": m,
                    "modelled_ms": ms, "modelled_least_ms": least, "modelled_most_ms": most,
                    "modelled_ratio": ms / one, "modelled_floor_ms": floor,
                    "modelled_floor_ratio": ms / floor, "modelled_bound": bound,
                    "counted_bytes": round(nbytes),
                    "counted_operations": sum(x.times * x.matrix for x in passes[m]),
                    "counted_launches": sum(x.times for x in passes[m]),
                }  # fmt: skip


def find_card(name: str) -> Card:
    """The card of that name.

    Raises:
        ValueError: there is none; the message lists them.
    """
    if name not in CARDS:
        raise ValueError(f"card must be one of {', '.join(CARDS)}, got {name!r}")
    return CARDS[name]


def modelled_results(
    command: str,
    config: str,
    shape: LlamaShape,
    cards: Sequence[str],
    weights: Sequence[str] = tuple(WEIGHTS),
    prompts: Sequence[int] = PROMPTS,
    rows: Sequence[int] = ROWS,
) -> dict[str, object]:
    """Results of schema ``xspec.modelled/1``; raises as `modelled_rows` does."""
    assumed = Assumed()
    return {
        "schema": SCHEMA,
        "kind": "modelled",
        "command": command,
        "config": {"config": config, **asdict(shape)},
        "cards": {name: asdict(find_card(name)) for name in cards},
        "assumed": asdict(assumed),
        "modelled": [
            row
            for name in cards
            for row in modelled_rows(shape, name, weights, prompts, rows, assumed)
        ],
    }
