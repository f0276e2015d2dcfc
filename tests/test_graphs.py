"""Captured rounds, prefills and drafts: their answers, their launches, what capture asks for."""

from __future__ import annotations

import gc
import itertools
import random
import threading
import time
from collections import Counter
from contextlib import contextmanager
from functools import partial
from threading import Thread, Timer
from weakref import WeakValueDictionary

import pytest
import torch
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor

from tape import TapeRecorder
from test_llama_target import Plain, differences, family
from tiny import VOCAB, OracleDrafter, prompt, reference, tiny_llama
from xspec_kernels import SEQUENCE
from xspec_runtime import graphs
from xspec_runtime.batch import BatchDecoder, BatchPrompt
from xspec_runtime.config import SpecConfig
from xspec_runtime.drafters.base import DraftTree, Request
from xspec_runtime.drafters.graph_draft import GraphDrafter
from xspec_runtime.engine import SpeculativeDecoder
from xspec_runtime.graphs import Captured, CudaRecorder, Graphs
from xspec_runtime.targets import llama_rounds
from xspec_runtime.targets.llama import LlamaTarget
from xspec_runtime.targets.llama_graphs import PREFILL_GRAPHS, wants_graphs
from xspec_runtime.targets.llama_rounds import RoundBuffers

NEW = 24
CPU = torch.device("cpu")


@pytest.fixture(params=["plain", "tape"])
def mode(request, monkeypatch) -> str:
    """How graphs run: as calls, or recorded and replayed at their padded shape."""
    if request.param == "tape":
        use_tape(monkeypatch)
    return request.param


@pytest.fixture
def tape(monkeypatch) -> None:
    use_tape(monkeypatch)


def use_tape(monkeypatch) -> None:
    monkeypatch.setattr(graphs, "can_capture", lambda device: True)
    monkeypatch.setattr(graphs, "new_recorder", lambda device, pool: TapeRecorder())


@pytest.fixture
def counts(monkeypatch) -> Counter:
    """Launches of captured functions and waits for records."""
    seen: Counter[str] = Counter()

    def watch(owner, name: str, label: str) -> None:
        original = getattr(owner, name)

        def wrapper(*args, **kwargs):
            seen[label] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, wrapper)

    watch(Captured, "__call__", "launches")
    watch(RoundBuffers, "read", "waits")
    watch(RoundBuffers, "decide", "ops")
    return seen


def answer(target, ids, drafter=None, rows: int = 16, new: int = NEW, **options):
    config = SpecConfig(rows, new, **options.pop("config", {}))
    return SpeculativeDecoder(target, drafter, config).generate({"input_ids": ids}, **options)


# The mechanism.


def test_the_first_call_runs_then_records(seed: int) -> None:
    state, given = torch.zeros(3), torch.ones(3)
    captured = Captured(lambda: state.add_(given).clone(), TapeRecorder())
    assert captured().tolist() == state.tolist() == [1, 1, 1]
    given.fill_(5)
    results = [captured() for _ in range(2)]
    assert state.tolist() == results[0].tolist() == [11, 11, 11]
    assert results[0] is results[1]


def test_a_recording_keeps_what_the_host_knew() -> None:
    """The tape tells a length on the device from one in Python, as a graph would."""
    length, host = torch.tensor([2]), [2]
    on_device = Captured(lambda: (length * 3).clone(), TapeRecorder())
    on_host = Captured(lambda: torch.full((1,), host[0] * 3), TapeRecorder())
    on_device(), on_host()
    length.fill_(7)
    host[0] = 7
    assert (on_device().item(), on_host().item()) == (21, 6)


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist() if x.sum() > 0 else None,
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x + torch.tensor([1.0]),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.clone().index_put_([x > 0], x.sum()),
        lambda x: x.repeat_interleave(x.long()),
        lambda x: torch.where(x > 0),
        lambda x: bool(x.any()),
    ],
)
@torch.inference_mode()
def test_waits_are_refused_and_nothing_is_kept(wait) -> None:
    x, refuse = torch.ones(2), [True]
    captured = Captured(lambda: wait(x) if refuse[0] else x * 2, TapeRecorder())
    for _ in range(2):
        with pytest.raises(RuntimeError, match="not permitted"):
            captured()
    refuse[0] = False
    assert [captured().tolist() for _ in range(2)] == [[2, 2]] * 2


