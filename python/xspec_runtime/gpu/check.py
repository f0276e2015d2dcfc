"""Phase `check`: every op against its reference on the CPU, streams, graphs, compiled kernels, and
the law end to end.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch.utils import deterministic

from xspec_kernels import info

from .adapters import adapter_forward_cases
from .cases import (
    SIZES,
    Case,
    commit_case,
    copies,
    kv_commit_cases,
    tree_mask_cases,
    verify_greedy_cases,
)
from .compiled import compiled_kernels
from .forward import law
from .forward_cases import (
    embed_cases,
    lm_head_cases,
    norm_act_cases,
    rope_append_cases,
    tree_attention_cases,
    verify_tail_cases,
)
from .linear_cases import nf4_linear_cases, skinny_linear_cases
from .parts import CheckFailed, Context, Options, Part, Skip
from .rounds import check_rounds
from .sampling import sample_tokens_cases, verify_sampling_cases

OPS: dict[str, Callable[..., Iterator[Case]]] = {
    "tree_mask": tree_mask_cases,
    "verify_greedy": verify_greedy_cases,
    "kv_commit": kv_commit_cases,
    "embed": embed_cases,
    "norm_act": norm_act_cases,
    "skinny_linear": skinny_linear_cases,
    "nf4_linear": nf4_linear_cases,
    "rope_append": rope_append_cases,
    "tree_attention": tree_attention_cases,
    "lm_head_argmax": lm_head_cases,
    "verify_tail": verify_tail_cases,
    "adapter_forward": adapter_forward_cases,
    "sample_tokens": sample_tokens_cases,
    "verify_sampling": verify_sampling_cases,
}
OF_THE_ROUND = ("tree_mask", "verify_greedy", "kv_commit")
REPEATS = {True: 20, False: 4}


def parts(options: Options) -> list[Part]:
    """One part an op, then what needs all of them."""
    ops = [Part("check", name, partial(check_op, name), 40) for name in OPS]
    return [
        *ops,
        Part("check", "law", law, 100),
        Part("check", "streams", check_streams, 25),
        Part("check", "rounds", rounds, 25),
        Part("check", "compiled", compiled, 10),
    ]


def backends(case: Case, device: str) -> dict[str, str | None]:
    """Backends of the case's op: None where one runs, else why it does not."""
    found: dict[str, str | None] = {}
    for name in ("torch", "triton", "cuda") if device == "cuda" else ("torch", "triton", "auto"):
        try:
            case.run(name, device)
        except RuntimeError as error:
            # These two are how the ops say that a backend is not there; all else is a fault.
            if "cannot run:" not in str(error) and "there is no" not in str(error):
                raise
            found[name] = str(error)
        else:
            found[name] = None
    return found


@contextlib.contextmanager
def poisoned(device: str) -> Iterator[None]:
    """Fill what torch.empty returns with NaN or the largest integer.

    Raises:
        CheckFailed: torch does not fill, so that an unwritten output would go unseen.
    """
    before = torch.are_deterministic_algorithms_enabled(), deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = True
    try:
        like = torch.zeros(3, dtype=torch.int32, device=device)
        for made in (torch.empty_like(like), like.new_empty(5), torch.empty(2, device=device)):
            if made.isfinite().all() and not (made == torch.iinfo(torch.int32).max).all():
                raise CheckFailed("memory that torch.empty returns could not be poisoned")
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        deterministic.fill_uninitialized_memory = before[1]


def compare(case: Case, got: list[torch.Tensor], want: list[torch.Tensor]) -> str | None:
    """Where the first difference is, None where all bits are equal or, where the case has a
    tolerance, no row is further off than that.
    """
    for name, mine, reference in zip(case.outputs, got, want, strict=True):
        if mine.shape != reference.shape or mine.dtype != reference.dtype:
            return f"{name}: {mine.dtype} {list(mine.shape)}"
        if case.tolerance and reference.is_floating_point():
            error = _row_error(mine, reference)
            if not error <= case.tolerance:
                return f"{name}: a row is off by {error:.3g}, allowed {case.tolerance:.3g}"
        elif not torch.equal(mine, reference):
            where = (mine != reference).nonzero()[0].tolist()
            values = f"{mine[tuple(where)].item()}, expected {reference[tuple(where)].item()}"
            return f"{name}{where} is {values}"
    return None


def _row_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """The largest relative error of a row, in the Euclidean norm; rows of 0 have to be 0."""
    distance = (got.double() - want.double()).norm(dim=-1)
    return (distance / want.double().norm(dim=-1).clamp_min(1e-30)).max().item()


