"""Two prefills in one launch: the order of streams, no memory in common, equal answers."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor

from tape import Tape, TapeRecorder, tensors
from test_graphs import FakeCuda
from tiny import prompt, reference, tiny_llama
from xspec_runtime import graphs
from xspec_runtime.config import SpecConfig
from xspec_runtime.drafters.base import Request
from xspec_runtime.drafters.draft_model import ModelDrafter
from xspec_runtime.drafters.graph_draft import GraphDrafter
from xspec_runtime.drafters.merge import MergedDrafter
from xspec_runtime.drafters.ngram import NgramDrafter, NgramMemory
from xspec_runtime.engine import SpeculativeDecoder
from xspec_runtime.graphs import Captured, CudaRecorder, Fork
from xspec_runtime.head_start import HeadStart, prefill_pair
from xspec_runtime.overlap import Overlap
from xspec_runtime.targets.llama import LlamaTarget
from xspec_runtime.targets.llama_graphs import PrefillPair

NEW = 12
CPU = torch.device("cpu")


@pytest.fixture(params=["plain", "tape"])
def mode(request, monkeypatch) -> str:
    if request.param == "tape":
        monkeypatch.setattr(graphs, "can_capture", lambda device: True)
        monkeypatch.setattr(graphs, "new_recorder", lambda device, pool: TapeRecorder())
    return request.param


@pytest.fixture
def launches(monkeypatch) -> Counter:
    seen: Counter[str] = Counter()
    call = Captured.__call__

    def counted(self):
        seen["launches"] += 1
        return call(self)

    monkeypatch.setattr(Captured, "__call__", counted)
    return seen


def two(seed: int, **options) -> tuple[LlamaTarget, LlamaTarget]:
    return tuple(LlamaTarget(tiny_llama(seed + i), 96, graphs=True, **options) for i in range(2))


# The order of streams.


def forked(monkeypatch) -> tuple[FakeCuda, Fork]:
    cuda, fork = FakeCuda(monkeypatch), Fork(CPU)
    fork._stream = cuda._Stream(cuda, "branch")
    return cuda, fork


def test_branches_follow_the_caller_and_the_caller_follows_both(monkeypatch) -> None:
    cuda, fork = forked(monkeypatch)
    note = cuda.log.append
    assert fork(lambda: note("main runs") or 1, lambda: note("side runs") or 2) == (1, 2)
    assert cuda.log == [
        "branch waits for main", "on branch", "side runs", "off", "main runs",
        "main waits for branch",
    ]  # fmt: skip


@pytest.mark.parametrize("broken", ["main", "side"])
def test_a_branch_that_fails_is_joined(monkeypatch, broken: str) -> None:
    cuda, fork = forked(monkeypatch)

    def run(name: str) -> None:
        if name == broken:
            raise ValueError(name)

    with pytest.raises(ValueError, match=broken):
        fork(lambda: run("main"), lambda: run("side"))
    assert cuda.log[-1] == "main waits for branch"


def test_a_fork_inside_a_capture(monkeypatch) -> None:
    cuda, fork = forked(monkeypatch)
    note = cuda.log.append
    captured = Captured(
        lambda: fork(lambda: note("main"), lambda: note("side")), CudaRecorder(CPU, (0, 1))
    )
    captured()
    inside = cuda.log[cuda.log.index("capture") + 1 : cuda.log.index("captured")]
    assert inside == [
        "branch waits for side", "on branch", "side", "off", "main", "side waits for branch",
    ]  # fmt: skip
    captured()
    assert cuda.log[-1] == "replay"


# No memory in common.


class Accesses(TorchDispatchMode):
    """Addresses of the memory that operators write, and of all they touch."""

    def __init__(self) -> None:
        super().__init__()
        self.written: set[int] = set()
        self.touched: set[int] = set()
        self._kept: list = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        named = list(zip(func._schema.arguments, args, strict=False))
        named += [(a, kwargs[a.name]) for a in func._schema.arguments if a.name in kwargs]
        for argument, value in named:
            found = {t.untyped_storage().data_ptr() for t in tensors(value)}
            self.touched |= found
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.written |= found
        out = func(*args, **kwargs)
        fresh = {t.untyped_storage().data_ptr() for t in tensors(out)}
        self.written |= fresh - self.touched
        self.touched |= fresh
        # Memory that is given back would be handed out again, to the other branch too.
        self._kept.append(out)
        return out


def branches(target, draft, ids, monkeypatch) -> tuple:
    """What each branch of the pair's function touches."""
    seen: dict[str, Accesses] = {}

    def watched(self, main, side):
        results = []
        for name, run in (("side", side), ("main", main)):
            seen[name] = Accesses()
            with seen[name]:
                results.append(run())
        return results[1], results[0]

    monkeypatch.setattr(Fork, "__call__", watched)
    pair = PrefillPair(target.graphs, draft.graphs)
    with pair.beside(lambda: draft.prefill({"input_ids": ids[1]})):
        target.prefill({"input_ids": ids[0]})
    return seen["main"], seen["side"]