def test_the_least_recently_used_graph_hands_its_stream_on(tape) -> None:
    kept = Graphs(CPU, limit=2)
    first, second = (kept.get(key, lambda: list) for key in "ab")
    assert kept.get("a", pytest.fail) is first
    third = kept.get("c", lambda: list)
    assert len(kept) == 2 and third.recorder is second.recorder is not first.recorder
    assert kept.get("a", pytest.fail) is first
    assert kept.get("b", lambda: list) is not second
    forever = Graphs(CPU, beside=kept)
    recorders = {forever.get(key, lambda: list).recorder for key in range(50)}
    assert len(forever) == 50 and len(recorders) == 1


def test_without_cuda_there_is_nothing_to_record() -> None:
    kept = Graphs(CPU)
    state = torch.zeros(1)
    run = kept.get("a", lambda: lambda: state.add_(1))
    assert run.recorder is None and not kept.captures
    assert [run().item() for _ in range(3)] == [1, 2, 3]


class FakeCuda:
    """The calls that `CudaRecorder` makes, in order."""

    def __init__(self, monkeypatch) -> None:
        self.log: list[str] = []
        self.options: dict = {}
        # torch's pool of streams, and the current one.
        self.handles = itertools.cycle(range(32))
        self._main, self._here = self._Stream(self, "main", -1), threading.local()
        monkeypatch.setattr(graphs, "_held", WeakValueDictionary())
        for name in ("Stream", "CUDAGraph", "current_stream", "stream", "device", "graph"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))

    @property
    def now(self) -> _Stream:
        """The current stream, each thread's own."""
        return getattr(self._here, "stream", self._main)

    @now.setter
    def now(self, stream: _Stream) -> None:
        self._here.stream = stream

    class _Stream:
        device = CPU

        def __init__(self, cuda: FakeCuda, name: str, handle: int = -2) -> None:
            self.cuda, self.name, self.cuda_stream = cuda, name, handle

        def wait_stream(self, other) -> None:
            self.cuda.log.append(f"{self.name} waits for {other.name}")

        def synchronize(self) -> None:
            self.cuda.log.append(f"{self.name} is done")

    def Stream(self, device=None):
        return self._Stream(self, "side", next(self.handles))

    def current_stream(self, device=None):
        return self.now

    def CUDAGraph(self):
        class Graph:
            replay = staticmethod(lambda: self.log.append("replay"))

        return Graph()

    @contextmanager
    def stream(self, stream):
        self.log.append(f"on {stream.name}")
        before, self.now = self.now, stream
        try:
            yield
        finally:
            self.now = before
            self.log.append("off")

    @contextmanager
    def device(self, device):
        yield

    @contextmanager
    def graph(self, graph, **options):
        self.options = options
        assert not gc.isenabled(), "a collection may call CUDA"
        self.log.append("capture")
        before, self.now = self.now, options.get("stream", self._Stream(self, "torch's"))
        yield
        # What fails inside leaves the stream as it is, as in torch.
        self.now = before
        self.log.append("captured")


def test_the_order_of_cuda_calls(monkeypatch) -> None:
    cuda = FakeCuda(monkeypatch)
    captured = Captured(lambda: cuda.log.append("run"), CudaRecorder(CPU, (0, 7)))
    captured(), captured()
    assert cuda.log == [
        "side waits for main", "on side", "run", "off", "main waits for side",
        "on main", "capture", "run", "captured", "off", "replay",
    ]  # fmt: skip
    assert cuda.options["pool"] == (0, 7) and cuda.options["stream"].name == "side"
    assert cuda.options["capture_error_mode"] == "thread_local"
    assert gc.isenabled()


def test_what_fails_leaves_the_callers_stream(monkeypatch) -> None:
    cuda = FakeCuda(monkeypatch)
    main = cuda.now

    def run(fails_behind: str) -> None:
        if cuda.log[-1] == fails_behind:
            raise ValueError

    for place in ("on side", "capture"):
        captured = Captured(partial(run, place), CudaRecorder(CPU, (0, 7)))
        with pytest.raises(ValueError):
            captured()
        assert cuda.now is main and gc.isenabled()
        assert "main waits for side" in cuda.log[-4:]


