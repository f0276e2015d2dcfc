"""The law on a device: what a row computes does not depend on the round it is computed in.

Plain decoding runs one row at a time, and every op's output and every layer's K and V are kept. The
same tokens are then verified as trees in rounds cut at random places: rows shuffled among garbage,
heights padded, sometimes beside another request, NaN in every slot that holds nothing. Every row
must have the bits that plain decoding gave it, op by op.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..drafters.base import MAX_ROWS, DraftTree
from ..targets.llama_decoder import LlamaDecoder
from ..targets.llama_rounds import Round, RoundBuffers
from ..targets.llama_weights import LlamaWeights
from .clock import captured

# Of the round, not of a row.
_OTHER_OPS = ("tree_mask", "verify_tail", "kv_commit", "verify_greedy")
MAX_DEPTH = 32
# Of one graph: a kernel that reads too early or writes too late does so now and then.
_REPLAYS = 64


class Trace(TorchDispatchMode):
    """Outputs of every op of a forward pass, as tensors ``[rows, ...]``, in order; squares that a
    product left for the next norm count as such.
    """

    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[tuple[str, list[torch.Tensor]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("xspec::")
        if func.namespace == "xspec" and name not in _OTHER_OPS:
            tensors = [out] if isinstance(out, torch.Tensor) else list(out)
            # Attention and rotation keep requests apart: [B, N, H, D].
            rows = [t.flatten(0, 1) if t.dim() == 4 else t for t in tensors]
            named = zip(func._schema.arguments, args, strict=False)
            rows += [
                t.T for argument, t in named if argument.name == "squares_out" and t is not None
            ]
            self.outputs.append((name, [t.clone() for t in rows]))
        return out

    def name(self, index: int, layers: int) -> str:
        """An op by its layer; the first op, and the last two, belong to none."""
        each = (len(self.outputs) - 3) // layers
        op, inside = self.outputs[index][0], 0 < index <= each * layers
        place = f"layer {(index - 1) // each}, op {(index - 1) % each}: " if inside else ""
        return place + op


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal, where NaN of equal bits is equal too."""
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.contiguous().view(words), b.contiguous().view(words))


@dataclass(slots=True)
class Tally:
    """What was compared, and the first difference or None."""

    rounds: int = 0
    rows: int = 0
    first: str | None = None


