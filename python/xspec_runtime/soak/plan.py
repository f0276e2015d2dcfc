"""What a soak asks: random calls of decoders, each a function of the seed and its number alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

import torch

from ..config import PREFILL_FUSED, SpecConfig
from ..drafters.base import Request
from .faults import MOMENTS

VOCAB = 128
CAPACITY = 160
LONGEST = 40  # tokens of an answer
LENGTHS = (1, 5, 12, 20, 31, 47, 64, 90)  # of prompts
# A prompt that leaves so little room that its answer fills the cache.
FULL = CAPACITY - 10
BATCHES = (1, 1, 2, 3, 8)
ROWS = (1, 2, 6, 16, 33, 64)
DRAFTERS = ("guess", "memory", "model", "tree", "priced", "graph")
PENALTY = 1.3  # of repetition, in requests with logits processors
PROCESSED = 3  # prompts that occur with them too
# Faults of a whole call, and those of one of its requests.
SHARED = ("nan", "memory", "callback")
SINGLE = (*MOMENTS, "input", "full")
SOUND, CANCELLED = 0.55, 0.15  # chances of a call without any and with cancelled requests


@dataclass(slots=True)
class Plan:
    """One request.

    Attributes:
        prompt: number of its prompt.
        drafter: one of `DRAFTERS`.
        fault: one of `SINGLE`, or empty.
        after: rounds before a proposal fails.
        cancel: times `stop` says no before it says yes; None: it is never asked.
        drafted: how many tokens of a draft's answer come along.
    """

    prompt: int
    drafter: str
    seed: int
    processed: bool = False
    fault: str = ""
    after: int = 0
    cancel: int | None = None
    drafted: int = 0


@dataclass(slots=True)
class PlannedRequest(Request):
    """What a drafter may know, and which drafter that is."""

    plan: Plan | None = None
    answer: Sequence[int] = ()


@dataclass(slots=True)
class Call:
    """One call of a decoder.

    Attributes:
        batch: of the decoder; 1 is a `SpeculativeDecoder`.
        end: position in the first prompt's plain answer whose token ends answers; None: nothing.
        fault: one of `SHARED`, or empty.
        after: passes or rounds before it happens.
        slot: whose rows become NaN.
    """

    number: int
    engine: str
    batch: int
    config: SpecConfig
    plans: list[Plan] = field(default_factory=list)
    end: int | None = None
    fault: str = ""
    after: int = 0
    slot: int = 0


def prompts(seed: int, count: int) -> list[torch.Tensor]:
    """Ids ``[1, L]`` of so many prompts; the last one is `FULL` long."""
    rng = Random(f"{seed} prompts")
    lengths = [LENGTHS[i % len(LENGTHS)] for i in range(count - 1)] + [FULL]
    return [torch.tensor([[rng.randrange(3, VOCAB) for _ in range(n)]]) for n in lengths]


def plan_call(seed: int, number: int, engines: Sequence[str], count: int) -> Call:
    """Call `number` of a soak; of the prompts 0 .. `count` - 1 the last is only for faults."""
    rng = Random(f"{seed} call {number}")
    batch = rng.choice(BATCHES)
    config = SpecConfig(
        rng.choice(ROWS),
        rng.randint(1, LONGEST),
        prefill_fused=rng.choice(PREFILL_FUSED),
        pad_rows=rng.choice(((), (8, 32))),
    )
    call = Call(number, rng.choice(list(engines)), batch, config)
    call.end = rng.choice((None, None, rng.randrange(LONGEST)))
    for _ in range(1 if batch == 1 else rng.randint(1, batch + 3)):
        plan = Plan(rng.randrange(count - 1), rng.choice(DRAFTERS), rng.randrange(1 << 30))
        plan.processed = rng.random() < 0.5 and plan.prompt < PROCESSED
        plan.drafted = rng.choice((0, 0, 0, 1, 5, 12))
        call.plans.append(plan)
    chance = rng.random()
    if chance < SOUND:
        return call
    if chance < SOUND + CANCELLED:
        for plan in rng.sample(call.plans, rng.randint(1, len(call.plans))):
            plan.cancel = rng.choice((0, 1, 2, 3, 8))
        return call
    fault, after = rng.choice(SHARED + SINGLE), rng.randrange(6)
    if fault in SHARED:
        call.fault, call.after, call.slot = fault, after, rng.randrange(batch)
    else:
        plan = rng.choice(call.plans)
        plan.fault, plan.after = fault, after
        if fault == "full":
            plan.prompt, plan.processed, plan.drafted = count - 1, False, 0
            call.config, call.end = SpecConfig(config.rows, LONGEST), None
    return call