def test_streams_are_not_handed_out_twice(monkeypatch) -> None:
    cuda = FakeCuda(monkeypatch)
    held = [graphs.own_stream(CPU) for _ in range(31)]
    held += [CudaRecorder(CPU, (0, 7))]
    handles = [getattr(one, "_stream", one).cuda_stream for one in held]
    assert sorted(handles) == list(range(32))
    with pytest.warns(RuntimeWarning, match="all 32 streams of cpu are in use"):
        graphs.own_stream(CPU)
    del held[7]
    assert graphs.own_stream(CPU).cuda_stream == handles[7]
    assert next(cuda.handles) == handles[8]


def test_first_calls_take_turns() -> None:
    """A capture begins with a wait for the device, which another capture forbids."""
    inside, most = [], []

    class Slow(TapeRecorder):
        def warm(self, run):
            inside.append(run)
            time.sleep(0.01)
            most.append(len(inside))
            return run()

        def record(self, run):
            time.sleep(0.01)
            most.append(len(inside))
            inside.remove(run)
            return run, None

    calls = [Captured(lambda i=i: i, Slow()) for i in range(3)]
    threads = [Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 6


# The target.


def test_answers_are_those_without_graphs(mode: str, seed: int) -> None:
    model = tiny_llama(seed)
    target, other = LlamaTarget(model, 96, graphs=True), LlamaTarget(model, 96, graphs=False)
    assert other.graphs is None
    for i, length in enumerate((20, 1, 64)):
        ids = prompt(seed + i, length)
        truth = reference(model, ids, NEW)
        for rows, hit in ((1, 0.0), (6, 1.0), (16, 0.8), (64, 0.9)):
            drafters = [OracleDrafter(truth, seed, hit) if rows > 1 else None for _ in range(2)]
            ours = answer(target, ids, drafters[0], rows)
            theirs = answer(other, ids, drafters[1], rows)
            assert ours.tokens == theirs.tokens == truth
            assert [r.accepted for r in ours.rounds] == [r.accepted for r in theirs.rounds]
            assert ours.near_ties == theirs.near_ties
    assert (len(target.graphs.verifies) == 1) == (mode == "tape")


@pytest.mark.parametrize("fused", ["fast", "exact"])
def test_drafts_in_the_prefill(mode: str, fused: str, seed: int) -> None:
    model, ids = tiny_llama(seed), prompt(seed)
    truth = reference(model, ids, NEW)
    wrong = [*truth[:5], (truth[5] + 1) % VOCAB, *truth[6:]]
    target = LlamaTarget(model, 64, graphs=True)
    for drafted in (truth, wrong, wrong[:2], []):
        out = answer(target, ids, config={"prefill_fused": fused}, drafted=drafted)
        assert out.tokens == truth
        if fused == "fast" and drafted == wrong:
            assert (out.prefill_drafted, out.prefill_accepted) == (15, 5)


def test_an_end_inside_a_path(mode: str, seed: int) -> None:
    model, ids = tiny_llama(seed), prompt(seed)
    truth = reference(model, ids, NEW)
    target = LlamaTarget(model, 64, graphs=True)
    for at in (0, 1, 4, 9):
        out = answer(target, ids, OracleDrafter(truth, seed, 1.0), config={
            "eos_token_ids": (truth[at],)})  # fmt: skip
        assert out.tokens == truth[: truth.index(truth[at]) + 1]
    assert answer(target, ids).tokens == truth


def test_the_last_rows_of_the_cache(mode: str, seed: int) -> None:
    """A graph of 64 rows serves a cache in which one row is left."""
    model, ids = tiny_llama(seed), prompt(seed, 20)
    truth = reference(model, ids, NEW)
    target = LlamaTarget(model, 20 + NEW - 1, graphs=True)
    for drafter in (None, OracleDrafter(truth, seed, 1.0), OracleDrafter(truth, seed, 0.5)):
        assert answer(target, ids, drafter).tokens == truth
    with pytest.raises(RuntimeError, match="KV cache is full"):
        answer(target, ids, OracleDrafter(truth, seed), new=NEW + 20)
    with pytest.raises(RuntimeError, match="the prompt does not fit"):
        answer(target, prompt(seed, 43))
    assert answer(target, ids, OracleDrafter(truth, seed)).tokens == truth


def test_processors_are_decided_op_by_op(mode: str, counts, seed: int) -> None:
    model, ids = tiny_llama(seed), prompt(seed)
    truth = reference(model, ids, NEW)
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False,
        repetition_penalty=1.3,
    )  # fmt: skip
    penalized = out[0, ids.shape[1] :].tolist()
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.3)])
    target = LlamaTarget(model, 64, graphs=True)
    for _ in range(2):
        assert answer(target, ids, OracleDrafter(truth, seed)).tokens == truth
        launches = counts["launches"]
        drafter = OracleDrafter(penalized, seed)
        assert answer(target, ids, drafter, logits_processor=processors).tokens == penalized
        assert counts["launches"] == launches


