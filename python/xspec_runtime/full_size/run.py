"""The arms at full size, one after another in rotating order."""

from __future__ import annotations

import gc
import importlib.util
import random
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from time import perf_counter

import torch

from xspec_kernels import ranges

from ..arms import HfArm, Outcome, Task
from ..config import SpecConfig
from ..drafters.base import Drafter, Request
from ..drafters.graph_draft import GraphDrafter
from ..drafters.memory import NgramMemory
from ..drafters.ngram import NgramDrafter
from ..engine import SpeculativeDecoder
from ..environment import environment
from ..gpu.clock import rotated
from ..nf4_model import quantize_model
from ..profiling.figures import figures, read_timeline
from ..profiling.timeline import length, union
from ..targets.llama import LlamaTarget
from ..targets.llama_weights import LlamaWeights
from ..verify_cost.stage import find_config, random_model
from .adapters import state_pass, token_adapter_tail
from .imposed import ImposedTarget, ImposedTree, imposed_drafts, script
from .oracle import Oracle, made_up, oracles_of_pairs, read_oracle
from .peers import ResearchLoop, with_bitsandbytes

SCHEMA = "xspec.full_size/1"
WEIGHTS = ("nf4", "bf16")
NOTICE = (
    "random weights, language models only; every pass is computed, accepted lengths are imposed"
)
MEMORY_ANSWERS = 200
# Of `profiling.figures`.
ROUND = (
    *("launches_per_round", "cuda_waits_per_round", "readbacks_per_round"),
    *("gpu_busy_per_round_ms", "gpu_rest", "gap"),
)