def check_op(op: str, context: Context) -> Iterator[dict]:
    """Equal to the reference, bit for bit where the case asks for it, on every case and repeat,
    outputs poisoned.
    """
    options = context.options
    rng = random.Random(f"{options.seed} {op}")
    cases = list(OPS[op](rng, (1, 5, 33) if options.dry_run else SIZES))
    if op == "kv_commit" and not options.dry_run:
        # As many programs as a 7B decoder has, each destination being another row's source.
        every = list(range(2, 64))
        cases.append(commit_case("64 caches, all rows", [every], [32], 128, 64, width=128,
                                 heads=32, caches=64))  # fmt: skip
    wrong: list[str] = []
    repeats = 2 if options.dry_run else REPEATS[op in OF_THE_ROUND]
    for backend, missing in backends(cases[0], options.device).items():
        if missing:
            yield {"ops": [{"op": op, "backend": backend, "unavailable": missing}]}
            continue
        found = _mismatches(cases, backend, options.device, repeats)
        wrong += found
        yield {
            "ops": [
                {"op": op, "backend": backend, "unavailable": None, "cases": len(cases),
                 "repeats": repeats, "mismatches": len(found), "first": found[:5]}
            ]
        }  # fmt: skip
    if wrong:
        raise CheckFailed(f"{len(wrong)} mismatches, first: {wrong[0]}")


def _mismatches(cases: list[Case], backend: str, device: str, repeats: int) -> list[str]:
    wrong = []
    for case in cases:
        want = [x.to(device) for x in case.run("torch", "cpu")]
        with poisoned(device):
            for repeat in range(repeats):
                difference = compare(case, case.run(backend, device), want)
                if difference:
                    which = f"{case.op}, {backend}, {case.name}, repeat {repeat}"
                    wrong.append(f"{which}: {difference}")
                    break
    return wrong


def check_streams(context: Context) -> Iterator[dict]:
    """Each op runs in torch's current stream: it sees what was queued there before it.

    The inputs arrive late in a side stream. An op in that stream must see them; the same op in the
    default stream must not, or the delay was too short for the check to mean anything.
    """
    if context.options.device == "cpu":
        raise Skip("a CPU has no streams")
    rng = random.Random(f"{context.options.seed} streams")
    wrong = []
    for op, make in OPS.items():
        case = next(c for c in make(rng, (33,)) if "broken" not in c.name and "chain" not in c.name)
        for backend, missing in backends(case, "cuda").items():
            if missing:
                continue
            late, early = _delayed(case, backend, True), _delayed(case, backend, False)
            facts = {"op": op, "backend": backend, "case": case.name}
            facts |= {"respected": late is None, "delay_seen": early is not None}
            yield {"streams": [facts]}
            if late:
                wrong.append(f"{op}, {backend}, {case.name}: {late}")
            if not early:
                wrong.append(f"{op}, {backend}: the delay was over before the op ran")
    if wrong:
        raise CheckFailed(wrong[0])


def _delayed(case: Case, backend: str, in_stream: bool) -> str | None:
    """The difference to the reference where the inputs arrive 0.1 s late in a side stream."""
    # An op that reads 0 rows writes none: it must not find its last result in fresh memory.
    with poisoned("cuda"):
        return _delayed_in(case, backend, in_stream)


def _delayed_in(case: Case, backend: str, in_stream: bool) -> str | None:
    good = copies(case.inputs, "cuda")
    late = [None if x is None else torch.zeros_like(x) for x in good]
    case.call(late, backend)
    for x in late:
        if x is not None:
            x.zero_()
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)
        for x, y in zip(late, good, strict=True):
            if x is not None:
                x.copy_(y)
        if in_stream:
            got = case.call(late, backend)
    if not in_stream:
        got = [x.clone() for x in case.call(late, backend)]
    torch.cuda.synchronize()
    return compare(case, got, [x.cuda() for x in case.run("torch", "cpu")])


def rounds(context: Context) -> Iterator[dict]:
    """tree_mask, verify_greedy and kv_commit as one CUDA graph, replayed on fresh inputs."""
    options = context.options
    usable = {}
    for op in OF_THE_ROUND:
        case = next(iter(OPS[op](random.Random(0), (5,))))
        found = backends(case, options.device)
        usable[op] = {name for name, missing in found.items() if missing is None}
    wrong = []
    for backend in sorted(set().union(*usable.values())):
        # An op without a kernel of this kind runs the next best one.
        chosen = {
            op: next(name for name in (backend, "triton", "torch") if name in names)
            for op, names in usable.items()
        }
        result = check_rounds(chosen, options.device, options.seed, 3 if options.dry_run else 50)
        yield {"rounds": [{"backend": backend, "ops": chosen, **result}]}
        if result["mismatch"]:
            wrong.append(f"{backend}: {result['mismatch']}")
    if wrong:
        raise CheckFailed(wrong[0])


def compiled(context: Context) -> Iterator[dict]:
    """What Triton compiled in this process; a kernel that spills fails."""
    yield {"info": {key: str(value) for key, value in info().items()}}
    kernels = compiled_kernels()
    if not kernels:
        raise Skip("Triton has compiled nothing in this process")
    yield {"kernels": kernels}
    spilled = [kernel for kernel in kernels if kernel["spills"]]
    if spilled:
        raise CheckFailed(f"{spilled[0]['name']} spills {spilled[0]['spills']} registers")