def test_one_launch_and_one_wait_a_round(mode: str, counts, seed: int) -> None:
    model, ids = tiny_llama(seed), prompt(seed)
    truth = reference(model, ids, NEW)
    target = LlamaTarget(model, 64, graphs=True)
    for rows in (1, 8):
        counts.clear()
        out = answer(target, ids, OracleDrafter(truth, seed) if rows > 1 else None, rows)
        assert counts == {"launches": len(out.rounds) + 1, "waits": len(out.rounds) + 1}


def addresses(target: LlamaTarget) -> list[int]:
    """Of everything that a graph has in common with what is outside."""
    rounds = target._rounds
    shared = [rounds._host, rounds._words, rounds._root, rounds._sequence, rounds._record]
    shared += [t for layer in target.cache.layers for t in (layer.keys, layer.values)]
    shared += [target.graphs.prompt(80), *rounds._fields]
    return [t.data_ptr() for t in shared] + [f.ctypes.data for f in rounds._host_fields]


def test_100_requests_at_the_same_addresses(mode: str, rng: random.Random) -> None:
    model = tiny_llama(rng.randrange(1 << 30))
    target = LlamaTarget(model, 80, graphs=True)
    cases = [prompt(i, length) for i, length in enumerate((3, 40, 64, 70))]
    truths = [reference(model, ids, 8) for ids in cases]
    seen = set()
    for _ in range(100):
        # What lies behind a prompt counts for nothing.
        target.graphs.prompt(80).fill_(torch.nan)
        i = rng.randrange(len(cases))
        drafter = OracleDrafter(truths[i], rng.randrange(1 << 30))
        assert answer(target, cases[i], drafter, rng.choice((2, 7, 16)), 8).tokens == truths[i]
        seen.add(tuple(addresses(target)))
    assert len(seen) == 1
    if mode == "tape":
        assert (len(target.graphs.verifies), len(target.graphs.prefills)) == (1, 2)


def test_prefill_graphs_are_bounded(mode: str, seed: int) -> None:
    model = tiny_llama(seed)
    target = LlamaTarget(model, 64 * (PREFILL_GRAPHS + 3), graphs=True)
    for i, length in enumerate([*range(10, 64 * (PREFILL_GRAPHS + 2), 64), 10, 80]):
        ids = prompt(seed + i, length)
        assert answer(target, ids, new=2).tokens == reference(model, ids, 2)
    assert len(target.graphs.prefills) == PREFILL_GRAPHS


def test_nan_leaves_the_target_usable(mode: str, seed: int) -> None:
    model, ids = tiny_llama(seed), prompt(seed)
    truth = reference(model, ids, NEW)
    target = LlamaTarget(model, 64, graphs=True)
    norm = target.decoder.weights.norm
    sound = norm.clone()
    for during in ("prefill", "round", "round"):
        assert answer(target, ids, OracleDrafter(truth, seed)).tokens == truth
        if during == "round":
            target.prefill({"input_ids": ids})
        norm[3] = torch.nan
        with pytest.raises(RuntimeError, match="logits are NaN"):
            if during == "prefill":
                answer(target, ids)
            tree = DraftTree.chain(truth[0], truth[1:5])
            target.accept(tree, target.forward(tree), truth[:1])
        norm.copy_(sound)
    assert answer(target, ids, OracleDrafter(truth, seed)).tokens == truth


def test_a_launch_that_nobody_read(mode: str, seed: int) -> None:
    model, ids = tiny_llama(seed), prompt(seed)
    truth = reference(model, ids, NEW)
    target = LlamaTarget(model, 64, graphs=True)
    for _ in range(2):
        target.prefill({"input_ids": ids})
        target.forward(DraftTree.chain(truth[0], [5, 6]))
        deep = DraftTree.chain(1, [2] * 33)
        with pytest.raises(ValueError, match="33 deep"):
            target.forward(deep)
        assert answer(target, ids, OracleDrafter(truth, seed)).tokens == truth