def test_branches_share_no_memory_that_either_writes(seed: int, monkeypatch) -> None:
    ids = prompt(seed), prompt(seed + 1, 30)
    target, draft = two(seed)
    main, side = branches(target, draft, ids, monkeypatch)
    assert main.written and side.written
    assert not main.written & side.touched and not side.written & main.touched
    for one, other, owner in ((main, side, target), (side, main, draft)):
        own = {t.data_ptr() for layer in owner.cache.layers for t in (layer.keys, layer.values)}
        assert own <= one.written and not own & other.touched
        assert owner._rounds._words.untyped_storage().data_ptr() in one.written


def test_a_shared_workspace_shows(seed: int, monkeypatch) -> None:
    ids = prompt(seed), prompt(seed + 1, 30)
    target, draft = two(seed)
    draft._rounds._words = target._rounds._words
    main, side = branches(target, draft, ids, monkeypatch)
    assert main.written & side.written


# Answers.


def test_both_prefills_in_one_launch(mode: str, launches, seed: int) -> None:
    target, draft = two(seed)
    alone = [LlamaTarget(one.model, 96, graphs=False) for one in (target, draft)]
    pair = PrefillPair(target.graphs, draft.graphs)
    said: list = []
    for i, (long, short) in enumerate([(20, 9), (70, 9), (20, 9), (33, 64)]):
        ids = prompt(seed + i, long), prompt(seed - i, short)
        launches.clear()
        with pair.beside(lambda ids=ids: said.append(draft.prefill({"input_ids": ids[1]}))):
            found = target.prefill({"input_ids": ids[0]})
        assert launches == {"launches": 1}
        truth = [one.prefill({"input_ids": x}) for one, x in zip(alone, ids, strict=True)]
        assert [found.tokens, said[-1].tokens] == [one.tokens for one in truth]
        for ours, theirs, length in zip((target, draft), alone, (long, short), strict=True):
            for a, b in zip(ours.cache.layers, theirs.cache.layers, strict=True):
                assert torch.allclose(a.keys[:, :, :length], b.keys[:, :, :length], atol=1e-5)
    assert len(pair._graphs) == 2
    # Outside, each is alone again.
    launches.clear()
    target.prefill({"input_ids": prompt(seed)})
    draft.prefill({"input_ids": prompt(seed)})
    assert launches == {"launches": 2}


