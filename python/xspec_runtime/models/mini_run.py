"""One training run of the embedded pair: its sizes, data, optimizer loop and record."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn

from ..data import scenes as sc
from ..data.captions import QUESTIONS
from ..files import read_saved, replace_file
from . import mini

LEARNING_RATE = 2e-3
console = Console(stderr=True)


@dataclass(frozen=True)
class Plan:
    """Sizes of a training run."""

    scenes: int = 9500
    held_out: int = 500
    tower_steps: int = 1400
    target_steps: int = 1800
    four_frame_share: float = 0.7
    draft_tower_steps: int = 600
    draft_steps: int = 700
    answers: int = 3000
    align_steps: int = 1100
    assistant_steps: int = 500
    seed: int = 0

    @classmethod
    def smoke(cls, steps: int) -> Plan:
        """A few steps of everything: proves that the code runs, trains nothing."""
        return cls(96, 16, steps, steps, 0.5, steps, steps, 8, steps, steps)


class Run:
    """One training run: its folder, its data, and a record of what every stage measured."""

    def __init__(self, out: Path, plan: Plan) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.out, self.plan = out, plan
        self.train = plan.scenes - plan.held_out
        self._load_scenes()
        self.tokenizer = self._tokenizer()
        self.prompts = [mini.Prompt.of(q, self.tokenizer) for q in QUESTIONS]

    def _load_scenes(self) -> None:
        path = self.out / "scenes.npz"
        if not path.exists():
            clock = time.process_time()
            with Progress(console=console) as bar:
                samples = [
                    sc.make_sample(s)
                    for s in bar.track(range(self.plan.scenes), description="scenes")
                ]
            data = {
                "video": np.stack([s.video for s in samples]),
                "events": np.stack([s.event_image for s in samples]),
                "facts": np.array([sc.facts(s.scene) for s in samples]),
            }
            replace_file(path, lambda p: np.savez(p, **data))
            self.note("scenes", count=len(samples), cpu_seconds=time.process_time() - clock)
        try:
            with np.load(path, allow_pickle=False) as data:
                self.video, self.events = data["video"], data["events"]
                self.facts = torch.from_numpy(data["facts"]).long()
        except Exception as error:
            raise ValueError(f"{path} is damaged ({type(error).__name__}); remove it") from error
        drawn = [sc.Scene.draw(np.random.default_rng(s)) for s in range(self.plan.scenes)]
        self.captions = {
            "target": [sc.target_caption(s) for s in drawn],
            "draft": [sc.draft_caption(s) for s in drawn],
        }

    def _tokenizer(self):
        path = self.out / "tokenizer.json"
        if not path.exists():
            tokenizer = Tokenizer(models.BPE())
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            tokenizer.decoder = decoders.ByteLevel()
            trainer = trainers.BpeTrainer(
                vocab_size=mini.VOCAB,
                special_tokens=list(mini.SPECIAL_TOKENS),
                initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            )
            texts = [f" {c}" for kind in self.captions.values() for c in kind[: self.train]]
            texts += [f"USER: \n{q} ASSISTANT:" for q in QUESTIONS] * 20
            tokenizer.train_from_iterator(texts, trainer)
            replace_file(path, lambda p: tokenizer.save(str(p)))
        return mini.load_tokenizer(self.out)

    def answers(self, kind: str) -> torch.Tensor:
        """Caption ids of every scene, zero-padded int64 ``[scenes, length]``."""
        return pad([mini.encode_answer(c, self.tokenizer) for c in self.captions[kind]])

    def fit(
        self,
        name: str,
        modules: nn.ModuleDict,
        steps: int,
        loss: Callable[[int, torch.Generator], torch.Tensor],
        rates: dict[str, float] | None = None,
    ) -> nn.ModuleDict:
        """Train `modules`; saved every 100 steps, resumed from there, skipped when complete."""
        path = self.out / f"{name}.pt"
        optimizers = _optimizers(modules, rates or {})
        schedules = [
            torch.optim.lr_scheduler.OneCycleLR(
                optimizer,
                [g["lr"] for g in optimizer.param_groups],
                total_steps=steps,
                pct_start=min(0.1, 8 / steps + 0.08),
                cycle_momentum=False,
            )
            for optimizer in optimizers
        ]
        stateful = [*optimizers, *schedules]
        start, spent = 0, 0.0
        if path.exists():
            saved = read_saved(path)
            modules.load_state_dict(saved["modules"])
            start, spent = saved["step"], saved["cpu_seconds"]
            if start < steps:
                for part, state in zip(stateful, saved["progress"], strict=True):
                    part.load_state_dict(state)
        modules.train()
        clock = time.process_time()
        with Progress(console=console) as bar:
            task = bar.add_task(name, total=steps, completed=start)
            for step in range(start, steps):
                # A generator per step makes a resumed run draw what the whole run would have drawn.
                generator = torch.Generator().manual_seed(self.plan.seed * 1_000_003 + step)
                modules.zero_grad(set_to_none=True)
                with mixed_precision():
                    value = loss(step, generator)
                value.backward()
                nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
                for part in stateful:
                    part.step()
                bar.update(task, advance=1, description=f"{name} loss {value.item():.4f}")
                if (step + 1) % 100 == 0 or step + 1 == steps:
                    state = {
                        "modules": modules.state_dict(),
                        "step": step + 1,
                        "cpu_seconds": spent + time.process_time() - clock,
                        "progress": [part.state_dict() for part in stateful],
                    }
                    replace_file(path, lambda p, state=state: torch.save(state, p))
                    console.print(
                        f"{name} {step + 1}/{steps} loss {value.item():.4f} "
                        f"{state['cpu_seconds']:.0f} cpu-s"
                    )
        self.note(name, steps=steps, cpu_seconds=spent + time.process_time() - clock)
        return modules.eval()

    def note(self, stage: str, **values) -> None:
        """Add measurements of a stage to the record."""
        path = self.out / "record.json"
        record = json.loads(path.read_text()) if path.exists() else {}
        record.setdefault(stage, {}).update(values)
        replace_file(path, lambda p: p.write_text(json.dumps(record, indent=1)))
        console.print(stage, values)


def mixed_precision() -> torch.autocast:
    """Matrix products in bfloat16: 1.5x faster where the CPU has instructions for it."""
    return torch.autocast("cpu", dtype=torch.bfloat16)


def _optimizers(modules: nn.ModuleDict, rates: dict[str, float]) -> list[torch.optim.Optimizer]:
    """Muon for the weight matrices of transformer layers, AdamW for everything else.

    Muon (Jordan et al., 2024) with updates scaled to AdamW's size, so both share a learning rate:
    after 300 steps the target's loss was a third of AdamW's.
    """
    matrices, others = [], []
    for key, module in modules.items():
        rate = rates.get(key, LEARNING_RATE)
        parameters = [(f"{key}.{n}", p) for n, p in module.named_parameters()]
        inner = [p for n, p in parameters if ".layers." in n and p.dim() == 2]
        outer = [p for n, p in parameters if not (".layers." in n and p.dim() == 2)]
        if inner:
            matrices.append({"params": inner, "lr": rate})
        others.append({"params": outer, "lr": rate})
    adamw = torch.optim.AdamW(others, weight_decay=0.03, betas=(0.9, 0.98))
    if not matrices:
        return [adamw]
    muon = torch.optim.Muon(matrices, weight_decay=0.03, adjust_lr_fn="match_rms_adamw")
    return [muon, adamw]


def pad(rows: list[list[int]]) -> torch.Tensor:
    """Rows of ids as int64 ``[rows, longest]``, zero behind."""
    out = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for i, row in enumerate(rows):
        out[i, : len(row)] = torch.tensor(row)
    return out


def draw(generator: torch.Generator, high: int, size: int) -> torch.Tensor:
    """`size` numbers below `high`."""
    return torch.randint(0, high, (size,), generator=generator)


def trim(ids: torch.Tensor) -> torch.Tensor:
    """`ids` without the columns that are padding in every row."""
    return ids[:, : int((ids != mini.PAD).sum(1).max())]
