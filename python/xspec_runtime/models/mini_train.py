"""Training of the embedded pair: ``python -m xspec_runtime.models.mini train``.

Stages, each resumable: scenes, tokenizer, vision towers on single frames with attribute heads, the
target on cached features, the draft on its own captions, the target's greedy answers, the draft
tuned on those, the text-only assistant, export. The two-stage schedule (tower first, then language
model on frozen features, four random frames at their eight-frame positions for most of it) is what
makes it cheap.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.progress import Progress
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn

from ..data import scenes as sc
from ..data.captions import QUESTIONS
from . import mini

LEARNING_RATE = 2e-3
BUILD = Path("build/mini")
console = Console(stderr=True)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Plan:
    """Sizes of a training run."""

    scenes: int = 7000
    held_out: int = 500
    tower_steps: int = 1200
    target_steps: int = 1600
    four_frame_share: float = 0.62
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
            _replace(path, lambda p: np.savez(p, **data))
        with np.load(path, allow_pickle=False) as data:
            self.video, self.events = data["video"], data["events"]
            self.facts = torch.from_numpy(data["facts"]).long()
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
            _replace(path, lambda p: tokenizer.save(str(p)))
        return mini.load_tokenizer(self.out)

    def answers(self, kind: str) -> torch.Tensor:
        """Caption ids of every scene, zero-padded int64 ``[scenes, length]``."""
        return _pad([mini.encode_answer(c, self.tokenizer) for c in self.captions[kind]])

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
        rates = rates or {}
        groups = [
            {"params": list(module.parameters()), "lr": rates.get(key, LEARNING_RATE)}
            for key, module in modules.items()
        ]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.03, betas=(0.9, 0.98))
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            [g["lr"] for g in groups],
            total_steps=steps,
            pct_start=min(0.1, 8 / steps + 0.08),
        )
        start, spent = 0, 0.0
        if path.exists():
            saved = torch.load(path, weights_only=True)
            modules.load_state_dict(saved["modules"])
            start, spent = saved["step"], saved["cpu_seconds"]
            if start < steps:
                optimizer.load_state_dict(saved["optimizer"])
                schedule.load_state_dict(saved["schedule"])
        modules.train()
        clock = time.process_time()
        with Progress(console=console) as bar:
            task = bar.add_task(name, total=steps, completed=start)
            for step in range(start, steps):
                # A generator per step makes a resumed run draw what the whole run would have drawn.
                generator = torch.Generator().manual_seed(self.plan.seed * 1_000_003 + step)
                optimizer.zero_grad(set_to_none=True)
                value = loss(step, generator)
                value.backward()
                nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                bar.update(task, advance=1, description=f"{name} loss {value.item():.4f}")
                if (step + 1) % 100 == 0 or step + 1 == steps:
                    state = {
                        "modules": modules.state_dict(),
                        "step": step + 1,
                        "cpu_seconds": spent + time.process_time() - clock,
                        "optimizer": optimizer.state_dict(),
                        "schedule": schedule.state_dict(),
                    }
                    _replace(path, lambda p, state=state: torch.save(state, p))
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
        _replace(path, lambda p: p.write_text(json.dumps(record, indent=1)))
        console.print(stage, values)


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write through a temporary file, so that an interrupted run leaves the old file whole."""
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    write(temporary)
    os.replace(temporary, path)


def _pad(rows: list[list[int]]) -> torch.Tensor:
    out = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for i, row in enumerate(rows):
        out[i, : len(row)] = torch.tensor(row)
    return out


def _batch(generator: torch.Generator, high: int, size: int) -> torch.Tensor:
    return torch.randint(0, high, (size,), generator=generator)