class Law:
    """One model, prompt length and answer.

    Args:
        prompt_tokens: committed rows of random K and V.
        steps: tokens of the answer that plain decoding gives.
        seed: of prompt, trees and cuts.
    """

    def __init__(
        self, weights: LlamaWeights, backend: str, prompt_tokens: int, steps: int, seed: int
    ) -> None:
        s, device = weights.shape, weights.embed.device
        self.weights, self.backend = weights, backend
        self.rng = random.Random(f"{seed} {prompt_tokens}")
        self.prompt_tokens, slots = prompt_tokens, prompt_tokens + steps + 2 * MAX_ROWS
        self.decoder = LlamaDecoder(weights, slots, backend)
        self.rounds = RoundBuffers(device, backend, MAX_DEPTH, batch=2)
        draw = torch.Generator(device).manual_seed(seed)
        like = {"device": device, "dtype": weights.embed.dtype}
        self.prompt = torch.randn(
            s.layers, 2, 2, s.kv_heads, prompt_tokens, s.head_dim, generator=draw, **like
        )
        # [layer, K or V, request, head, slot, width]
        self.memory = torch.empty(s.layers, 2, 2, s.kv_heads, slots, s.head_dim, **like)
        self._reset()
        self.tokens = [self.rng.randrange(s.vocab)]
        self.plain: list[Trace] = []
        for _ in range(steps):
            ids, trace = self._run([DraftTree.root(self.tokens[-1])], len(self.plain))
            self.plain.append(trace)
            self.tokens.append(max(int(ids[0, 0]), 0))
        end = prompt_tokens + steps
        self.kv = self.memory[:, :, 0, :, prompt_tokens:end].clone()

    def replay(self) -> Tally:
        """Verify the answer once in random rounds; stops at the first difference."""
        self._reset()
        found, done = Tally(), 0
        while done < len(self.plain) and found.first is None:
            spine = self.tokens[done + 1 : len(self.plain)]
            spine = spine[: self.rng.randrange(min(len(spine), 12) + 1)]
            tree, nodes = self._tree(self.tokens[done], spine)
            trees = [tree]
            if self.rng.random() < 0.25:
                trees.append(self._tree(self.rng.randrange(self.weights.shape.vocab), [])[0])
            trace = self._run(trees, done, self.rng.choice((0, 0, 33, 64)))[1]
            found.rounds += 1
            found.rows += len(nodes)
            found.first = self._difference(trace, nodes, done, len(tree))
            keep = self.rng.randrange(len(nodes)) + 1
            self._commit(done, nodes[:keep])
            done += keep
        return found

    def graph(self) -> str | None:
        """The first row to which any replay of a CUDA graph, whose kernels start early, gives other
        bits than kernels that run one after another, or None.
        """
        self._reset()
        tree, _ = self._tree(self.tokens[0], self.tokens[1:5])

        def run() -> torch.Tensor:
            at = self.rounds.place([tree], [self.prompt_tokens])
            return self.decoder.step(at, self._caches(1))

        with mock.patch.dict(os.environ, XSPEC_PDL="0"):
            want = run().clone()
        replay = captured(run, want.device.type)
        for number in range(1 if want.device.type == "cpu" else _REPLAYS):
            got = replay()
            for row in range(len(tree)):
                if not same_bits(got[row], want[row]):
                    return f"row {row} of {len(tree)} in replay {number} of a CUDA graph"
        return None

    def _reset(self) -> None:
        self.memory.fill_(torch.nan)
        self.memory[..., : self.prompt_tokens, :] = self.prompt

    def _caches(self, batch: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [(layer[0, :batch], layer[1, :batch]) for layer in self.memory]

    def _run(
        self, trees: Sequence[DraftTree], done: int, height: int = 0
    ) -> tuple[torch.Tensor, Trace]:
        lengths = [self.prompt_tokens + done, self.prompt_tokens][: len(trees)]
        at: Round = self.rounds.place(trees, lengths, height)
        with Trace() as trace:
            hidden = self.decoder.step(at, self._caches(len(trees)))
            ids = self.decoder.score(hidden, at).ids
        return ids, trace

    def _tree(self, root: int, spine: Sequence[int]) -> tuple[DraftTree, list[int]]:
        """A tree that holds `spine` among garbage, its rows in a random order that keeps parents
        before children, and the rows of root and spine.
        """
        rng, vocab = self.rng, self.weights.shape.vocab
        tokens, parents = [root, *spine], list(range(-1, len(spine)))
        depth = list(range(len(tokens)))
        for _ in range(rng.randrange(0, MAX_ROWS - len(tokens))):
            above = rng.choice([i for i, deep in enumerate(depth) if deep + 1 < MAX_DEPTH])
            tokens.append(rng.randrange(vocab))
            parents.append(above)
            depth.append(depth[above] + 1)
        order, ready = [], [0]
        children: dict[int, list[int]] = {}
        for node, parent in enumerate(parents):
            children.setdefault(parent, []).append(node)
        while ready:
            order.append(ready.pop(rng.randrange(len(ready))))
            ready += children.get(order[-1], [])
        row = {-1: -1} | {node: i for i, node in enumerate(order)}
        tree = DraftTree(
            [tokens[node] for node in order], [row[parents[node]] for node in order],
            [1.0] * len(order),
        )  # fmt: skip
        return tree, [row[node] for node in range(len(spine) + 1)]

    def _difference(self, trace: Trace, nodes: Sequence[int], done: int, rows: int) -> str | None:
        """The first op in which a row of `nodes` has other bits than plain decoding gave it."""
        layers = self.weights.shape.layers
        start = self.prompt_tokens + done
        for index, (_, outputs) in enumerate(trace.outputs):
            for step, row in enumerate(nodes, done):
                plain = self.plain[step].outputs[index][1]
                if not all(same_bits(a[row], b[0]) for a, b in zip(outputs, plain, strict=True)):
                    where = f"row {row} of {rows} at position {self.prompt_tokens + step}"
                    return f"{trace.name(index, layers)}: {where}"
        for step, row in enumerate(nodes, done):
            got, want = self.memory[:, :, 0, :, start + row], self.kv[:, :, :, step]
            for layer in range(layers):
                if not same_bits(got[layer], want[layer]):
                    return f"layer {layer}, K or V: row {row} at position {start + step - done}"
        return None

    def _commit(self, done: int, nodes: Sequence[int]) -> None:
        """Keep these rows in order; whatever else lies behind the prompt and the answer is NaN."""
        start = self.prompt_tokens + done
        kept = self.memory[:, :, 0, :, [start + row for row in nodes]]
        self.memory[:, :, 1, :, self.prompt_tokens :] = torch.nan
        self.memory[:, :, 0, :, start:] = torch.nan
        self.memory[:, :, 0, :, start : start + len(nodes)] = kept
