"""Phase `baseline`: the card's bandwidth and launch cost, and v(M) of what is there already."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import NoReturn

import torch

from .bundle import carried
from .cases import relative_error
from .clock import Timing, captured, interleaved, once, summarize
from .decoder import Decoder, Shape
from .nf4 import Nf4, check_nf4
from .parts import CheckFailed, Context, Options, Part, Skip

# 32 layers of bf16 rounding leave 0.03, other keys in the cache 0.6.
TOLERANCE = 0.1


@dataclass(frozen=True, slots=True)
class Scale:
    """Sizes of the phase."""

    shape: Shape = field(default_factory=Shape)
    prompt_tokens: int = 2076
    rows: tuple[int, ...] = (1, 2, 4, 6, 8, 12, 16, 22, 24, 32, 48, 64)
    repeats: int = 12
    copy_bytes: int = 4 << 30
    launches: int = 2000


FULL = Scale()
TINY = Scale(Shape(2, 128, 4, 256, 512), 40, (1, 2, 6), 2, 1 << 20, 20)


def parts(options: Options) -> list[Part]:
    """Bandwidth and launches, bf16, then each bitsandbytes that is carried or installed."""
    found = [
        Part("baseline", "machine", machine, 15),
        Part("baseline", "bf16", bf16, 75),
    ]
    versions = carried(options.bundle, "bitsandbytes")
    if importlib.util.find_spec("bitsandbytes"):
        versions.setdefault(importlib.metadata.version("bitsandbytes"), None)
    for version, folder in versions.items():
        paths = (str(folder),) if folder else ()
        name = f"nf4_bitsandbytes_{version}"
        found.append(Part("baseline", name, partial(nf4, version), 75, paths))
    if not versions:
        found.append(Part("baseline", "nf4_bitsandbytes", _no_bitsandbytes, 0))
    return found


def scale(context: Context) -> Scale:
    """The sizes of this run."""
    return TINY if context.options.dry_run else FULL


def machine(context: Context) -> Iterator[dict]:
    """Device-to-device copy in GB/s (bytes read plus written) and the cost of a kernel launch."""
    sizes, device = scale(context), context.options.device
    timing = copy_timing(sizes.copy_bytes, device)
    gbps = 2 * sizes.copy_bytes / timing.ms / 1e6
    yield {"copy_gbps": gbps, "copy_spread": timing.spread, "copy_bytes": sizes.copy_bytes}

    one = torch.zeros(1, device=device)
    work = {
        "eager_launch_us": lambda: [one.add_(1) for _ in range(sizes.launches)],
        "one_kernel_graph_us": captured(lambda: one.add_(1), device),
    }
    work["graph_kernel_us"] = captured(work["eager_launch_us"], device)
    timings = interleaved(work, device, 5)
    count = {"one_kernel_graph_us": 1}
    yield {
        name: found.ms * 1e3 / count.get(name, sizes.launches) for name, found in timings.items()
    }


def copy_timing(nbytes: int, device: str) -> Timing:
    """A copy of random numbers from one part of the memory to another; it reads and writes as many
    bytes as it is given.

    Raises:
        CheckFailed: the copy differs.
    """
    source = torch.randn(nbytes // 2, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    copy = partial(target.copy_, source)
    for _ in range(3):
        copy()
    timing = summarize([once(copy, device) for _ in range(20)])
    if not torch.equal(source, target):
        raise CheckFailed("a copy of random numbers differs from them")
    return timing


def bf16(context: Context) -> Iterator[dict]:
    """v(M) through cuBLAS and torch's attention: chain, dense mask, projections apart."""
    sizes, device = scale(context), context.options.device
    with torch.inference_mode():
        fused = Decoder(
            sizes.shape, sizes.prompt_tokens, max(sizes.rows), device, seed=context.options.seed
        )
        fused.layers += [fused.random_layer() for _ in range(sizes.shape.layers)]
        split = fused.split()
        _agree(fused, split, min(22, max(sizes.rows)))
        yield {"weight_bytes": sum(layer.nbytes for layer in fused.layers) + fused.head.nbytes}
        for backend, decoder, dense in (
            ("cublas", fused, False),
            ("cublas-mask", fused, True),
            ("cublas-split", split, False),
        ):
            yield from _verify_rows(context, decoder, "bf16", backend, dense)


