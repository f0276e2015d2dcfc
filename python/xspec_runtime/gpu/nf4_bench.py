"""Phase `nf4`: products with 4-bit matrices at the shapes of Llama-7B and 3-8B beside everyone
else's, the number of rows from which a prompt is dequantized first, and v(M) of a whole model.

A timed call is a CUDA graph over copies of the weights that no cache of the card holds. A result of
ours that is wrong is an error and gives no time; a peer whose result is wrong is left out, and said
to be. About two minutes on an H200, most of it Triton's compiler.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from xspec_kernels import Workspace, nf4_prefill

from .baseline import copy_timing
from .bundle import carried
from .cases import relative_error
from .clock import captured, interleaved
from .forward import need_transformers
from .nf4_peers import Multiply, Ours, Peer, Prefill, peers
from .parts import CheckFailed, Context, Options, Part

TOLERANCE = 0.02
GOAL = 1.10  # v(22) / v(1)

Shapes = tuple[tuple[str, int, int], ...]
"""Name, N and K of the products of a layer, q, k, v and gate, up each as one."""


@dataclass(frozen=True, slots=True)
class Scale:
    """Sizes of the phase; `footprint` bytes are what the copies of a weight take at least."""

    models: dict[str, Shapes]
    config: str
    rows: tuple[int, ...]
    many: tuple[int, ...]
    prompt_tokens: int
    footprint: int
    repeats: int
    copy_bytes: int


FULL = Scale(
    {
        "llama-7b": (("qkv", 12288, 4096), ("o", 4096, 4096), ("gate_up", 22016, 4096),
                     ("down", 4096, 11008)),
        "llama-3-8b": (("qkv", 6144, 4096), ("gate_up", 28672, 4096), ("down", 4096, 14336)),
    },
    "llama-7b", (1, 2, 3, 4, 6, 8, 12, 16, 22, 24, 32, 48, 64),
    (64, 128, 192, 256, 384, 512, 1024, 2048), 2076, 256 << 20, 5, 4 << 30,
)  # fmt: skip
TINY = Scale(
    {"llama-7b": (("o", 128, 128), ("down", 128, 256)), "llama-3-8b": (("qkv", 96, 128),)},
    "tiny", (1, 2, 6), (64, 128), 40, 1, 1, 1 << 20,
)  # fmt: skip


def parts(options: Options) -> list[Part]:
    """The whole model, the choice for prompts, then the shapes of each model."""
    versions = carried(options.bundle, "bitsandbytes")
    folder = next(iter(versions.values()), None)
    paths = (str(folder),) if folder else ()
    shapes = [
        Part("nf4", name, partial(products, name), 60, paths) for name in scale(options).models
    ]
    return [Part("nf4", "model", model, 60), Part("nf4", "crossover", crossover, 25), *shapes]


def scale(options: Options) -> Scale:
    """The sizes of this run."""
    return TINY if options.dry_run else FULL


class Maker:
    """Weights and inputs on the device, in bfloat16."""

    def __init__(self, context: Context) -> None:
        options = context.options
        self.sizes, self.device = scale(options), options.device
        self._draw = torch.Generator(self.device).manual_seed(options.seed)
        self.workspace = Workspace(self.device)
        gbps = context.known.get("baseline.machine", {}).get("copy_gbps")
        nbytes = self.sizes.copy_bytes
        self.gbps = gbps or 2 * nbytes / copy_timing(nbytes, self.device).ms / 1e6

    def normal(self, *size: int, spread: float = 1.0) -> torch.Tensor:
        """Random numbers."""
        like = {"device": self.device, "dtype": torch.bfloat16, "generator": self._draw}
        return torch.randn(*size, **like).mul_(spread)

    def calls(self, peer: Peer) -> list[Multiply]:
        """Products with as many copies as the footprint takes."""
        return peer.copies(min(64, max(2, -(-self.sizes.footprint // peer.nbytes))))


@torch.inference_mode()
def products(name: str, context: Context) -> Iterator[dict]:
    """Every way at every number of rows, shape after shape."""
    make, notes = Maker(context), {}
    for shape, n, k in make.sizes.models[name]:
        inputs = {rows: make.normal(rows, k) for rows in make.sizes.rows}
        weight = make.normal(n, k, spread=k**-0.5)
        work: dict[tuple[str, int], Callable[[], object]] = {}
        stored: dict[str, tuple[int, int]] = {}
        for made in peers(weight, make.workspace, notes):
            peer = made()
            calls = make.calls(peer)
            if not _sound(peer, calls[0], inputs, notes):
                continue
            stored[peer.name] = peer.nbytes, len(calls)
            for rows, x in inputs.items():
                work[peer.name, rows] = captured(partial(_all, calls, x), make.device)
        timings = interleaved(work, make.device, make.sizes.repeats)
        found = []
        for (way, rows), timing in timings.items():
            nbytes, count = stored[way]
            moved, us = nbytes + 2 * rows * (n + k), timing.ms * 1e3 / count
            gbps = moved / us / 1e3
            found.append(
                {"model": name, "shape": shape, "N": n, "K": k, "rows": rows, "backend": way,
                 "us": us, "gbps": gbps, "of_copy": gbps / make.gbps, "bytes": moved,
                 "spread": timing.spread, "calls": timing.calls * count}
            )  # fmt: skip
        yield {"products": found, "ahead": list(_ahead(found)), "copy_gbps": make.gbps}
        _log(context, found)
    yield {"notes": list(notes)}


def _all(calls: list[Multiply], x: torch.Tensor) -> list[torch.Tensor]:
    return [call(x) for call in calls]


def _sound(
    peer: Peer, call: Multiply, inputs: dict[int, torch.Tensor], notes: dict[str, None]
) -> bool:
    """Whether products equal those with the weights that the peer says it has.

    Raises:
        CheckFailed: they do not, and they are ours.
    """
    weight = peer.reference()
    for rows, x in inputs.items():
        try:
            error = relative_error(call(x), x.float() @ weight.T)
            text = f"off by {error:.3g}"
        except Exception as reason:
            if isinstance(peer, Ours):
                raise
            error, text = float("nan"), f"{type(reason).__name__}: {reason}"
        if not error < TOLERANCE:
            if isinstance(peer, Ours):
                raise CheckFailed(f"{peer.name}, {list(weight.shape)}, {rows} rows: {text}")
            notes[f"{peer.name} is left out at {list(weight.shape)}, {rows} rows: {text[:200]}"] = (
                None
            )
            return False
    return True


def _ahead(rows: list[dict]) -> Iterator[dict]:
    """Ours against bitsandbytes' best way, at each number of rows."""
    for count in sorted({row["rows"] for row in rows}):
        here = {row["backend"]: row["us"] for row in rows if row["rows"] == count}
        theirs = [us for name, us in here.items() if name.startswith("bitsandbytes")]
        if theirs:
            ours = here[Ours.name]
            yield {
                "model": rows[0]["model"], "shape": rows[0]["shape"], "rows": count, "us": ours,
                "bitsandbytes_us": min(theirs), "ahead": ours < min(theirs),
            }  # fmt: skip


