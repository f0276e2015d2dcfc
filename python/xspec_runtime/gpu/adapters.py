"""Adapters on the device: cases of phase `check`, and their time beside torch's in `kernels`."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import torch

from xspec_kernels import (
    AdapterFeed,
    TailResult,
    Workspace,
    adapter_forward,
    adapter_tail,
)

from .adapter_networks import NETWORKS, TINY, Builder, Sizes, nbytes_read, tensors_of
from .cases import Case, Tensors, copies, relative_error
from .clock import captured, interleaved
from .forward_cases import TOLERANCE, draws
from .parts import CheckFailed, Context

# Microseconds that the TokenAdapter may take for 16 rows on an H200.
GOAL = ("TokenAdapter", 16, 300.0)
_ROWS, _FOOTPRINT, _REPEATS = (1, 16, 64), 400 << 20, 8
# Of the largest logits of all rows; the roundings of a few layers in bfloat16.
_OFF = 0.02


def builder(sizes: Sizes, draw: torch.Generator, dtype: torch.dtype) -> Builder:
    """Random networks whose rows stay about unit size."""

    def normal(*shape: int) -> torch.Tensor:
        made = torch.randn(*shape, generator=draw, device=draw.device, dtype=torch.float32)
        return made.mul_(shape[-1] ** -0.5).to(dtype)

    return Builder(
        sizes, normal, lambda n: normal(n) * 2, lambda n: (1 + normal(n)).to(dtype)
    )  # fmt: skip


def adapter_forward_cases(rng: random.Random, sizes: tuple[int, ...]) -> Iterator[Case]:
    """Every network on small rows, NaN where no row counts; the TokenAdapter behind a tail."""
    for rows in sizes:
        for name in NETWORKS:
            yield _forward(name, rows, rng.randint(1, rows), draws(rng))
        yield _tail(rng, rows, draws(rng))


def _forward(name: str, rows: int, count: int, draw: torch.Generator) -> Case:
    """What is compared is the largest logit: of near ties either token will do."""
    dtype = torch.float32 if name in ("L1", "L3") else torch.bfloat16
    network = builder(TINY, draw, dtype).network(name)
    if name == "TokenAdapter":
        fed = torch.randint(0, TINY.vocab, (rows,), generator=draw)
    else:
        fed = torch.randn(rows, TINY.state_width, generator=draw).to(dtype)
        fed[count:] = torch.nan

    def call(given: Tensors, backend: str) -> list[torch.Tensor]:
        fed, num_rows, *weights = given
        found = adapter_forward(
            _with(network, iter(weights)), fed, num_rows, round_to=torch.float32, backend=backend
        )
        return [found.best[None, :count]]

    inputs: Tensors = [fed, torch.tensor([count], dtype=torch.int32), *tensors_of(network)]
    title = f"{name}, {count} of {rows} rows, {str(dtype)[6:]}"
    return Case("adapter_forward", title, inputs, call, ("best",), 4 * TOLERANCE[dtype])


def _tail(rng: random.Random, nodes: int, draw: torch.Generator) -> Case:
    """Places and drafts have to be equal, so texts whose logits come near a tie are not taken."""
    dtype, places = torch.float32, 24
    network = builder(TINY, draw, dtype).network("TokenAdapter")
    accepted, known = rng.randint(-1, nodes - 1), rng.randint(1, 20)
    path = torch.full((1, nodes), -1, dtype=torch.int32)
    path[0, : max(accepted, 0)] = torch.arange(1, max(accepted, 0) + 1)
    words = [accepted, 5, known + accepted + 5, rng.randint(0, places), -9]
    inputs: Tensors = [torch.tensor([word], dtype=torch.int32) for word in words]
    inputs += [path, torch.randint(0, TINY.vocab, (nodes,), generator=draw)]
    inputs += [torch.tensor([7]), torch.randint(0, TINY.vocab, (places,), generator=draw)]
    inputs += [torch.full((6,), -77), *tensors_of(network)]

    def call(given: Tensors, backend: str) -> list[torch.Tensor]:
        length, prompt, seqlens, drafted, rows, path, tokens, root, fed, drafts, *weights = given
        feed = AdapterFeed(fed, prompt, drafted, rows, drafts)
        adapter_tail(
            _with(network, iter(weights)), feed, TailResult(length, path), tokens, root, seqlens,
            backend=backend,
        )  # fmt: skip
        return [fed, rows, drafts]

    while True:
        read = call(copies(inputs, "cpu"), "torch")[0]
        near = adapter_forward(network, read, round_to=torch.float16, backend="torch").flags
        if not near.any():
            break
        inputs[8] = torch.randint(0, TINY.vocab, (places,), generator=draw)
    title = f"tail, {accepted} accepted of {nodes} behind {known}"
    return Case("adapter_forward", title, inputs, call, ("fed", "num_rows", "drafts"))


def _with(value: object, tensors: Iterator[torch.Tensor]) -> object:
    """A network with other tensors, in the order of `tensors_of`."""
    if isinstance(value, torch.Tensor):
        return next(tensors)
    if isinstance(value, list):
        return [_with(part, tensors) for part in value]
    if isinstance(value, tuple):
        parts = [_with(part, tensors) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


def adapters(context: Context) -> Iterator[dict]:
    """Microseconds of whole networks at the published sizes, each a graph over several copies."""
    options = context.options
    sizes, footprint = (TINY, 1) if options.dry_run else (Sizes(), _FOOTPRINT)
    draw = torch.Generator(options.device).manual_seed(options.seed)
    with torch.inference_mode():
        for name in NETWORKS:
            make = builder(sizes, draw, torch.bfloat16)
            networks = [make.network(name)]
            nbytes = nbytes_read(networks[0])
            networks += [make.network(name) for _ in range(max(1, -(-footprint // nbytes) - 1))]
            yield from _timed(context, name, networks, nbytes, draw)


def _timed(
    context: Context, name: str, networks: list, nbytes: int, draw: torch.Generator
) -> Iterator[dict]:
    device, workspace = context.options.device, Workspace(context.options.device)
    calls: dict[tuple[int, str], Callable[[], object]] = {}
    for rows in _ROWS[: 2 if context.options.dry_run else None]:
        fed = _rows(networks[0], rows, draw)

        def run(network: object, backend: str, fed: torch.Tensor = fed) -> torch.Tensor:
            return adapter_forward(
                network, fed, round_to=torch.bfloat16, workspace=workspace, backend=backend
            ).best

        error = relative_error(run(networks[0], "auto"), run(networks[0], "torch"))
        if not error < _OFF:
            raise CheckFailed(f"{name}, {rows} rows: off by {error:.3g} from torch")
        for backend in ("auto", "torch"):
            each = lambda b=backend, run=run: [run(network, b) for network in networks]  # noqa: E731
            calls[rows, backend] = captured(each, device)
    timings = interleaved(calls, device, 1 if context.options.dry_run else _REPEATS)
    for rows in dict.fromkeys(rows for rows, _ in calls):
        mine, other = timings[rows, "auto"], timings[rows, "torch"]
        us, torch_us = (timing.ms * 1e3 / len(networks) for timing in (mine, other))
        goal = GOAL[2] if (name, rows) == GOAL[:2] and not context.options.dry_run else None
        row = {"op": f"adapter_forward {name}", "rows": rows, "us": us,
               "gbps": nbytes / us / 1e3, "torch_us": torch_us, "bytes": nbytes,
               "goal_us": goal, "spread": mine.spread,
               "calls": mine.calls * len(networks)}  # fmt: skip
        yield {"kernels": [row]}
        aim = "" if goal is None else f", goal {goal:.0f} us {'met' if us <= goal else 'missed'}"
        context.log(f"{row['op']}, {rows} rows: {us:.1f} us, torch {torch_us:.1f} us{aim}")


def _rows(network: object, rows: int, draw: torch.Generator) -> torch.Tensor:
    if hasattr(network, "position"):
        vocab = len(network.embed)
        return torch.randint(0, vocab, (rows,), generator=draw, device=draw.device)
    like = {"generator": draw, "device": draw.device, "dtype": torch.bfloat16}
    return torch.randn(rows, network.head.shape[1], **like)
