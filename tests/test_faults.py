"""Faults on purpose: whatever broke, the next request is answered as by a fresh decoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache

import pytest
import torch
from transformers import LlamaForCausalLM

from tiny import VOCAB, OracleDrafter, prompt, reference, tiny_llama
from xspec_runtime.batch import BatchDecoder, BatchPrompt
from xspec_runtime.config import SpecConfig
from xspec_runtime.drafters.base import Drafter, DraftTree, Request
from xspec_runtime.drafters.draft_model import ModelDrafter
from xspec_runtime.drafters.graph_draft import GraphDrafter
from xspec_runtime.drafters.merge import MergedDrafter
from xspec_runtime.drafters.ngram import NgramDrafter, NgramMemory
from xspec_runtime.engine import Generation, SpeculativeDecoder
from xspec_runtime.errors import out_of_memory
from xspec_runtime.soak.bench import build_target
from xspec_runtime.soak.faults import MOMENTS, DrafterFault, FaultyDrafter, FaultyPasses
from xspec_runtime.targets import llama_rounds
from xspec_runtime.targets.base import Target
from xspec_runtime.targets.llama import LlamaTarget

NEW = 12
SEED = 6
LENGTHS = (12, 31, 5, 20, 9)
DAMAGED = 127  # a token whose embedding is NaN; no sound prompt or answer holds it
# "llama" shares every line with "graphs" but the launch.
TESTED = ("transformers", "graphs")


@cache
def model() -> LlamaForCausalLM:
    model = tiny_llama(SEED)
    model.get_input_embeddings().weight[DAMAGED] = torch.nan
    return model


ASKED = [prompt(SEED + i, length).clamp_max(DAMAGED - 1) for i, length in enumerate(LENGTHS)]


@cache
def truth() -> list[list[int]]:
    answers = [reference(model(), ids, NEW) for ids in ASKED]
    assert not any(DAMAGED in answer for answer in answers)
    return answers


@pytest.fixture(params=TESTED)
def engine(request) -> str:
    return request.param


@pytest.fixture
def target(engine: str) -> Target:
    return build_target(engine, model())


@pytest.fixture
def passes(target: Target) -> Iterator[FaultyPasses]:
    passes = FaultyPasses(target)
    yield passes
    passes.remove()


def request_of(ids: torch.Tensor) -> Request:
    return Request(ids[0].tolist(), {"input_ids": ids})


class Knows(OracleDrafter):
    """An oracle that finds the right answer by the prompt, and repeats itself."""

    def __init__(self) -> None:
        super().__init__([], SEED, 0.7)
        known = zip(ASKED, truth(), strict=True)
        self.answers = {tuple(ids[0].tolist()): answer for ids, answer in known}

    def begin(self, request: Request) -> None:
        self.rng.seed(SEED)
        self.answer = self.answers.get(tuple(request.prompt_ids), [])

    def end(self, answer: Sequence[int]) -> None:
        self.answer = []


def remembering() -> MergedDrafter:
    return MergedDrafter([NgramDrafter(NgramMemory(recency=0), online=True), model_draft()])


def known_and_remembering() -> MergedDrafter:
    return MergedDrafter([Knows(), NgramDrafter(NgramMemory(recency=0), online=True)])


def model_draft() -> ModelDrafter:
    return ModelDrafter(tiny_llama(SEED), 3, capacity=64)


def graph_draft() -> GraphDrafter:
    return GraphDrafter(LlamaTarget(tiny_llama(SEED), 64, graphs=True), 4)


def shape(answer: Generation) -> tuple:
    return answer.tokens, [(r.rows, r.accepted) for r in answer.rounds], answer.near_ties


def three_answers(decoder: SpeculativeDecoder) -> list[tuple]:
    """Of prompts longer and shorter than the one that is broken."""
    found = [decoder.generate({"input_ids": ids}, request_of(ids)) for ids in ASKED[1:4]]
    assert [one.tokens for one in found] == truth()[1:4]
    return [shape(one) for one in found]


@cache
def fresh(engine: str, make: Callable[[], Drafter], fused: str = "exact") -> list[tuple]:
    """Those of a decoder that nothing ever happened to."""
    config = SpecConfig(6, NEW, prefill_fused=fused)
    return three_answers(SpeculativeDecoder(build_target(engine, model()), make(), config))


# One request at a time


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_drafter_that_raises(engine: str, target, moment: str) -> None:
    inner = remembering()
    faulty = FaultyDrafter(inner)
    config = SpecConfig(6, NEW, prefill_fused="fast")
    decoder = SpeculativeDecoder(target, faulty, config)
    for after in (0, 1):
        faulty.moment, faulty.after, heard = moment, after, []
        inputs, request = {"input_ids": ASKED[0]}, request_of(ASKED[0])
        with pytest.raises(DrafterFault, match=moment):
            decoder.generate(inputs, request, on_tokens=heard.extend)
        assert heard == (truth()[0] if moment == "end" else truth()[0][: len(heard)])
        assert len(inner.drafters[0].memory) == 0
    assert three_answers(decoder) == fresh(engine, remembering, "fast")


@pytest.mark.parametrize(("kind", "after"), [("nan", 0), ("nan", 2), ("memory", 0), ("memory", 1)])
def test_a_pass_that_fails(engine: str, target, passes, kind: str, after: int) -> None:
    decoder = SpeculativeDecoder(target, Knows(), SpecConfig(6, NEW))
    passes.arm(kind, after)
    heard: list[int] = []
    with pytest.raises(RuntimeError) as caught:
        decoder.generate({"input_ids": ASKED[0]}, on_tokens=heard.extend)
    assert passes.disarm()
    assert out_of_memory(caught.value) if kind == "memory" else "are NaN" in str(caught.value)
    assert heard == truth()[0][: len(heard)] and bool(heard) == (after > 0)
    assert three_answers(decoder) == fresh(engine, Knows)


@pytest.mark.parametrize("where", ["prompt", "draft"])
def test_rows_of_nan_in_the_cache(engine: str, target, where: str) -> None:
    """Not only the logits are NaN, but K and V that later requests lie over."""
    decoder = SpeculativeDecoder(target, Knows(), SpecConfig(6, NEW))
    if where == "prompt":
        damaged = torch.cat([ASKED[1], torch.tensor([[DAMAGED]])], 1)
        with pytest.raises(RuntimeError, match="logits are NaN"):
            decoder.generate({"input_ids": damaged})
    else:
        target.prefill({"input_ids": ASKED[1]})
        target.forward(DraftTree.chain(truth()[1][0], [DAMAGED] * 5))
    assert three_answers(decoder) == fresh(engine, Knows)


def test_a_full_cache(engine: str) -> None:
    capacity = ASKED[1].shape[1] + NEW - 1
    target = build_target(engine, model(), capacity)
    decoder = SpeculativeDecoder(target, Knows(), SpecConfig(6, NEW + 5))
    heard: list[int] = []
    with pytest.raises(RuntimeError, match=f"KV cache is full.* capacity {capacity}"):
        decoder.generate({"input_ids": ASKED[1]}, on_tokens=heard.extend)
    assert heard == truth()[1]
    with pytest.raises(RuntimeError, match="the prompt does not fit"):
        decoder.generate({"input_ids": prompt(SEED, capacity + 1)})
    decoder.config = SpecConfig(6, NEW)
    assert [one[0] for one in three_answers(decoder)] == truth()[1:4]


ONES = torch.ones(1, 5, dtype=torch.long)
BAD = (
    ({"input_ids": ONES.expand(2, -1)}, {}, ValueError, "input_ids must be"),
    ({"input_ids": ONES[0]}, {}, ValueError, "input_ids must be"),
    ({"input_ids": ONES + VOCAB}, {}, (IndexError, ValueError, RuntimeError), "range|must be in 0"),
    ({"input_ids": ONES}, {"drafted": [-1]}, ValueError, "drafted ids must be"),
    ({}, {}, ValueError, "input_ids"),
)


@pytest.mark.parametrize("inputs, options, error, message", BAD)
def test_bad_inputs(engine: str, target, inputs, options, error, message: str) -> None:
    decoder = SpeculativeDecoder(target, Knows(), SpecConfig(6, NEW))
    with pytest.raises(error, match=message):
        decoder.generate(inputs, Request([1]), **options)
    assert three_answers(decoder) == fresh(engine, Knows)


@pytest.mark.parametrize("raised", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("name", ["on_tokens", "on_round"])
def test_a_callback_that_raises(engine: str, target, name: str, raised) -> None:
    drafter = known_and_remembering()
    decoder = SpeculativeDecoder(target, drafter, SpecConfig(6, NEW))

    def fail(*_: object) -> None:
        raise raised("gone")

    with pytest.raises(raised, match="gone"):
        decoder.generate({"input_ids": ASKED[0]}, request_of(ASKED[0]), **{name: fail})
    assert len(drafter.drafters[1].memory) == 0
    assert three_answers(decoder) == fresh(engine, known_and_remembering)


# The record through which a launch speaks to the host


@pytest.mark.parametrize("engine", ["llama", "graphs"])
def test_a_launch_that_publishes_nothing(engine: str, target, monkeypatch) -> None:
    decoder = SpeculativeDecoder(target, Knows(), SpecConfig(6, NEW))
    tail, calls = llama_rounds.verify_tail, 0

    def silent(*arguments, **options):
        nonlocal calls
        calls += 1
        return None if calls == 3 else tail(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(llama_rounds, "verify_tail", silent)
        with pytest.raises(RuntimeError, match="idle and has published no decision"):
            decoder.generate({"input_ids": ASKED[0]})
    assert calls == 3
    assert three_answers(decoder) == fresh(engine, Knows)


# Drafts


@pytest.mark.parametrize("make", [model_draft, graph_draft])
@pytest.mark.parametrize("fault", ["long prompt", "no prompt", "weights"])
def test_a_broken_draft(make: Callable, fault: str) -> None:
    drafter = make()
    decoder = SpeculativeDecoder(build_target("transformers", model()), drafter, SpecConfig(6, NEW))
    request = {
        "long prompt": Request(draft_inputs={"input_ids": prompt(SEED, 80)}),
        "no prompt": Request([1, 2]),
        "weights": request_of(ASKED[0]),
    }[fault]
    embedding = drafter.model.decoder.weights.embed if make is graph_draft else (
        drafter.model.get_input_embeddings().weight
    )  # fmt: skip
    kept = embedding.clone()
    if fault == "weights":
        embedding.fill_(torch.nan)
    with pytest.raises((RuntimeError, ValueError)):
        decoder.generate({"input_ids": ASKED[0]}, request)
    embedding.copy_(kept)
    assert three_answers(decoder) == fresh("transformers", make)


def test_a_draft_whose_cache_fills() -> None:
    """One that says so, and one that says less and less."""
    target, config = build_target("transformers", model()), SpecConfig(6, NEW)
    capacity = ASKED[1].shape[1] + 4
    decoder = SpeculativeDecoder(
        target, ModelDrafter(tiny_llama(SEED), 4, capacity=capacity), config
    )
    with pytest.raises(RuntimeError, match="KV cache is full"):
        decoder.generate({"input_ids": ASKED[1]}, request_of(ASKED[1]))
    found = decoder.generate({"input_ids": ASKED[2]}, request_of(ASKED[2]))
    assert found.tokens == truth()[2]
    draft = LlamaTarget(tiny_llama(SEED), capacity, graphs=True)
    three_answers(SpeculativeDecoder(target, GraphDrafter(draft, 4), config))


# Batches


class Batch:
    """A batch decoder whose drafters know the answers, one of which may fail."""

    def __init__(self, target: Target, rows: int = 6) -> None:
        self.faults: dict[int, tuple[str, int]] = {}
        self.tree: Callable[[list[int]], DraftTree] | None = None
        self.made = 0
        make = self.make if rows > 1 else None
        self.decoder = BatchDecoder(target, make, SpecConfig(rows, NEW), 3)

    def make(self) -> Drafter:
        outer = self
        outer.made += 1

        class Planned(FaultyDrafter):
            def begin(self, request: Request) -> None:
                asked = [ids[0].tolist() for ids in ASKED].index(request.prompt_ids)
                self.moment, self.after = outer.faults.pop(asked, ("", 0))
                super().begin(request)

            def propose(self, context: Sequence[int], rows: int) -> DraftTree:
                try:
                    return super().propose(context, rows)
                except DrafterFault:
                    if outer.tree is None:
                        raise
                    return outer.tree(list(context))

        return Planned(Knows())

    def generate(self, **options) -> list[Generation]:
        prompts = [BatchPrompt({"input_ids": ids}, request_of(ids)) for ids in ASKED]
        return self.decoder.generate(prompts, **options)

    def shapes(self) -> list[tuple]:
        found = self.generate()
        assert [one.tokens for one in found] == truth()
        return [shape(one) for one in found]


@cache
def fresh_batch(engine: str, rows: int = 6) -> list[tuple]:
    """Answers of a batch decoder that nothing ever happened to."""
    return Batch(build_target(engine, model()), rows).shapes()


def others_are_right(out: Sequence[Generation], failed: int) -> None:
    for i, (one, answer) in enumerate(zip(out, truth(), strict=True)):
        assert (one.error is not None) == (i == failed), one.error
        assert one.tokens == answer[: len(one.tokens)] and not one.cancelled
        assert i == failed or one.tokens == answer


@pytest.mark.parametrize(("moment", "failed"), [("begin", 1), ("propose", 0), ("end", 2)])
def test_one_drafter_of_a_batch(engine: str, target, moment: str, failed: int) -> None:
    batch = Batch(target)
    batch.faults[failed] = (moment, 2)
    out = batch.generate(return_errors=True)
    others_are_right(out, failed)
    assert isinstance(out[failed].error, DrafterFault)
    assert moment != "end" or out[failed].tokens == truth()[failed]
    # That drafter was not asked again.
    assert len(batch.decoder.idle) == batch.made - 1
    batch.faults[failed] = (moment, 1)
    with pytest.raises(DrafterFault, match=moment):
        batch.generate()
    assert batch.shapes() == fresh_batch(engine)


@pytest.mark.parametrize(("after", "rows"), [(0, 6), (2, 6), (4, 6), (5, 1)])
def test_nan_in_one_request_of_a_batch(engine: str, target, passes, after: int, rows: int) -> None:
    batch = Batch(target, rows)
    passes.arm("nan", after, request=1)
    out = batch.generate(return_errors=True)
    assert passes.disarm()
    # Three prefills, then rounds of three requests each.
    failed = after if after < 3 else 1
    others_are_right(out, failed)
    assert "logits are NaN" in str(out[failed].error)
    passes.arm("nan", after, request=1)
    with pytest.raises(RuntimeError, match="logits are NaN"):
        batch.generate()
    passes.disarm()
    assert batch.shapes() == fresh_batch(engine, rows)


@pytest.mark.parametrize("place", [0, 1, 3])
def test_rows_of_nan_beside_others(engine: str, target, place: int) -> None:
    """Shorter prompts follow the damaged one into its slot, longer ones run beside them."""
    damaged = torch.cat([prompt(SEED, 60).clamp_max(DAMAGED - 1), torch.tensor([[DAMAGED]])], 1)
    plain = Batch(target, 1)
    inputs = [{"input_ids": ids} for ids in ASKED]
    inputs.insert(place, {"input_ids": damaged})
    out = plain.decoder.generate(inputs, return_errors=True)
    assert "logits are NaN" in str(out.pop(place).error)
    others_are_right(out, -1)
    with pytest.raises(RuntimeError, match="logits are NaN"):
        plain.decoder.generate(inputs)
    assert plain.shapes() == fresh_batch(engine, 1)


def test_memory_runs_out_in_a_batch(engine: str, target, passes) -> None:
    batch = Batch(target)
    passes.arm("memory", 1)
    out = batch.generate(return_errors=True)
    others_are_right(out, 1)
    assert passes.disarm() and out_of_memory(out[1].error)
    # A shared pass is done once more with less in it.
    passes.arm("memory", 4)
    out = batch.generate()
    assert passes.disarm() and [one.tokens for one in out] == truth()
    assert [one.rounds[1].rows for one in out[:3]] == [1, 1, 1]
    assert batch.shapes() == fresh_batch(engine)


def test_a_shared_pass_that_cannot_be_done(engine: str, target, passes) -> None:
    """Nobody in it is to blame: all of them fail, those that wait do not."""
    batch = Batch(target, 1)
    passes.arm("memory", 4)
    out = batch.generate(return_errors=True)
    assert passes.disarm()
    assert [one.error is None for one in out] == [False] * 3 + [True] * 2
    assert all(out_of_memory(one.error) and len(one.tokens) == 2 for one in out[:3])
    assert [one.tokens for one in out[3:]] == truth()[3:]
    assert batch.shapes() == fresh_batch(engine, 1)


@pytest.mark.parametrize(
    ("drafts", "message"),
    [
        ([VOCAB], f"drafted ids must be in 0..{VOCAB - 1}, got "),
        ([-2], "drafted ids must be in"),
        ([i % VOCAB for i in range(200)], "KV cache is full"),
    ],
)
def test_a_bad_tree_in_a_batch(engine: str, target, drafts: Sequence[int], message: str) -> None:
    batch = Batch(target)
    batch.faults[1] = ("propose", 1)
    batch.tree = lambda context: siblings(context[-1], drafts)
    out = batch.generate(return_errors=True)
    others_are_right(out, 1)
    assert message in str(out[1].error)
    assert batch.shapes() == fresh_batch(engine)


def siblings(root: int, drafts: Sequence[int]) -> DraftTree:
    """A tree of one level."""
    return DraftTree([root, *drafts], [-1] + [0] * len(drafts), [0.0] * (len(drafts) + 1))


def test_drafts_behind_the_end_of_an_answer_are_cut(engine: str, target) -> None:
    batch = Batch(target)
    batch.faults[1] = ("propose", 1)
    batch.tree = lambda context: DraftTree.chain(context[-1], [3] * 200)
    out = batch.generate(return_errors=True)
    others_are_right(out, -1)
    assert out[1].rounds[1].rows == NEW - out[1].rounds[0].emitted - 1


def test_a_tree_too_deep_for_one_of_a_batch() -> None:
    # Answers this long may hold the damaged id, which is sound here.
    batch = Batch(LlamaTarget(tiny_llama(SEED), 160))
    batch.decoder.config = SpecConfig(6, 60)
    batch.faults[1] = ("propose", 1)
    batch.tree = lambda context: DraftTree.chain(context[-1], [3] * 40)
    out = batch.generate(return_errors=True)
    for one, answer in zip(out, truth(), strict=True):
        assert one.tokens[: len(answer)] == answer[: len(one.tokens)]
    assert [one.error is None for one in out] == [i != 1 for i in range(len(out))]
    assert "40 deep" in str(out[1].error)


def test_malformed_prompts_and_makers(engine: str, target) -> None:
    batch = Batch(target)
    prompts = [BatchPrompt({"input_ids": ids}, request_of(ids)) for ids in ASKED]
    prompts[2] = BatchPrompt({"input_ids": ASKED[2].expand(2, -1)})
    out = batch.decoder.generate(prompts, return_errors=True)
    others_are_right(out, 2)
    assert "prompt 2: input_ids must be" in str(out[2].error) and out[2].tokens == []
    maker = Batch(target)

    def one_fails() -> Drafter:
        if maker.made == 1:
            maker.made += 1
            raise OSError("no room for another draft")
        return maker.make()

    maker.decoder.make_drafter = one_fails
    out = maker.generate(return_errors=True)
    others_are_right(out, 1)
    assert "no room for another draft" in str(out[1].error)
    assert maker.shapes() == fresh_batch(engine)


@pytest.mark.parametrize("raised", [OSError, KeyboardInterrupt])
def test_whoever_listens_to_a_batch_may_fail(engine: str, target, raised) -> None:
    batch, heard = Batch(target), []

    def tell(index: int, tokens: list[int]) -> None:
        heard.append(index)
        if len(heard) == 6:
            raise raised("gone")

    with pytest.raises(raised, match="gone"):
        batch.generate(on_tokens=tell, return_errors=True)
    assert batch.shapes() == fresh_batch(engine)


@pytest.mark.parametrize("engine", ["transformers"])
def test_an_error_keeps_no_tensors(target, passes) -> None:
    passes.arm("nan", 5)
    error = next(one.error for one in Batch(target).generate(return_errors=True) if one.error)
    frame, names = error.__traceback__, []
    while frame:
        names += [n for n, v in frame.tb_frame.f_locals.items() if isinstance(v, torch.Tensor)]
        frame = frame.tb_next
    assert not names
