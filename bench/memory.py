"""How long an n-gram memory takes to propose a tree, and to learn an answer."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from itertools import islice, pairwise
from json import dumps
from pathlib import Path
from typing import Annotated

import typer

from xspec_runtime.cli import command
from xspec_runtime.cost.spot import numbers
from xspec_runtime.data.pairs import read_pairs
from xspec_runtime.drafters.base import MAX_ROWS, Request
from xspec_runtime.drafters.ngram import NgramDrafter, NgramMemory
from xspec_runtime.environment import environment
from xspec_runtime.files import check_output, write_json

LENGTH = 50  # tokens of an answer
MOST = 8_000_000  # a memory has room for twice as many
VOCAB = 32_000
NOVEL = 0.05  # tokens that are random
CROSSING = 0.3  # chance, at a token, to go on as another recorded answer with the same two tokens


def crossed(recorded: list[list[int]], rng: random.Random) -> Iterator[list[int]]:
    """Endless answers that go on now as one recorded answer, now as another."""
    places: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for number, answer in enumerate(recorded):
        for i, bigram in enumerate(pairwise(answer), 1):
            places.setdefault(bigram, []).append((number, i))
    while True:
        number, i = rng.randrange(len(recorded)), 0
        answer = recorded[number][:1]
        while len(answer) < LENGTH and (i := i + 1) < len(recorded[number]):
            fresh = rng.random() < NOVEL
            answer.append(rng.randrange(VOCAB) if fresh else recorded[number][i])
            if rng.random() < CROSSING and tuple(answer[-2:]) in places:
                number, i = rng.choice(places[tuple(answer[-2:])])
        yield answer


def invented(rng: random.Random) -> list[list[int]]:
    """Answers of frequent phrases, in the place of recorded ones."""
    phrases = [[int(VOCAB ** rng.random()) - 1 for _ in range(6)] for _ in range(2000)]
    return [
        [t for _ in range(8) for t in phrases[int(2000 ** rng.random()) - 1]] for _ in range(800)
    ]


def timed(times: list[float], work: Callable[[], object]) -> None:
    start = time.perf_counter()
    work()
    times.append((time.perf_counter() - start) * 1e6)


def row(name: str, times: list[float], **fields: object) -> dict[str, object]:
    times.sort()
    last = len(times) - 1
    return {
        "measured": name, **fields, "calls": len(times),
        "median_us": round(times[last // 2], 1), "p95_us": round(times[last * 19 // 20], 1),
    }  # fmt: skip


def measure(memory: NgramMemory, answers: list[list[int]], rows: int) -> list[dict[str, object]]:
    """Proposals at every third token, the first after an answer was learned apart, and learning."""
    rng = random.Random(rows)
    prompt = [rng.randrange(VOCAB) for _ in range(200)]
    drafter, steady, first, learned = NgramDrafter(memory, online=True), [], [], []
    for answer in answers:
        drafter.begin(Request(prompt_ids=prompt))
        for known in range(1, len(answer), 3):
            context = answer[:known]
            timed(first if known == 1 else steady, lambda c=context: drafter.propose(c, rows))
        timed(learned, lambda a=answer: drafter.end(a))
    fields = {"stored_tokens": memory.statistics().tokens, "rows": rows, "backend": memory.backend}
    return [
        row("propose", steady, **fields),
        row("propose after add", first, **fields),
        row("add", learned, **fields),
    ]


def run(pairs: Path | None, tokens: int, rows: str, backend: str, json: Path | None, call: str):
    """Fill a memory, measure at every number of rows, print and write the figures."""
    counts = numbers("--rows", rows, MAX_ROWS)
    if not 1 <= tokens <= MOST:
        raise ValueError(f"--tokens must be in 1..{MOST}, got {tokens}")
    if json:
        check_output(json)
    rng = random.Random(0)
    recorded = [list(p.target) for p in read_pairs(pairs)] if pairs else invented(rng)
    source = crossed(recorded, rng)
    memory = NgramMemory(max_tokens=2 * tokens, backend=backend)
    while (stored := memory.statistics().tokens) < tokens:
        memory.extend(islice(source, 1 + (tokens - stored) // LENGTH))
    results = [
        found for count in counts for found in measure(memory, list(islice(source, 100)), count)
    ]
    for found in results:
        print(dumps(found))
    if json:
        write_json(json, {"schema": "xspec.memory/1", "command": call,
                          "environment": environment(), "memory": results})  # fmt: skip


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@command(app)
def main(
    pairs: Annotated[
        Path | None, typer.Option(help="Recorded pairs to make answers of; else made up.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens that the memory holds.")] = 1_000_000,
    rows: Annotated[str, typer.Option(help="Rows of a tree, comma-separated.")] = "6,16,32,64",
    backend: Annotated[str, typer.Option(help="auto, native or python.")] = "auto",
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the figures here.")
    ] = None,
) -> None:
    """Time how long a memory of this size takes to propose a tree and to learn an answer."""
    source = f" --pairs {pairs}" if pairs else ""
    said = f"python bench/memory.py{source} --tokens {tokens} --rows {rows} --backend {backend}"
    run(pairs, tokens, rows, backend, json_file, said)


if __name__ == "__main__":
    app()