def nf4(version: str, context: Context) -> Iterator[dict]:
    """v(M) through bitsandbytes' 4-bit matrix product, q, k, v, gate and up each by itself."""
    library = importlib.import_module("bitsandbytes")
    if library.__version__ != version:
        raise CheckFailed(f"bitsandbytes {library.__version__} was imported, not {version}")
    sizes, device = scale(context), context.options.device
    with torch.inference_mode():
        check_nf4(library, device, context.options.seed, sizes.shape.width)
        decoder = Decoder(
            sizes.shape, sizes.prompt_tokens, max(sizes.rows), device, seed=context.options.seed
        )
        for _ in range(sizes.shape.layers):
            decoder.layers.append(decoder.random_layer(partial(Nf4, library), separate=True))
        yield {"weight_bytes": sum(layer.nbytes for layer in decoder.layers) + decoder.head.nbytes}
        yield from _verify_rows(context, decoder, "nf4", f"bitsandbytes-{version}", False)


def _no_bitsandbytes(context: Context) -> NoReturn:
    raise Skip("bitsandbytes is neither installed nor carried; `make gpu-bundle` fetches it")


def _agree(fused: Decoder, split: Decoder, rows: int) -> None:
    """Three ways to one result, before any of them is timed."""
    want = fused.forward(rows, fused.mask(rows, dense=True))[1]
    for name, decoder in (("fused", fused), ("split", split)):
        error = relative_error(decoder.forward(rows, decoder.mask(rows, dense=False))[1], want)
        if not error < TOLERANCE:
            raise CheckFailed(f"{name} decoder: relative error {error:.3f} of {rows} rows")


def _verify_rows(
    context: Context, decoder: Decoder, weights: str, backend: str, dense: bool
) -> Iterator[dict]:
    """Rows of the table of v(M), eager and as a CUDA graph."""
    sizes, device = scale(context), context.options.device
    eager: dict[int, Callable] = {
        rows: partial(decoder.forward, rows, decoder.mask(rows, dense)) for rows in sizes.rows
    }
    roots = _roots(eager)
    yield from _timed(context, decoder, (weights, backend, "eager"), eager, roots)
    try:
        graphs = {rows: captured(work, device) for rows, work in eager.items()}
        if device == "cuda":
            torch.cuda.synchronize()
    except RuntimeError as error:
        yield {"notes": [f"{backend} cannot be captured: {' '.join(str(error).split())[:300]}"]}
        return
    for rows, replay in graphs.items():
        error = relative_error(replay()[1].clone(), eager[rows]()[1])
        if not error < TOLERANCE:
            raise CheckFailed(
                f"{backend}: the graph of {rows} rows is off by {error:.3f} from eager"
            )
    yield from _timed(context, decoder, (weights, backend, "graph"), graphs, roots)


def _roots(eager: dict[int, Callable]) -> dict[int, bool]:
    """Whether the first row's logits have the bits that one row alone gives, for every M."""
    one = eager[1]()[1][0].clone()
    equal = {}
    for rows, work in eager.items():
        got = work()[1][0]
        error = relative_error(got, one)
        if not error < TOLERANCE:
            raise CheckFailed(f"row 0 of {rows} rows is off by {error:.3f} from one row alone")
        equal[rows] = torch.equal(got, one)
    return equal


def _timed(
    context: Context,
    decoder: Decoder,
    kind: tuple[str, str, str],
    work: dict[int, Callable],
    roots: dict[int, bool],
) -> Iterator[dict]:
    sizes = scale(context)
    timings = interleaved(work, context.options.device, sizes.repeats)
    gbps = context.known.get("baseline.machine", {}).get("copy_gbps")
    rows = []
    for count, timing in timings.items():
        floor = decoder.nbytes(count) / gbps / 1e6 if gbps else None
        row = dict(zip(("weights", "backend", "mode"), kind, strict=True))
        row |= {"prompt_tokens": sizes.prompt_tokens, "rows": count, "shape": "chain"}
        row |= {"ms": timing.ms, "ratio": timing.ms / timings[1].ms, "floor_ms": floor}
        row |= {"floor_ratio": timing.ms / floor if floor else None, "spread": timing.spread}
        row |= {"calls": timing.calls, "bytes": decoder.nbytes(count), "root_bits": roots[count]}
        rows.append(row)
    yield {"verify": rows}
    context.log(f"{' '.join(kind)}: " + " ".join(f"{r['rows']}:{r['ms']:.3f}" for r in rows))
