"""Stages of training behind the towers: target, draft, the target's answers, assistant."""

from __future__ import annotations

import time

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import nn

from ..data.captions import QUESTIONS
from ..files import read_saved, replace_file
from . import mini
from .mini_run import LEARNING_RATE, Run, console, draw, mixed_precision, pad, trim
from .mini_towers import tower_features


def train_target(run: Run, model) -> None:
    """Projector and language model on cached tower features."""
    plan, tower, inner = run.plan, model.model.video_tower, model.model
    answers = run.answers("target")
    clock = time.process_time()
    with torch.no_grad(), mixed_precision(), Progress(console=console) as bar:
        parts = [
            tower_features(tower, mini.pixels(v).flatten(0, 1)).half().unflatten(0, v.shape[:2])
            for v in bar.track(
                np.array_split(run.video, 1 + len(run.video) // 64), description="features"
            )
        ]
    cache = torch.cat(parts)
    run.note("target_features", cpu_seconds=time.process_time() - clock)
    embed = inner.language_model.embed_tokens

    def logits(rows, ids, frames, prompt):
        visual = inner.multi_modal_projector(cache[rows][:, frames].float()).float().flatten(1, 2)
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
        return model.lm_head(out[:, -ids.shape[1] :]).float()

    def loss(step: int, generator: torch.Generator) -> torch.Tensor:
        rows = draw(generator, run.train, 16)
        ids = trim(answers[rows])
        if step < plan.four_frame_share * plan.target_steps:
            frames = torch.randperm(mini.FRAMES, generator=generator)[:4].sort().values
        else:
            frames = torch.arange(mini.FRAMES)
        prompt = run.prompts[int(draw(generator, len(run.prompts), 1))]
        keep = ids != mini.PAD
        return F.cross_entropy(logits(rows, ids, frames, prompt)[keep], ids[keep])

    modules = nn.ModuleDict(
        {"projector": inner.multi_modal_projector, "language_model": inner.language_model}
    )
    run.fit("target_lm", modules, plan.target_steps, loss)
    exact = []
    with torch.no_grad():
        for rows in torch.arange(run.train, plan.scenes).split(50):
            ids = trim(answers[rows])
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
            events.float(),
            embed(torch.tensor(prompt.after)).expand(size, -1, -1),
            embed(ids[:, :-1]),
        ]
        out = inner.language_model(inputs_embeds=torch.cat(parts, 1), use_cache=False)
        return model.lm_head(out.last_hidden_state[:, -ids.shape[1] :]).float()

    def loss(step: int, generator: torch.Generator) -> torch.Tensor:
        rows = draw(generator, rows_high, 32)
        ids = trim(answers[rows])
        prompt = run.prompts[int(draw(generator, len(run.prompts), 1))]
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
            ids = trim(answers[rows])
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
        replace_file(path, lambda p: torch.save(pad(rows), p))
    return read_saved(path)


def train_assistant(run: Run, model, answers: torch.Tensor) -> None:
    """A text-only Llama on the target's answers; it sees the placeholders, never the frames."""
    prefixes = [
        torch.tensor(p.ids(mini.VIDEO, mini.FRAMES * mini.PATCH_TOKENS)) for p in run.prompts
    ]

    def loss(step: int, generator: torch.Generator) -> torch.Tensor:
        ids = trim(answers[draw(generator, len(answers), 32)])
        prefix = prefixes[int(draw(generator, len(prefixes), 1))].expand(len(ids), -1)
        out = model.model(torch.cat([prefix, ids[:, :-1]], 1), use_cache=False).last_hidden_state
        keep = ids != mini.PAD
        return F.cross_entropy(model.lm_head(out[:, -ids.shape[1] :]).float()[keep], ids[keep])

    run.fit("assistant", nn.ModuleDict({"model": model.model}), run.plan.assistant_steps, loss)