def _log(context: Context, rows: list[dict]) -> None:
    for count in sorted({row["rows"] for row in rows}):
        here = [row for row in rows if row["rows"] == count]
        cells = ", ".join(
            f"{row['backend']} {row['us']:.1f} us {row['gbps']:.0f} GB/s {row['of_copy']:.0%}"
            for row in here
        )
        context.log(f"{here[0]['model']} {here[0]['shape']}, {count} rows: {cells}")


@torch.inference_mode()
def crossover(context: Context) -> Iterator[dict]:
    """nf4_linear against dequantizing first at the rows of prompts; `FUSED_ROWS` should be where
    the second becomes the faster one.
    """
    from xspec_kernels import nf4

    make = Maker(context)
    first = next(iter(make.sizes.models.values()))
    for shape, n, k in first:
        w = nf4.quantize(make.normal(n, k, spread=k**-0.5))
        ways = [kind(w, torch.bfloat16, make.workspace) for kind in (Ours, Prefill)]
        inputs = {rows: make.normal(rows, k) for rows in make.sizes.many}
        work = {}
        for way in ways:
            call = way.copies(1)[0]
            _sound(way, call, {rows: inputs[rows] for rows in make.sizes.many[:2]}, {})
            work |= {
                (way.name, rows): captured(partial(call, x), make.device)
                for rows, x in inputs.items()
            }
        timings = interleaved(work, make.device, make.sizes.repeats)
        found = [
            {"shape": shape, "N": n, "K": k, "rows": rows,
             "fused_ms": timings[Ours.name, rows].ms, "parts_ms": timings[Prefill.name, rows].ms}
            for rows in make.sizes.many
        ]  # fmt: skip
        best = [row["rows"] for row in found if row["fused_ms"] <= row["parts_ms"]]
        yield {"crossover": found, "fused_up_to": {shape: max(best, default=0)}}
        context.log(f"{shape}: nf4_linear is the faster up to {max(best, default=0)} rows")
    backend = "triton" if make.device == "cuda" else "torch"
    yield {"fused_rows": {backend: nf4_prefill.FUSED_ROWS[backend]}}


@torch.inference_mode()
def model(context: Context) -> Iterator[dict]:
    """v(M) of a whole model in NF4, as graphs; the head and the embedding stay in 16 bits."""
    need_transformers()
    from ..nf4_model import quantize_model
    from ..verify_cost.measure import measure
    from ..verify_cost.options import Plan
    from ..verify_cost.stage import Subject, find_config, random_model

    make, options = Maker(context), context.options
    sizes = make.sizes
    whole = random_model(find_config(sizes.config), make.device, torch.bfloat16, options.seed)
    quantize_model(whole)
    subject = Subject.of(whole, options.seed, keep_model=False)
    del whole
    plan = Plan(
        sizes.rows, (sizes.prompt_tokens,), ("chain", "tree"), ("auto", "tight"), ("graph",),
        make.device, torch.bfloat16, sizes.repeats, options.seed,
    )  # fmt: skip
    found = measure(plan, subject, make.gbps)
    rows = [row | {"weights": "nf4"} for row in found.rows]
    yield {"verify": rows, "copy_gbps": make.gbps, "goals": list(_goals(rows))}
    if found.stopped:
        raise KeyboardInterrupt


def _goals(rows: list[dict]) -> Iterator[dict]:
    for row in rows:
        if (row["rows"], row["shape"], row["backend"]) == (22, "chain", rows[0]["backend"]):
            value = row["ratio"]
            yield {"rows": 22, "of": "ratio", "value": value, "goal": GOAL, "met": value <= GOAL}
