"""Stage one of training: vision towers that show a scene's facts to simple readers."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..data import scenes as sc
from . import mini
from .mini_run import Run, draw


def tower_features(tower: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """What the target reads: the last layer but one, without running the last."""
    hidden = tower.pre_layrnorm(tower.embeddings(pixels))
    for layer in tower.encoder.layers[:-1]:
        hidden = layer(hidden, None)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    return hidden


class FactReader(nn.Module):
    """Reads a scene's facts from the visual tokens of one image as a language model would.

    One learned query a lane, whose vehicle heads all lanes share, and one a further fact.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.lanes = len(sc.SLOTS)
        others = sc.FACT_SIZES[3 * self.lanes :]
        self.queries = nn.Parameter(0.02 * torch.randn(self.lanes + len(others), width))
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.vehicle = nn.ModuleList(nn.Linear(width, n) for n in sc.FACT_SIZES[:3])
        self.rest = nn.ModuleList(nn.Linear(width, n) for n in others)

    def forward(self, tokens: torch.Tensor) -> list[torch.Tensor]:
        """Tokens ``[B, P, width]`` -> logits in the facts' order."""
        queries = self.queries.expand(len(tokens), -1, -1)
        read = self.attention(queries, tokens, tokens, need_weights=False)[0].unbind(1)
        vehicles = [head(lane) for lane in read[: self.lanes] for head in self.vehicle]
        return vehicles + [h(x) for h, x in zip(self.rest, read[self.lanes :], strict=True)]


class FactHeads(nn.ModuleList):
    """A linear head a fact on flattened tokens."""

    def __init__(self, inputs: int) -> None:
        super().__init__(nn.Linear(inputs, n) for n in sc.FACT_SIZES)

    def forward(self, tokens: torch.Tensor) -> list[torch.Tensor]:
        """Tokens ``[B, ...]`` -> logits in the facts' order."""
        flat = tokens.flatten(1)
        return [head(flat) for head in self]


def train_tower(
    run: Run, name: str, tower: nn.Module, features, images: np.ndarray, steps: int, kinds: str
):
    """Teach the tower to show a scene's facts to several kinds of readers.

    `kinds`: "cls" reads the CLS token, "one" all tokens of an image, "attention" as a language
    model would, and "pair" the tokens of an early and a late image, which makes features carry
    what only changes between frames: motion, and the camera's own.
    """
    width = tower.config.hidden_size
    inputs = mini.PATCH_TOKENS * width
    make = {
        "attention": lambda: FactReader(width),
        "cls": lambda: FactHeads(width),
        "one": lambda: FactHeads(inputs),
        "pair": lambda: FactHeads(2 * inputs),
    }
    readers = {kind: make[kind]() for kind in kinds.split()}
    seen = 2 if "pair" in readers else 1
    modules = nn.ModuleDict({"tower": tower, "readers": nn.ModuleDict(readers)})
    size = 64 // seen

    def logits(rows: torch.Tensor, frames: torch.Tensor, brightness: torch.Tensor):
        x = mini.pixels(images[rows[:, None].numpy(), frames.numpy()])
        out = features(tower, ((x + 1) * brightness - 1).flatten(0, 1))
        shown = {"cls": out[:, 0], "pair": out.unflatten(0, frames.shape)}
        for kind, reader in readers.items():
            yield reader(shown.get(kind, out))

    def loss(step: int, generator: torch.Generator) -> torch.Tensor:
        rows = draw(generator, run.train, size)
        half = images.shape[1] // 2
        early = torch.randint(0, max(half, 1), (size, 1), generator=generator)
        frames = torch.cat([early, early + half], 1)[:, :seen]
        brightness = torch.ones(size, 1, 1, 1, 1)
        if seen > 1:
            brightness = 0.9 + 0.2 * torch.rand(size, 1, 1, 1, 1, generator=generator)
        facts = run.facts[rows]
        return sum(
            F.cross_entropy(fact.float(), facts[:, i].repeat_interleave(len(fact) // size))
            for group in logits(rows, frames, brightness)
            for i, fact in enumerate(group)
        )

    run.fit(name, modules, steps, loss)
    with torch.no_grad():
        rows = torch.arange(run.train, run.plan.scenes)
        frames = torch.tensor([[0, images.shape[1] // 2]])[:, -seen:].expand(len(rows), -1)
        groups = list(logits(rows, frames, torch.ones(1, 1, 1, 1, 1)))
    for kind, group in zip(readers, groups, strict=True):
        truth = run.facts[rows].repeat_interleave(len(group[0]) // len(rows), 0)
        right = [(x.argmax(-1) == truth[:, i]).float().mean() for i, x in enumerate(group)]
        run.note(name, **{f"held_out_accuracy_{kind}": [round(r.item(), 3) for r in right]})
