"""Training of the embedded pair: ``python -m xspec_runtime.models.mini train``.

Stages, each resumable: scenes, tokenizer, vision towers on single frames with attribute heads, the
target on cached features, the draft on its own captions, the target's greedy answers, the draft
tuned on those, the text-only assistant, the adapters, export. The two-stage schedule (tower first,
then language model on frozen features, four random frames at their eight-frame positions for most
of it) is what makes it cheap.
"""

from __future__ import annotations

import json
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from safetensors.torch import save_file
from torch import nn

from ..adapters.mini.train import draft_texts, train_adapters
from ..cli import Group, command
from ..files import check_output, replace_file
from . import mini
from .mini_run import Plan, Run
from .mini_stages import target_answers, train_assistant, train_draft, train_target
from .mini_towers import tower_features, train_tower

BUILD = Path("build/mini")
app = typer.Typer(cls=Group, add_completion=False, pretty_exceptions_enable=False)


def export(run: Run, models: dict[str, nn.Module], answers: torch.Tensor, to: Path) -> None:
    """Half-precision safetensors, configurations, tokenizer, answers and the training record."""
    to.mkdir(parents=True, exist_ok=True)
    for name, model in models.items():
        (to / name).mkdir(exist_ok=True)
        state = {
            key: value.half().contiguous()
            for key, value in model.state_dict().items()
            if key != "lm_head.weight" and "image_tower" not in key
        }
        replace_file(to / name / "model.safetensors", lambda p, s=state: save_file(s, p))
        model.config.architectures = [type(model).__name__]
        text = model.config.to_json_string(use_diff=True)
        replace_file(to / name / "config.json", lambda p, t=text: p.write_text(t))
    lengths = (answers != mini.PAD).sum(1)
    flat = torch.cat([row[:n] for row, n in zip(answers, lengths, strict=True)]).to(torch.int16)
    data = {"tokens": flat, "lengths": lengths.to(torch.int16)}
    replace_file(to / "answers.safetensors", lambda p: save_file(data, p))
    replace_file(
        to / "tokenizer.json", lambda p: p.write_bytes((run.out / "tokenizer.json").read_bytes())
    )
    record = {
        "plan": asdict(run.plan),
        "stages": json.loads((run.out / "record.json").read_text()),
        "environment": {
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
        },
        "command": "python -m xspec_runtime.models.mini train",
    }
    record["stages_cpu_seconds"] = sum(s.get("cpu_seconds", 0) for s in record["stages"].values())
    replace_file(to / "training.json", lambda p: p.write_text(json.dumps(record, indent=1)))


@app.callback()
def _group() -> None:
    """The embedded pair."""


@command(app, "training needs about 3 GB free")
def train(
    out: Annotated[Path, typer.Option(help="Folder for intermediate results.")] = BUILD,
    to: Annotated[Path, typer.Option(help="Folder for the checkpoints.")] = mini.CHECKPOINTS,
    smoke_steps: Annotated[int, typer.Option(help="Only so many steps a stage, few scenes.")] = 0,
    seed: Annotated[int, typer.Option(help="Seed of initialization and batches.")] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    part: Annotated[
        str, typer.Option(help="all, target or draft: the two halves can run side by side.")
    ] = "all",
) -> None:
    """Train the pair and write its checkpoints; an interrupted run goes on where it stopped."""
    train_pair(out, to, smoke_steps, seed, threads, part)


def train_pair(out: Path, to: Path, smoke_steps: int, seed: int, threads: int, part: str) -> None:
    """All stages of `part`.

    Raises:
        ValueError: an option is out of range.
        OSError: a folder cannot be written; said before training.
    """
    if part not in ("all", "target", "draft"):
        raise ValueError(f"--part must be all, target or draft, got {part!r}")
    limits = (
        ("--smoke-steps", smoke_steps, 0, 10_000),
        ("--seed", seed, 0, 1_000_000),
        ("--threads", threads, 1, 1024),
    )
    for name, value, low, high in limits:
        if not low <= value <= high:
            raise ValueError(f"{name} must be in {low}..{high}, got {value}")
    for file in (out / "record.json", *([to / "training.json"] if part == "all" else [])):
        check_output(file)
    torch.set_num_threads(threads)
    plan = Plan.smoke(smoke_steps) if smoke_steps else Plan(seed=seed)
    run = Run(out, plan)
    models = {}
    for i, name in enumerate(("target", "draft_raw", "draft", "assistant")):
        torch.manual_seed(seed * 100 + i)
        models[name] = mini.build(name)
    if part != "draft":
        target = models["target"]
        tower = target.model.video_tower
        steps = plan.tower_steps
        train_tower(run, "target_tower", tower, tower_features, run.video, steps, "cls one pair")
        target.model.image_tower.load_state_dict(tower.state_dict())
        train_target(run, target)
        target.half().float()
        answers = target_answers(run, target.eval())
        train_assistant(run, models["assistant"], answers)
    if part != "target":
        tower = models["draft_raw"].model.visual_tower

        def last_layer(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
            return module(x).last_hidden_state

        events = run.events[:, None]
        steps = plan.draft_tower_steps
        train_tower(run, "draft_tower", tower, last_layer, events, steps, "attention one")
        raw = models["draft_raw"]
        train_draft(run, "draft_raw", raw, run.answers("draft"), run.train, plan.draft_steps)
    if part == "all":
        models["draft"].load_state_dict(models["draft_raw"].state_dict())
        train_draft(run, "draft", models["draft"], answers, len(answers), plan.align_steps)
        texts = draft_texts(run, models["draft_raw"].eval())
        train_adapters(run, texts, answers, to, smoke_steps or None)
        export(run, models, answers, to)


def main() -> None:
    """Entry point of ``python -m xspec_runtime.models.mini``."""
    app()