def test_the_host_leaves_numbers_alone_that_are_being_read(monkeypatch) -> None:
    monkeypatch.setattr(RoundBuffers, "_idle", lambda self: False)
    rounds = RoundBuffers(CPU, "auto", 32)
    rounds.launch(1, lambda: None)
    found = []

    def publish() -> None:
        found.append(rounds._host.clone())
        rounds._record[0, SEQUENCE] += 1

    Timer(0.05, publish).start()
    rounds.write([DraftTree.root(9)], [3], 1)
    assert len(found) == 1 and not found[0].any() and rounds._host.any()


def test_a_launch_that_publishes_nothing() -> None:
    rounds = RoundBuffers(CPU, "auto", 32)
    rounds.launch(1, lambda: None)
    with pytest.raises(RuntimeError, match="idle and has published no decision"):
        rounds.read(1)
    rounds.write([DraftTree.root(9)], [3], 1)


def test_a_launch_that_never_ends(monkeypatch) -> None:
    monkeypatch.setattr(RoundBuffers, "_idle", lambda self: False)
    monkeypatch.setattr(llama_rounds, "_LIMIT", 0.01)
    rounds = RoundBuffers(CPU, "auto", 32)
    rounds.launch(1, lambda: None)
    with pytest.raises(RuntimeError, match="no decision after 0 s: a kernel hangs"):
        rounds.read(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_padded_rows_keep_the_law(tape, dtype, rng: random.Random, monkeypatch) -> None:
    """Bits of plain decoding without graphs, from trees in graphs of 64 rows."""
    monkeypatch.setenv("XSPEC_EXACT", "1")
    model = family("qwen3", rng.randrange(1 << 30)).to(dtype)
    ids = prompt(rng.randrange(1 << 30), 50)
    plain = Plain(LlamaTarget(model, 160, graphs=False), ids, 24)
    target = LlamaTarget(model, 120, graphs=True)
    for _ in range(2):
        assert differences(target, ids, plain, rng) == []
    assert len(target.graphs.verifies) == 1


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_batches(mode: str, batch: int, seed: int, counts) -> None:
    model = tiny_llama(seed)
    lengths = [5, 31, 12, 1, 40, 64, 7, 22, 30, 3]
    truth, prompts = [], []
    for i, length in enumerate(lengths):
        ids = prompt(seed + i, length)
        truth.append(reference(model, ids, NEW))
        prompts.append(BatchPrompt({"input_ids": ids}, Request([i])))
    # Requests end at different times.
    ends = {truth[0][7], truth[1][3], truth[4][12]}
    cut = [next((i + 1 for i, t in enumerate(one) if t in ends), NEW) for one in truth]
    expected = [one[:length] for one, length in zip(truth, cut, strict=True)]

    class Knows(OracleDrafter):
        def begin(self, request: Request) -> None:
            self.answer = truth[request.prompt_ids[0]]

    target = LlamaTarget(model, 64 + NEW, graphs=True)
    config = SpecConfig(8, NEW, tuple(ends))
    decoder = BatchDecoder(target, lambda: Knows([], seed), config, batch)
    for _ in range(2):
        assert [one.tokens for one in decoder.generate(prompts)] == expected
    counts.clear()
    rounds = [one.rounds for one in decoder.generate(prompts[:batch])]
    assert counts["launches"] == max(map(len, rounds))
    assert counts["waits"] == counts["launches"] + min(batch, len(prompts))


@torch.inference_mode()
def test_idle_requests_touch_nothing(tape, seed: int) -> None:
    target = LlamaTarget(tiny_llama(seed), 64, graphs=True)
    batch = target.batched(4)
    for i in range(3):
        batch.prefill({"input_ids": prompt(seed + i, 9 + i)})
    caches = [t for layer in batch.cache.layers for t in (layer.keys, layer.values)]
    for cache in caches:
        cache[3] = torch.nan
    trees = [DraftTree.chain(5 + i, [6, 7]) for i in range(3)]
    for _ in range(2):
        scored = batch.forward(trees)
        assert scored.ids.shape == (4, 16)
        batch.commit(batch.accept(trees, scored, [[5], [6], [7]]))
    assert all(cache[3].isnan().all() for cache in caches)


def test_a_batch_with_processors_goes_op_by_op(mode: str, counts, seed: int) -> None:
    model = tiny_llama(seed)
    ids = [prompt(seed + i, 9 + i) for i in range(3)]
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.3)])
    prompts = [
        BatchPrompt({"input_ids": one}, None, processors if i == 1 else None)
        for i, one in enumerate(ids)
    ]
    config = SpecConfig(8, NEW)
    found = [
        [one.tokens for one in BatchDecoder(
            LlamaTarget(model, 64, graphs=on), None, config, 3).generate(prompts)]
        for on in (False, True)
    ]  # fmt: skip
    assert found[0] == found[1]
    assert counts["launches"] == 0


