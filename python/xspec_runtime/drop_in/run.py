"""All arms answer all prompts in turns, in one process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from statistics import median, quantiles
from time import perf_counter

import torch

from ..environment import environment
from .arms import ARMS, KEPT, LOOKUP, LOOKUP_PACKED, PLAIN, Arms, Outcome
from .material import Prompt, material

SCHEMA = "xspec.drop_in/1"
# (prompt_lookup_num_tokens, max_matching_ngram_size) that are tried.
LOOKUPS = ((4, 2), (8, 2), (10, 2), (10, 3), (16, 2), (16, 3))
GROUNDED = ("edit", "quote")  # groups whose answers repeat their prompts; also shown together
TRIED = 2  # prompts of each group that they are tried on

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True)
class DropInOptions:
    """What to run.

    Attributes:
        target: folder of a causal language model, or `material.EMBEDDED`.
        prompts: JSON list of objects with a group and a question.
        samples: prompts at most.
        repeats: times that every arm answers each prompt, the memory new every time.
        arms: by name, see `arms.ARMS`; `PLAIN` always runs.
    """

    target: str
    prompts: Path | None = None
    samples: int = 1000
    repeats: int = 1
    arms: str = ""
    max_new_tokens: int = 64
    rows: int = 16
    threads: int = 1
    command: str = ""

    def names(self) -> list[str]:
        """The arms.

        Raises:
            ValueError: an option is out of range or an arm unknown.
        """
        limits = (("samples", 1, 100_000), ("repeats", 1, 1000), ("max_new_tokens", 2, 100_000),
                  ("rows", 2, 64), ("threads", 1, 1024))  # fmt: skip
        for name, low, high in limits:
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} must be in {low}..{high}, got {getattr(self, name)}")
        names = [name.strip() for name in self.arms.split(",") if name.strip()] or [*ARMS]
        if unknown := set(names) - set(ARMS):
            raise ValueError(f"unknown arms {sorted(unknown)}; there are {', '.join(ARMS)}")
        return [PLAIN, *(name for name in ARMS if name in names and name != PLAIN)]


def run_drop_in(
    options: DropInOptions, progress: Progress = lambda done, total, what: None
) -> dict[str, object]:
    """Run everything; returns results of schema ``xspec.drop_in/1``. Ctrl-C ends it early:
    ``complete`` is then false.

    Raises:
        FileNotFoundError, ValueError: see `DropInOptions.names` and `material`.
    """
    names = options.names()
    torch.set_num_threads(options.threads)
    model, pad, prompts = material(
        options.target, options.prompts, options.samples, options.max_new_tokens
    )
    arms = Arms(model, pad, options.max_new_tokens, options.rows)
    vocabulary = model.config.get_text_config().vocab_size
    asked = {int(token) for prompt in prompts for token in prompt.inputs["input_ids"][0]}
    arms.never = max(set(range(vocabulary)) - asked)
    start = perf_counter()
    arms.run(KEPT, prompts[0])
    first_ms = 1e3 * (perf_counter() - start)
    for name in names:  # what else is measured or compiled by a first call
        arms.run(name, prompts[0])
    tried = _tune(arms, prompts, progress) if {LOOKUP, LOOKUP_PACKED} & set(names) else []
    config = asdict(options)
    command = config.pop("command")
    config["prompts"] = config["prompts"] and str(config["prompts"])
    results: dict[str, object] = {
        "schema": SCHEMA, "environment": environment(), "command": command, "config": config,
        "complete": False, "first_call_ms": first_ms, "lookup": arms.lookup, "lookups": tried,
    }  # fmt: skip
    samples: list[dict[str, object]] = []
    try:
        _measure(arms, names, prompts, options.repeats, samples, progress)
        results["complete"] = True
    except KeyboardInterrupt:
        pass
    return results | {"arms": summarize(names, samples), "samples": samples}


def summarize(names: Sequence[str], samples: Sequence[Mapping]) -> list[dict[str, object]]:
    """Figures of every arm, of all groups together (``all``) and of each.

    ``ratio`` is the median over the answers of their time to `PLAIN`'s for the same prompt beside
    it, ``spread`` the quartiles of that; sums are over the answers.
    """
    groups: dict[str, None] = dict.fromkeys(sample["group"] for sample in samples)
    base = {(s["prompt"], s["repeat"]): s["total_ms"] for s in samples if s["arm"] == PLAIN}

    def figures(mine: list[Mapping]) -> dict[str, object]:
        total = sum(s["total_ms"] for s in mine)
        plain = [base[s["prompt"], s["repeat"]] for s in mine]
        ratios = [s["total_ms"] / p for s, p in zip(mine, plain, strict=True)]
        tokens, forwards = (sum(s[key] for s in mine) for key in ("tokens", "forwards"))
        return {
            "answers": len(mine), "identical": sum(s["identical"] for s in mine),
            "tokens": tokens, "forwards": forwards, "tokens_per_forward": tokens / forwards,
            "total_ms": total, "speedup": sum(plain) / total, "ratio": median(ratios),
            "spread": quantiles(ratios, n=4)[::2] if len(ratios) > 1 else ratios * 2,
        }  # fmt: skip

    found = []
    for name in names:
        mine = [s for s in samples if s["arm"] == name]
        parts = {g: [s for s in mine if s["group"] == g] for g in groups}
        cells = {"all": mine, **(parts if len(groups) > 1 else {})}
        if set(GROUNDED) <= groups.keys():
            cells[" + ".join(GROUNDED)] = [s for g in GROUNDED for s in parts[g]]
        found.append(
            {"name": name, "groups": {g: figures(part) for g, part in cells.items() if part}}
        )
    return found


def _tune(arms: Arms, prompts: Sequence[Prompt], progress: Progress) -> list[dict[str, object]]:
    """Choose the prompt lookup's fastest setting on some prompts; returns what was tried."""
    groups = dict.fromkeys(prompt.group for prompt in prompts)
    chosen = [p for g in groups for p in [q for q in prompts if q.group == g][:TRIED]]
    tried = []
    for number, (tokens, ngram) in enumerate(LOOKUPS):
        arms.lookup = {"prompt_lookup_num_tokens": tokens, "max_matching_ngram_size": ngram}
        total = sum(arms.run(LOOKUP, prompt).total_ms for prompt in chosen)
        tried.append({**arms.lookup, "total_ms": total})
        progress(number + 1, len(LOOKUPS), "prompt lookup's settings")
    best = min(tried, key=lambda one: one["total_ms"])
    arms.lookup = {key: value for key, value in best.items() if key != "total_ms"}
    return tried


def _measure(
    arms: Arms,
    names: Sequence[str],
    prompts: Sequence[Prompt],
    repeats: int,
    samples: list[dict[str, object]],
    progress: Progress,
) -> None:
    """Append every answer's figures to `samples`. Arms take turns in random order: each warms or
    cools the caches for the one after it.
    """
    order = Random(0)
    for repeat in range(repeats):
        arms.begin()
        for number, prompt in enumerate(prompts):
            found: dict[str, Outcome] = {}
            for name in order.sample(names, len(names)):
                found[name] = arms.run(name, prompt)
            for name in names:
                one = found[name]
                samples.append(
                    {
                        "arm": name, "prompt": prompt.name, "group": prompt.group,
                        "repeat": repeat, "tokens": len(one.tokens), "forwards": one.forwards,
                        "total_ms": one.total_ms, "identical": one.tokens == found[PLAIN].tokens,
                    }
                )  # fmt: skip
            done = repeat * len(prompts) + number + 1
            progress(done, repeats * len(prompts), "prompts")