def _trim(ids: torch.Tensor) -> torch.Tensor:
    return ids[:, : int((ids != mini.PAD).sum(1).max())]


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
        rows = _batch(generator, run.train, size)
        half = images.shape[1] // 2
        early = torch.randint(0, max(half, 1), (size, 1), generator=generator)
        frames = torch.cat([early, early + half], 1)[:, :seen]
        brightness = torch.ones(size, 1, 1, 1, 1)
        if seen > 1:
            brightness = 0.9 + 0.2 * torch.rand(size, 1, 1, 1, 1, generator=generator)
        facts = run.facts[rows]
        return sum(
            F.cross_entropy(fact, facts[:, i].repeat_interleave(len(fact) // size))
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


def train_target(run: Run, model) -> None:
    """Projector and language model on cached tower features."""
    plan, tower, inner = run.plan, model.model.video_tower, model.model
    answers = run.answers("target")
    with torch.no_grad(), Progress(console=console) as bar:
        cache = torch.cat(
            [
                tower_features(tower, mini.pixels(v).flatten(0, 1)).half().unflatten(0, v.shape[:2])
                for v in bar.track(
                    np.array_split(run.video, 1 + len(run.video) // 64), description="features"
                )
            ]
        )
    embed = inner.language_model.embed_tokens

    def logits(rows, ids, frames, prompt):
        visual = inner.multi_modal_projector(cache[rows][:, frames].float()).flatten(1, 2)
        before, after = torch.tensor(prompt.before), torch.tensor(prompt.after)
        size = len(rows)
        hidden = torch.cat(
            [
                embed(before).expand(size, -1, -1),
                visual,
                embed(after).expand(size, -1, -1),
                embed(ids[:, :-1]),
            ],
            1,
        )
        # Four frames keep their eight-frame positions: otherwise that phase does not transfer.
        offset = len(before)
        places = (
            offset
            + (frames[:, None] * mini.PATCH_TOKENS + torch.arange(mini.PATCH_TOKENS)).flatten()
        )
        text = len(after) + ids.shape[1] - 1
        tail = offset + mini.FRAMES * mini.PATCH_TOKENS + torch.arange(text)
        positions = torch.cat([torch.arange(offset), places, tail])[None]
        out = inner.language_model(
            inputs_embeds=hidden,
            attention_mask=torch.ones(hidden.shape[:2], dtype=torch.long),
            position_ids=positions,
            use_cache=False,
        ).last_hidden_state
        return model.lm_head(out[:, -ids.shape[1] :])

    def loss(step: int, generator: torch.Generator) -> torch.Tensor:
        rows = _batch(generator, run.train, 16)
        ids = _trim(answers[rows])
        if step < plan.four_frame_share * plan.target_steps:
            frames = torch.randperm(mini.FRAMES, generator=generator)[:4].sort().values
        else:
            frames = torch.arange(mini.FRAMES)
        prompt = run.prompts[int(_batch(generator, len(run.prompts), 1))]
        keep = ids != mini.PAD
        return F.cross_entropy(logits(rows, ids, frames, prompt)[keep], ids[keep])

    modules = nn.ModuleDict(
        {"projector": inner.multi_modal_projector, "language_model": inner.language_model}
    )
    run.fit("target_lm", modules, plan.target_steps, loss)
    exact = []
    with torch.no_grad():
        for rows in torch.arange(run.train, plan.scenes).split(50):
            ids = _trim(answers[rows])
            best = logits(rows, ids, torch.arange(mini.FRAMES), run.prompts[0]).argmax(-1)
            exact += ((best == ids) | (ids == mini.PAD)).all(1).tolist()
    run.note("target_lm", held_out_exact_captions=float(np.mean(exact)), held_out_scenes=len(exact))


def train_draft(
    run: Run, name: str, model, answers: torch.Tensor, rows_high: int, steps: int
) -> None:
    """The whole EventGPT on event images; `answers` are its own captions or the target's."""
    inner = model.model
    embed = inner.language_model.embed_tokens

    def logits(rows, ids, prompt):
        size = len(rows)
        events = inner.get_event_features(mini.pixels(run.events[rows.numpy()][:, None]))
        parts = [
            embed(torch.tensor(prompt.before)).expand(size, -1, -1),
            events,
            embed(torch.tensor(prompt.after)).expand(size, -1, -1),
            embed(ids[:, :-1]),
        ]
        out = inner.language_model(inputs_embeds=torch.cat(parts, 1), use_cache=False)
        return model.lm_head(out.last_hidden_state[:, -ids.shape[1] :])

    def loss(step: int, generator: torch.Generator) -> torch.Tensor:
        rows = _batch(generator, rows_high, 32)
        ids = _trim(answers[rows])
        prompt = run.prompts[int(_batch(generator, len(run.prompts), 1))]
        keep = ids != mini.PAD
        return F.cross_entropy(logits(rows, ids, prompt)[keep], ids[keep])

    rest = nn.ModuleDict({k: m for k, m in inner.named_children() if k != "visual_tower"})
    modules = nn.ModuleDict({"visual_tower": inner.visual_tower, "rest": rest})
    slow = LEARNING_RATE / (4 if name == "draft_raw" else 8)
    rates = {"visual_tower": slow, "rest": LEARNING_RATE / (1 if name == "draft_raw" else 2)}
    run.fit(name, modules, steps, loss, rates)
    if name != "draft_raw":
        return
    exact, right, total = [], 0, 0
    with torch.no_grad():
        for rows in torch.arange(run.train, run.plan.scenes).split(100):
            ids = _trim(answers[rows])
            keep = ids != mini.PAD
            hit = logits(rows, ids, run.prompts[0]).argmax(-1) == ids
            exact += (hit | ~keep).all(1).tolist()
            right, total = right + int(hit[keep].sum()), total + int(keep.sum())
    run.note(
        name, held_out_exact_captions=float(np.mean(exact)), held_out_token_match=right / total
    )


@torch.no_grad()
def target_answers(run: Run, model) -> torch.Tensor:
    """Greedy answers of the target on the first training scenes, padded ``[answers, length]``."""
    path = run.out / "answers.pt"
    if not path.exists():
        rows = []
        clock = time.process_time()
        with Progress(console=console) as bar:
            for i in bar.track(range(0, run.plan.answers, 50), description="target answers"):
                batch = run.video[i : min(i + 50, run.plan.answers)]
                inputs = mini.target_inputs(QUESTIONS[0], batch[0], run.tokenizer)
                ids = inputs["input_ids"].expand(len(batch), -1)
                out = model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    pixel_values_videos=mini.pixels(batch),
                    do_sample=False,
                    max_new_tokens=mini.MAX_NEW_TOKENS,
                )[:, ids.shape[1] :]
                rows += [r[: r.index(mini.EOS) + 1] if mini.EOS in r else r for r in out.tolist()]
        truth = [r[r != mini.PAD].tolist() for r in run.answers("target")[: len(rows)]]
        exact = float(np.mean([a == b for a, b in zip(rows, truth, strict=True)]))
        seconds = time.process_time() - clock
        run.note("answers", scenes=len(rows), exact_captions=exact, cpu_seconds=seconds)
        _replace(path, lambda p: torch.save(_pad(rows), p))
    return torch.load(path, weights_only=True)


def train_assistant(run: Run, model, answers: torch.Tensor) -> None:
    """A text-only Llama on the target's answers; it sees the placeholders, never the frames."""
    prefixes = [
        torch.tensor(p.ids(mini.VIDEO, mini.FRAMES * mini.PATCH_TOKENS)) for p in run.prompts
    ]

    def loss(step: int, generator: torch.Generator) -> torch.Tensor:
        ids = _trim(answers[_batch(generator, len(answers), 32)])
        prefix = prefixes[int(_batch(generator, len(prefixes), 1))].expand(len(ids), -1)
        out = model.model(torch.cat([prefix, ids[:, :-1]], 1), use_cache=False).last_hidden_state
        keep = ids != mini.PAD
        return F.cross_entropy(model.lm_head(out[:, -ids.shape[1] :])[keep], ids[keep])

    run.fit("assistant", nn.ModuleDict({"model": model.model}), run.plan.assistant_steps, loss)


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
        _replace(to / name / "model.safetensors", lambda p, s=state: save_file(s, p))
        model.config.architectures = [type(model).__name__]
        text = model.config.to_json_string(use_diff=True)
        _replace(to / name / "config.json", lambda p, t=text: p.write_text(t))
    lengths = (answers != mini.PAD).sum(1)
    flat = torch.cat([row[:n] for row, n in zip(answers, lengths, strict=True)]).to(torch.int16)
    data = {"tokens": flat, "lengths": lengths.to(torch.int16)}
    _replace(to / "answers.safetensors", lambda p: save_file(data, p))
    _replace(
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
    _replace(to / "training.json", lambda p: p.write_text(json.dumps(record, indent=1)))


@app.callback()
def _group() -> None:
    """The embedded pair."""


@app.command()
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
    if part not in ("all", "target", "draft"):
        raise typer.BadParameter(f"--part must be all, target or draft, got {part!r}")
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
        export(run, models, answers, to)


def main() -> None:
    """Entry point of ``python -m xspec_runtime.models.mini``."""
    app()