def test_shapes_of_batches(tape, seed: int) -> None:
    target = LlamaTarget(tiny_llama(seed), 64, graphs=True)
    shapes: dict[int, set] = {}
    for batch in (1, 3, 8):
        found = shapes.setdefault(batch, set())
        shape = target.batched(batch)._graphs._shape
        for requests in range(1, batch + 1):
            for rows in range(1, 65):
                B, N = shape(requests, rows)
                assert requests <= B <= batch and rows <= N <= 64
                blocks = -(-B * N // 64)
                assert blocks < 2 * -(-B * rows // 64) or blocks == 1
                found.add((B, N))
    assert shapes[1] == {(1, 64)}
    assert {N for B, N in shapes[8] if B == 8} == {8, 16, 32, 64}
    assert len(shapes[8]) == 10


def test_graphs_that_cannot_be() -> None:
    assert not wants_graphs("auto", "torch", "cpu")
    assert not wants_graphs("auto", "torch", "cuda")
    assert wants_graphs("auto", "triton", "cuda")
    assert wants_graphs(True, "torch", "cpu")
    assert not wants_graphs(False, "triton", "cuda")
    with pytest.raises(ValueError, match="backend is 'torch'"):
        wants_graphs(True, "torch", "cuda")
    with pytest.raises(ValueError, match="graphs is 'yes', expected True"):
        LlamaTarget(tiny_llama(0), 64, graphs="yes")


@pytest.mark.interpreter
def test_triton_in_one_call(seed: int) -> None:
    model, ids = family("qwen3", seed), prompt(seed, 5)
    targets = [LlamaTarget(model, 40, "triton", graphs=on) for on in (False, True)]
    found = [answer(t, ids, OracleDrafter([1, 2, 3], seed), 3, 4).tokens for t in targets]
    assert found[0] == found[1]


# The draft.


def greedy_chains(model, ids, contexts, gamma: int) -> list[list[int]]:
    return [reference(model, torch.cat([ids, torch.tensor([c])], 1), gamma) for c in contexts]


def test_drafts_follow_the_verified_prefix(mode: str, rng: random.Random, counts) -> None:
    model = tiny_llama(rng.randrange(1 << 30))
    drafter = GraphDrafter(LlamaTarget(model, 128, graphs=True), 5)
    for _ in range(3):
        ids = prompt(rng.randrange(1 << 30), rng.randrange(1, 50))
        drafter.begin(Request([], {"input_ids": ids}))
        context = [rng.randrange(VOCAB)]
        for step in range(7):
            rows = rng.randrange(2, 9)
            counts.clear()
            tree = drafter.propose(context, rows)
            assert counts == {"launches": 1, "waits": 1}
            expected = greedy_chains(model, ids, [context], min(5, rows - 1))[0]
            assert tree.tokens == [context[-1], *expected]
            assert tree.parent_idx == list(range(-1, len(expected)))
            assert tree.scores == sorted(tree.scores, reverse=True)
            # Some drafts are right, or all of them, or another drafter's text was.
            right = expected[: rng.randrange(len(expected) + 1)]
            context += [*right, *(rng.randrange(VOCAB) for _ in range((1, 1, 4)[step % 3]))]
    if mode == "tape":
        assert len(drafter._graphs) == 1


def test_a_draft_ends(mode: str, seed: int) -> None:
    model, ids = tiny_llama(seed), prompt(seed)
    context = [7]
    chain = greedy_chains(model, ids, [context], 6)[0]
    target = LlamaTarget(model, 64, graphs=True)
    for at in (0, 2, 5):
        drafter = GraphDrafter(target, 6, ends=(chain[at], VOCAB + 5))
        stop = chain.index(chain[at]) + 1
        for _ in range(2):
            drafter.begin(Request([], {"input_ids": ids}))
            assert drafter.propose(context, 16).tokens == [7, *chain[:stop]]
            assert drafter.cache.length == 20 + stop
            longer = [*context, *chain[:stop], 9]
            more = greedy_chains(model, ids, [longer], 1)[0]
            assert drafter.propose(longer, 2).tokens == [9, *more]


def test_an_opening(mode: str, seed: int) -> None:
    model, ids = tiny_llama(seed), prompt(seed)
    own = reference(model, ids, 6)
    drafter = GraphDrafter(LlamaTarget(model, 64, graphs=True), 5)
    for rows in (1, 3, 9):
        drafter.begin(Request([], {"input_ids": ids}))
        assert drafter.opening(rows) == own[: min(rows, 5)]
        expected = greedy_chains(model, ids, [own[:2]], 5)[0]
        assert drafter.propose(own[:2], 6).tokens[1:] == expected


def test_a_long_prefix_is_fed_in_pieces(mode: str, rng: random.Random) -> None:
    model, ids = tiny_llama(rng.randrange(1 << 30)), prompt(rng.randrange(1 << 30))
    drafter = GraphDrafter(LlamaTarget(model, 160, graphs=True), 3)
    drafter.begin(Request([], {"input_ids": ids}))
    for count in (1, 32, 33, 64, 100):
        context = [rng.randrange(VOCAB) for _ in range(count)]
        assert drafter.propose(context, 4).tokens[1:] == greedy_chains(model, ids, [context], 3)[0]


def test_a_full_draft_cache_drafts_less(mode: str, seed: int) -> None:
    model, ids = tiny_llama(seed), prompt(seed)
    drafter = GraphDrafter(LlamaTarget(model, 24, graphs=True), 6)
    drafter.begin(Request([], {"input_ids": ids}))
    chain = greedy_chains(model, ids, [[7]], 6)[0]
    assert drafter.propose([7], 9).tokens == [7, *chain[:4]]
    assert drafter.propose([7, *chain[:4]], 9).tokens == [chain[3]]
    drafter.begin(Request([], {"input_ids": ids}))
    assert drafter.propose([7], 9).tokens == [7, *chain[:4]]


def test_drafter_and_target_together(mode: str, seed: int) -> None:
    """Each with graphs, workspaces and records of its own."""
    model, draft = tiny_llama(seed), tiny_llama(seed)
    torch.manual_seed(seed + 1)
    for parameter in draft.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))
    target = LlamaTarget(model, 64, graphs=True)
    drafter = GraphDrafter(LlamaTarget(draft, 64, graphs=True), 4)
    accepted = 0
    for i in range(2):
        ids = prompt(seed + i)
        for fused in ("exact", "fast"):
            out = answer(
                target, ids, drafter, 5, request=Request([], {"input_ids": ids}),
                config={"prefill_fused": fused},
            )  # fmt: skip
            assert out.tokens == reference(model, ids, NEW)
            accepted += sum(r.accepted for r in out.rounds)
    assert accepted > 0