Run = Callable[[int], Outcome]


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a run: configurations of `verify_cost.stage.CONFIGS`, and tokens."""

    config: str
    dtype: torch.dtype
    prompt_tokens: int
    draft_prompt_tokens: int
    max_new_tokens: int
    repeats: int


SHAPES = {
    "full": Shape("llama-7b", torch.bfloat16, 2076, 637, 50, 5),
    "tiny": Shape("tiny", torch.float32, 40, 20, 12, 1),
}


@dataclass(frozen=True)
class Options:
    """What a run was asked for.

    Attributes:
        pairs: recorded answers, of which both oracles are made.
        oracle, draft_oracle: accepted lengths of the memory tree, and of the draft's first chain,
            instead. At full size there is no other source.
        window_ms: in which the CPU prepares the video and the GPU idles; 0 leaves it out.
    """

    weights: str = "nf4"
    shape: str = "full"
    pairs: Path | None = None
    oracle: Path | None = None
    draft_oracle: Path | None = None
    rows: int = 16
    gamma: int = 12
    window_ms: float = 0.0
    device: str = "cuda"
    seed: int = 0
    peers: bool = True
    command: str = ""


def run_full_size(options: Options, log: Callable[[str], None]) -> dict:
    """All arms; figures as JSON types, milliseconds and bytes.

    Raises:
        ValueError: an option is unknown or out of range, or an oracle is missing or damaged.
        RuntimeError: the models do not fit the memory, or an arm's tokens are not the script's.
    """
    shape, oracles = _checked(options)
    log(NOTICE)
    log(f"memory tree: {oracles[0].source}; draft's chain: {oracles[1].source}")
    table, skipped = {}, {}
    # Each group of arms holds its models alone: the peaks are its own.
    for make in (_peer_arms, _our_arms) if options.peers else (_our_arms,):
        _reset(options.device)
        arms, missing = make(options, shape, *oracles)
        skipped |= missing
        for name, why in missing.items():
            log(f"{name}: left out, {why}")
        if options.device != "cpu":
            # Weights take more while they are made and quantized than they do later.
            torch.cuda.reset_peak_memory_stats()
        samples = _measure(arms, options.device, shape.repeats)
        peak = torch.cuda.max_memory_allocated() if options.device != "cpu" else None
        for name, (outcomes, profiled) in samples.items():
            table[name] = _figures(outcomes, options.window_ms) | profiled | {"peak_bytes": peak}
        del arms
    for name, one in table.items():
        plain = table["plain"]
        for key in ("decode_ms", "gpu_ms", "total_ms"):
            known = one[key] and plain[key]
            one[f"speedup_{key.removesuffix('_ms')}"] = plain[key] / one[key] if known else None
        log(_line(name, one))
    return {
        "schema": SCHEMA,
        "notice": NOTICE,
        "command": options.command,
        "environment": environment(),
        "weights": options.weights,
        "shape": asdict(shape) | {"dtype": str(shape.dtype)[6:]},
        "rows": options.rows,
        "gamma": options.gamma,
        "window_ms": options.window_ms,
        "seed": options.seed,
        "oracles": [{"source": o.source, "mean": o.mean} for o in oracles],
        "arms": table,
        "skipped": skipped,
    }


def _checked(options: Options) -> tuple[Shape, tuple[Oracle, Oracle]]:
    for name, value, known in (
        ("weights", options.weights, WEIGHTS), ("shape", options.shape, tuple(SHAPES)),
    ):  # fmt: skip
        if value not in known:
            raise ValueError(f"--{name} must be {' or '.join(known)}, got {value!r}")
    for name, value in (("rows", options.rows), ("gamma", options.gamma + 1)):
        if not 2 <= value <= 32:
            raise ValueError(f"--{name} is out of range: 2 to 32 rows a verify, got {value}")
    if not 0 <= options.window_ms < 1e6:
        raise ValueError(f"--window-ms must be 0 or more, got {options.window_ms}")
    if options.device != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"torch {torch.__version__} sees no CUDA device; --shape tiny needs none")
    return SHAPES[options.shape], _oracles(options)


def _oracles(options: Options) -> tuple[Oracle, Oracle]:
    """Of the tree, and of the chain."""
    if options.pairs:
        both = oracles_of_pairs(options.pairs, options.rows, options.gamma)
    elif options.shape == "tiny":
        both = made_up(options.rows, options.seed), made_up(options.gamma + 1, options.seed)
    elif options.oracle and options.draft_oracle:
        both = None, None
    else:
        raise ValueError(
            "accepted lengths are recorded ones, not made up: give --pairs, or --oracle and "
            "--draft-oracle"
        )
    given = (options.oracle, options.rows), (options.draft_oracle, options.gamma + 1)
    first, second = (
        read_oracle(path, rows, options.seed) if path else found
        for (path, rows), found in zip(given, both, strict=True)
    )
    return first, second


def _task(shape: Shape, vocab: int, options: Options) -> Task:
    draw = torch.Generator().manual_seed(options.seed)
    ids, draft = (
        torch.randint(3, vocab, (1, n), generator=draw).to(options.device)
        for n in (shape.prompt_tokens, shape.draft_prompt_tokens)
    )
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return Task("random prompt", inputs, Request(ids[0].tolist(), {"input_ids": draft}))


def _our_arms(
    options: Options, shape: Shape, oracle: Oracle, draft_oracle: Oracle
) -> tuple[dict[str, Run], dict[str, str]]:
    """`l4_verify` is `separate_verify` with the pass of L4 over the draft's states; in
    `adapter_tail` the TokenAdapter ends every verify, and every chain fares like a draft's first.
    """
    config = find_config(shape.config)
    vocab, tokens = config.vocab_size, shape.max_new_tokens
    answer, task = script(vocab, tokens, options.seed), _task(shape, vocab, options)

    def weights(seed: int) -> LlamaWeights:
        model = random_model(config, options.device, shape.dtype, seed)
        if options.weights == "nf4":
            quantize_model(model)
        return LlamaWeights.of(model, share=True)

    room = tokens + options.rows + options.gamma + 1
    target = ImposedTarget(
        weights(options.seed), answer, draft_oracle, capacity=shape.prompt_tokens + room,
        graphs=True if options.device == "cpu" else "auto",
    )  # fmt: skip
    draft_target = LlamaTarget(weights(options.seed + 1), shape.draft_prompt_tokens + room)
    draft = GraphDrafter(draft_target, options.gamma)
    rng = random.Random(options.seed)
    memory = NgramMemory()
    memory.extend([[rng.randrange(vocab) for _ in range(tokens)] for _ in range(MEMORY_ANSWERS)])

    def arm(
        fused: str,
        drafts: bool,
        trees: bool,
        adapter: Callable[[], object] = lambda: None,
        tail: Drafter | None = None,
    ) -> Run:
        rows = options.rows if trees else options.gamma + 1 if drafts or tail else 1
        tree = ImposedTree(NgramDrafter(memory, False), answer, vocab, oracle) if trees else tail
        # A chain that rides in the prefill, or seeds a tree, may be longer than the tree.
        config = SpecConfig(max(rows, options.gamma + 1) if drafts else rows, tokens,
                            prefill_fused=fused)  # fmt: skip
        decoder = SpeculativeDecoder(target, tree, config)

        def run(number: int) -> Outcome:
            start, drafted = perf_counter(), []
            if drafts:
                draft.begin(task.request)
                said = draft.opening(options.gamma)
                adapter()
                drafted = imposed_drafts(said, answer, vocab, draft_oracle[number])
            begin_ms = 1e3 * (perf_counter() - start) if drafts else 0.0
            out = decoder.generate(task.inputs, task.request, drafted=drafted)
            if out.tokens != answer[:tokens]:
                raise RuntimeError("an arm's tokens are not the ones that were imposed")
            return Outcome(
                out.tokens, begin_ms + out.total_ms, begin_ms + out.prefill_ms, out.prefill_ms,
                begin_ms, out.near_ties, 1 + len(out.rounds), out.rounds,
                out.prefill_drafted, out.prefill_accepted,
            )  # fmt: skip

        return run

    tiny = options.shape == "tiny"
    mapped = state_pass(target, options.gamma, tiny, options.seed)
    arms = {
        "plain": arm("off", False, False),
        "separate_verify": arm("exact", True, False),
        "l4_verify": arm("exact", True, False, mapped),
        "fused_exact": arm("exact", True, True),
        "fused_fast": arm("fast", True, True),
        "memory_tree": arm("off", False, True),
    }
    if not target.graphs:
        return arms, {"adapter_tail": "the target has no graphs: its ops are not Triton's"}
    tail = token_adapter_tail(target, draft, options.gamma, tiny)
    return arms | {"adapter_tail": arm("off", False, False, tail=tail)}, {}


def _peer_arms(
    options: Options, shape: Shape, oracle: Oracle, draft_oracle: Oracle
) -> tuple[dict[str, Run], dict[str, str]]:
    names = ("transformers_generate", "transformers_research_loop")
    if options.weights == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
        return {}, dict.fromkeys(names, "bitsandbytes is not installed")
    config, models = find_config(shape.config), []
    task = _task(shape, config.vocab_size, options)
    for seed in (options.seed, options.seed + 1):
        model = random_model(config, options.device, shape.dtype, seed)
        if options.weights == "nf4":
            try:
                with_bitsandbytes(model)
            except (ImportError, RuntimeError) as error:
                return {}, dict.fromkeys(names, f"bitsandbytes: {error}")
        models.append(model)
    tokens = shape.max_new_tokens
    exact = {"max_new_tokens": tokens, "min_new_tokens": tokens, "pad_token_id": 0}
    generate = HfArm(names[0], models[0], True, **exact)

    def research(number: int) -> Outcome:
        accepted = draft_oracle[number]
        return ResearchLoop(*models, options.gamma, accepted, tokens).run(task)

    return {names[0]: lambda number: generate.run(task), names[1]: research}, {}


def _measure(
    arms: Mapping[str, Run], device: str, repeats: int
) -> dict[str, tuple[list[Outcome], dict]]:
    """Outcomes of every arm after one request that warms it up, and what a profiler saw."""
    found: dict[str, list[Outcome]] = {name: [] for name in arms}
    for run in arms.values():
        run(0)
    for i, name in enumerate(rotated(list(arms), repeats) if arms else ()):
        found[name].append(arms[name](i // len(arms)))
    return {
        name: (found[name], _profiled(run, device, bool(found[name] and found[name][0].rounds)))
        for name, run in arms.items()
    }


def _profiled(run: Run, device: str, rounds: bool) -> dict:
    """Milliseconds in which the GPU worked for one request, seen by torch.profiler; in another one,
    where there are rounds, what a round asked of it and how long it rested between two of them.
    """
    activity = torch.profiler.ProfilerActivity
    gpu_ms, seen_by = None, [activity.CPU]
    if device != "cpu":
        from torch.autograd import DeviceType

        seen_by.append(activity.CUDA)
        with torch.profiler.profile(activities=[activity.CUDA]) as profiler:
            run(0)
            torch.cuda.synchronize()
        seen = [e.time_range for e in profiler.events() if e.device_type == DeviceType.CUDA]
        gpu_ms = length(union((r.start, r.end) for r in seen)) / 1e3
    if not rounds:
        return {"gpu_ms": gpu_ms}
    with (
        torch.profiler.profile(activities=seen_by) as profiler,
        ranges.listening(ranges.TorchProfiler()),
    ):
        run(0)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        found = figures(read_timeline(trace))
    return {"gpu_ms": gpu_ms, "round": {key: found[key] for key in ROUND}}


def _figures(outcomes: list[Outcome], window_ms: float) -> dict:
    rounds = [r for out in outcomes for r in out.rounds]
    ours = (
        {
            "tokens_per_verify": sum(r.emitted for r in rounds) / len(rounds),
            "propose_ms": median(r.propose_ms for r in rounds),
            "round_ms": median(r.propose_ms + r.verify_ms for r in rounds),
            "verifies": sum(r.rows > 1 for r in rounds) / len(outcomes),
            "accepted": sum(r.accepted for r in rounds) / len(outcomes),
            "prefill_accepted": sum(out.prefill_accepted for out in outcomes) / len(outcomes),
            "near_ties": sum(out.near_ties for out in outcomes) / len(outcomes),
        }
        if rounds
        else {}
    )
    total = median(out.total_ms for out in outcomes)
    # What the draft does before the prefill fits into the window as far as that lasts.
    hidden = min(window_ms, median(out.begin_ms for out in outcomes))
    return {
        "samples": len(outcomes),
        "ttft_ms": median(out.ttft_ms for out in outcomes),
        "decode_ms": median(out.total_ms - out.ttft_ms for out in outcomes),
        "total_ms": total,
        "total_with_window_ms": total + window_ms - hidden if window_ms else None,
        **ours,
    }


def _line(name: str, f: dict) -> str:
    def ratio(key: str) -> str:
        return f"{f[key]:.2f}x" if f[key] else "-"

    ours = ""
    if "near_ties" in f:
        accepted = f["accepted"] + f["prefill_accepted"]
        ours = f", {accepted:.1f} accepted, {f['near_ties']:.1f} near ties"
    rounds = ""
    if (found := f.get("round")) and found["gpu_rest"]:
        rest = found["gpu_rest"]["median_ms"]
        rounds = (
            f", a round: {found['launches_per_round']:.1f} launches, "
            f"{found['cuda_waits_per_round']:.1f} waits of CUDA, "
            f"{'-' if rest is None else f'{1e3 * rest:.0f}'} us of rest"
        )
    return (
        f"{name}: decode {f['decode_ms']:.1f} ms ({ratio('speedup_decode')}), total "
        f"{f['total_ms']:.1f} ms ({ratio('speedup_total')}), GPU ({ratio('speedup_gpu')}), first "
        f"token {f['ttft_ms']:.1f} ms{ours}{rounds}; outcomes imposed"
    )


def _reset(device: str) -> None:
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
