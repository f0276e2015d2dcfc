"""Ways to run the forward pass of a verify: our own ops, transformers' modules, plain torch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from xspec_kernels import info, require_backend

from ..drafters.base import MAX_ROWS, DraftTree
from ..gpu.cases import chain
from ..gpu.decoder import Decoder
from ..packing import can_pack, pack_linears
from ..targets.llama_decoder import LlamaDecoder
from ..targets.llama_rounds import RoundBuffers
from ..targets.transformers import OPS, TransformersTarget
from .stage import MAX_DEPTH, Stage

OURS = ("auto", "torch", "triton")
BACKENDS = (*OURS, "tight", "transformers", "packed", "linear")
MODES = ("eager", "graph")

Pass = Callable[[], tuple[torch.Tensor, torch.Tensor]]
"""Returns the token after every row, and the logits or what the head takes, ``[N, ...]``."""


class Engine(Protocol):
    """One way to run the pass.

    Attributes:
        name: as rows of results name it.
        modes: those of `MODES` it has.
    """

    name: str
    modes: tuple[str, ...]

    def pass_of(self, tree: DraftTree, mode: str = "eager") -> Pass:
        """The pass over `tree`, as it runs or is captured in `mode`; what is timed."""

    def logits(self, tree: DraftTree) -> torch.Tensor:
        """``[N, V]``, to compare engines by."""


class OurEngine:
    """`LlamaDecoder`, as `LlamaTarget.forward` runs it: the tree goes to the device, then all ops.

    A graph has 64 rows, of which the tree's own count. `path_slot` has 32 columns where the tree is
    that deep, 64 for longer chains.

    Args:
        tight: a graph for each number of rows instead, to see what the one for all costs.
    """

    def __init__(self, stage: Stage, backend: str, tight: bool = False) -> None:
        device = stage.weights.embed.device
        self.name = f"xspec-{_named(backend, device)}{'-tight' if tight else ''}"
        self.modes = ("graph",) if tight else MODES
        self.backend, self.stage, self.tight = backend, stage, tight
        self.decoder = LlamaDecoder(stage.weights, stage.cache.capacity, backend)
        self.caches = [(layer.keys, layer.values) for layer in stage.cache.layers]
        self._device = device

    def pass_of(self, tree: DraftTree, mode: str = "eager") -> Pass:
        rows, height = len(tree), MAX_ROWS if mode == "graph" and not self.tight else 0
        deep = len(tree) > MAX_DEPTH and tree.parent_idx == chain(len(tree))
        # Each tree has its own: a graph reads the host's numbers when it is replayed.
        rounds = RoundBuffers(self._device, self.backend, 64 if deep else MAX_DEPTH)

        def run() -> tuple[torch.Tensor, torch.Tensor]:
            at = rounds.place([tree], [self.stage.cache.length], height)
            scored = self.decoder.score(self.decoder.step(at, self.caches), at)
            return scored.ids[0, :rows], scored.hidden[:rows]

        return run

    def logits(self, tree: DraftTree) -> torch.Tensor:
        return self.decoder.logits(self.pass_of(tree)()[1])


def _named(backend: str, device: torch.device) -> str:
    """What `auto` stands for."""
    known = info()
    chosen = known["backend"] if backend == "auto" else backend
    return known["auto"]["skinny_linear"][device.type] if chosen == "auto" else chosen


class TransformersEngine:
    """transformers' modules, as `TransformersTarget.forward` runs them.

    Args:
        packed: a copy of the model with oneDNN's packed linear layers.
    """

    modes = ("eager",)

    def __init__(self, stage: Stage, packed: bool = False) -> None:
        self.name = "transformers-packed" if packed else "transformers"
        model = copy.deepcopy(stage.model) if packed else stage.model
        if packed:
            pack_linears(model)
        self.target = TransformersTarget(model, cache=stage.cache)

    def pass_of(self, tree: DraftTree, mode: str = "eager") -> Pass:
        def run() -> tuple[torch.Tensor, torch.Tensor]:
            logits = self.target.forward(tree)
            return logits.argmax(-1), logits

        return run

    def logits(self, tree: DraftTree) -> torch.Tensor:
        return self.target.forward(tree)


class LinearEngine:
    """Torch's own linear layers (cuBLAS on a GPU) and attention, without modules around them."""

    name, modes = "torch-linear", MODES

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        caches = [(layer.keys, layer.values) for layer in stage.cache.layers]
        self.decoder = Decoder.of(stage.weights, caches, stage.tokens)

    def pass_of(self, tree: DraftTree, mode: str = "eager") -> Pass:
        decoder, rows = self.decoder, len(tree)
        decoder.start = self.stage.cache.length
        if tree.parent_idx == chain(rows):
            mask, depth = decoder.mask(rows, dense=False), None
        else:
            mask, depth = decoder.tree(tree.parent_idx)
        return lambda: decoder.forward(rows, mask, depth)

    def logits(self, tree: DraftTree) -> torch.Tensor:
        return self.pass_of(tree)()[1]


def check_backends(names: Sequence[str], device: str, dtype: torch.dtype) -> None:
    """Raise unless every one of `BACKENDS` asked for can run.

    Raises:
        ValueError: a name is unknown, or `packed` is not for this device and dtype.
        RuntimeError: one of ours cannot run on the device.
    """
    kind = torch.device(device).type
    for name in names:
        if name not in BACKENDS:
            raise ValueError(f"--backends takes {', '.join(BACKENDS)}, got {name!r}")
        if name in OURS or name == "tight":
            require_backend("auto" if name == "tight" else name, kind)
        elif name == "transformers":
            require_backend("auto", kind, OPS)
        elif name == "packed" and (kind != "cpu" or dtype != torch.float32 or not can_pack()):
            raise ValueError("--backends packed needs float32 on a CPU, and torch with oneDNN")


def build_engines(stage: Stage, names: Sequence[str]) -> list[Engine]:
    """An engine for each of `names`; two that come to the same are one.

    Raises:
        ValueError: `linear` and a model with biases, head norms or heads of their own width.
    """
    made: dict[str, Engine] = {}
    for name in names:
        if name in OURS:
            engine = OurEngine(stage, name)
        elif name == "tight":
            engine = OurEngine(stage, "auto", tight=True)
        elif name == "linear":
            engine = LinearEngine(stage)
        else:
            engine = TransformersEngine(stage, packed=name == "packed")
        made.setdefault(engine.name, engine)
    return list(made.values())