def test_what_a_drafter_refuses(mode: str, seed: int) -> None:
    model = LlamaTarget(tiny_llama(seed), 64, graphs=True)
    for gamma in (0, 64):
        with pytest.raises(ValueError, match=rf"gamma must be in 1..63, got {gamma}"):
            GraphDrafter(model, gamma)
    drafter = GraphDrafter(model, 3)
    with pytest.raises(ValueError, match="needs draft_inputs with input_ids"):
        drafter.begin(Request([1]))
    request = Request([], {"input_ids": prompt(seed)})
    drafter.begin(request)
    expected = drafter.propose([5], 4).tokens
    norm = model.decoder.weights.norm
    sound = norm.clone()
    norm[0] = torch.nan
    with pytest.raises(RuntimeError, match="the draft's logits are NaN"):
        drafter.propose([5], 4)
    with pytest.raises(RuntimeError, match=r"drafter 'draft'.*logits are NaN"):
        drafter.begin(request)
    norm.copy_(sound)
    drafter.begin(request)
    assert drafter.propose([5], 4).tokens == expected


def test_a_length_of_the_host_in_a_graph_shows(tape, seed: int) -> None:
    model, ids = tiny_llama(seed), prompt(seed)
    target = LlamaTarget(model, 64, graphs=True)
    load = target._rounds.load

    def baked(batch: int, rows: int, drafts: torch.Tensor | None = None):
        at = load(batch, rows)
        return at._replace(cache_seqlens=torch.full_like(at.cache_seqlens, target.cache.length))

    target._rounds.load = baked
    try:
        tokens = answer(target, ids).tokens
    except ValueError:
        tokens = []
    assert tokens != reference(model, ids, NEW)