def test_branches_in_either_order(mode: str, seed: int, monkeypatch) -> None:
    ids = prompt(seed), prompt(seed + 1, 30)
    found = []
    for turned in (False, True):
        if turned:
            monkeypatch.setattr(Fork, "__call__", lambda self, main, side: (main(), side()))
        target, draft = two(seed)
        pair = PrefillPair(target.graphs, draft.graphs)
        for _ in range(2):
            with pair.beside(lambda d=draft: d.prefill({"input_ids": ids[1]})):
                target.prefill({"input_ids": ids[0]})
        keys = [one.cache.layers[-1].keys[:, :, :20].clone() for one in (target, draft)]
        found.append(keys)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_what_goes_wrong_in_the_draft_is_raised_once(mode: str, seed: int) -> None:
    target, draft = two(seed)
    ids = prompt(seed)
    truth = reference(target.model, ids, 1)
    pair = PrefillPair(target.graphs, draft.graphs)

    def boom() -> None:
        raise KeyError("boom")

    norm = draft.decoder.weights.norm
    sound = norm.clone()

    def damaged() -> None:
        norm[0] = torch.nan
        draft.prefill({"input_ids": ids})

    for begin, error, message in (
        (boom, KeyError, "boom"),
        (lambda: None, RuntimeError, "began without a prefill"),
        (damaged, RuntimeError, "NaN"),
        (lambda: draft.prefill({"input_ids": ids[0]}), ValueError, "input_ids"),
    ):
        with pytest.raises(error, match=message), pair.beside(begin):
            target.prefill({"input_ids": ids})
        norm.copy_(sound)
        with pair.beside(lambda: draft.prefill({"input_ids": ids})):
            assert target.prefill({"input_ids": ids}).tokens == truth


def test_a_prefill_that_is_no_graph_leaves_the_draft_alone(mode: str, seed: int) -> None:
    target, draft = two(seed)
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.3)])
    with PrefillPair(target.graphs, draft.graphs).beside(pytest.fail):
        target.prefill({"input_ids": prompt(seed)}, processors)


def test_pairs_that_cannot_be(seed: int) -> None:
    target, draft = two(seed)
    with pytest.raises(ValueError, match="two targets on one device, got one"):
        PrefillPair(target.graphs, target.graphs)
    decoder = SpeculativeDecoder(target, None, SpecConfig(4, NEW))
    assert prefill_pair(decoder, HeadStart(GraphDrafter(draft, 3)))
    assert prefill_pair(decoder, HeadStart(GraphDrafter(target, 3))) is None
    assert prefill_pair(decoder, HeadStart(ModelDrafter(tiny_llama(seed), 3))) is None
    plain = LlamaTarget(tiny_llama(seed), 96, graphs=False)
    assert prefill_pair(decoder, HeadStart(GraphDrafter(plain, 3))) is None


@pytest.mark.parametrize(("fused", "merged"), [("off", False), ("exact", True), ("fast", False)])
def test_concurrent_is_one_launch(mode: str, fused: str, merged: bool, launches, seed: int):
    target, draft = two(seed)
    draft = LlamaTarget(target.model, 96, graphs=True)
    ids = prompt(seed)
    truth = reference(target.model, ids, NEW)
    drafter = GraphDrafter(draft, 3)
    if merged:
        drafter = MergedDrafter([NgramDrafter(NgramMemory(recency=0), online=True), drafter])
    decoder = SpeculativeDecoder(target, drafter, SpecConfig(8, NEW, prefill_fused=fused))
    work = Overlap(decoder, "concurrent")
    for _ in range(2):
        launches.clear()
        request, before = Request(ids[0].tolist(), {"input_ids": ids}), []
        out = work.generate(
            lambda stop: {"input_ids": ids}, request,
            on_tokens=lambda tokens, before=before: before.append(launches["launches"]),
        )  # fmt: skip
        assert out.tokens == truth
        assert len(out.rounds) < NEW - 1
        if fused != "fast":
            assert before[0] == 1
            assert work.stages.hidden_tokens == 0 and work.stages.window_used_ms > 0
    # The other modes leave the same decoder usable, with a draft in graphs.
    for other in ("window", "off"):
        again = Overlap(decoder, other).generate(lambda stop: {"input_ids": ids}, request)
        assert again.tokens == truth


def test_the_tape_records_both_branches(seed: int) -> None:
    """Recording computes nothing, replaying does."""
    left, right = torch.zeros(2), torch.zeros(2)
    tape = Tape()
    with tape:
        Fork(CPU)(lambda: left.add_(1), lambda: right.add_(2))
    tape.undo()
    assert not left.any() and not right.any()
    tape.replay()
    assert left.tolist() == [1, 1] and right.tolist() == [2, 2]
