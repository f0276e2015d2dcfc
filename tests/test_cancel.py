"""Requests that nobody wants any more: what they had comes back, and nothing of them stays."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest
import torch
from transformers import LlamaForCausalLM

from tiny import OracleDrafter, prompt, reference, tiny_llama
from xspec_runtime.batch import BatchDecoder, BatchPrompt
from xspec_runtime.config import SpecConfig
from xspec_runtime.drafters.base import DraftTree, Request
from xspec_runtime.drafters.draft_model import ModelDrafter
from xspec_runtime.drafters.merge import MergedDrafter
from xspec_runtime.drafters.ngram import NgramDrafter, NgramMemory
from xspec_runtime.engine import Generation, SpeculativeDecoder
from xspec_runtime.overlap import MODES, Overlap
from xspec_runtime.policy import PricedDrafter
from xspec_runtime.soak.bench import build_target

NEW = 20
SEED = 4
ENGINES = ("transformers", "graphs")


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_llama(SEED)


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return prompt(SEED)


@pytest.fixture(scope="module")
def truth(model, ids) -> list[int]:
    return reference(model, ids, NEW)


class After:
    """Says yes from the question after so many on."""

    def __init__(self, questions: int) -> None:
        self.left = questions

    def __call__(self) -> bool:
        self.left -= 1
        return self.left < 0


class Recorder(OracleDrafter):
    """Remembers how requests ended."""

    def __init__(self, answer: Sequence[int], seed: int, hit: float = 0.5) -> None:
        super().__init__(answer, seed, hit)
        self.ends: list[list[int]] = []

    def end(self, answer: Sequence[int]) -> None:
        self.ends.append(list(answer))


def shape(answer: Generation) -> tuple:
    return answer.tokens, [(r.rows, r.accepted) for r in answer.rounds]


@pytest.mark.parametrize("questions", [0, 1, 2, 5])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_round_is_the_longest_wait(model, ids, truth, engine: str, questions: int) -> None:
    drafter = Recorder(truth, SEED)
    decoder = SpeculativeDecoder(build_target(engine, model), drafter, SpecConfig(4, NEW))
    heard: list[int] = []
    out = decoder.generate({"input_ids": ids}, on_tokens=heard.extend, stop=After(questions))
    assert out.cancelled and out.tokens == heard == truth[: len(heard)]
    # One question before the prefill, then one before every round.
    assert len(out.rounds) == max(questions - 1, 0) and bool(out.tokens) == (questions > 0)
    assert drafter.ends == [[]]
    after = decoder.generate({"input_ids": ids})
    assert after.tokens == truth and not after.cancelled and drafter.ends[1] == truth


def test_an_event_of_another_thread(model, ids, truth) -> None:
    stop, reached = threading.Event(), threading.Event()
    decoder = SpeculativeDecoder(build_target("transformers", model), None, SpecConfig(1, NEW))

    def cancel() -> None:
        assert reached.wait(10)
        stop.set()

    other = threading.Thread(target=cancel)
    other.start()

    def tell(tokens: list[int]) -> None:
        reached.set()
        assert stop.wait(10)

    out = decoder.generate({"input_ids": ids}, on_tokens=tell, stop=stop)
    other.join()
    assert out.cancelled and out.tokens == truth[:1]


@pytest.mark.parametrize("rows", [1, 16])
def test_a_complete_answer_is_not_cancelled(model, ids, truth, rows: int) -> None:
    stop, heard = threading.Event(), []
    drafter = Recorder(truth, SEED, 1.0) if rows > 1 else None
    decoder = SpeculativeDecoder(build_target("llama", model), drafter, SpecConfig(rows, NEW))

    def tell(tokens: list[int]) -> None:
        heard.extend(tokens)
        if len(heard) == NEW:
            stop.set()

    out = decoder.generate({"input_ids": ids}, on_tokens=tell, stop=stop)
    assert out.tokens == truth and not out.cancelled


def test_a_memory_learns_nothing_of_it(model, ids, truth) -> None:
    memory = NgramMemory(recency=0)
    memory.add([7, 8, 9])

    def decoder(known: NgramMemory) -> SpeculativeDecoder:
        drafter = NgramDrafter(known, online=True)
        return SpeculativeDecoder(build_target("transformers", model), drafter, SpecConfig(8, NEW))

    cancelling = decoder(memory)
    version = memory.version
    for questions in (0, 1, 4):
        out = cancelling.generate({"input_ids": ids}, stop=After(questions))
        assert out.cancelled
    assert memory.version == version and memory.answers == [[7, 8, 9]]
    fresh = NgramMemory(recency=0)
    fresh.add([7, 8, 9])
    assert shape(cancelling.generate({"input_ids": ids})) == shape(
        decoder(fresh).generate({"input_ids": ids})
    )
    assert memory.answers == [[7, 8, 9], truth]


@pytest.mark.parametrize("fused", ["off", "exact", "fast"])
def test_drafters_begin_anew(model, ids, truth, fused: str) -> None:
    """A draft model in the middle of a request, drafts in the prefill or not."""

    def decoder() -> SpeculativeDecoder:
        memory = NgramDrafter(NgramMemory(recency=0), online=True)
        draft = MergedDrafter([memory, ModelDrafter(tiny_llama(SEED), 3, capacity=128)])
        config = SpecConfig(8, NEW, prefill_fused=fused)
        return SpeculativeDecoder(build_target("llama", model), draft, config)

    request, used = Request(ids[0].tolist(), {"input_ids": ids}), decoder()
    other = prompt(SEED + 1, 9)
    for questions in (0, 1, 2, 3):
        inputs, draft_inputs = {"input_ids": other}, Request([], {"input_ids": other})
        assert used.generate(inputs, draft_inputs, stop=After(questions)).cancelled
    found = used.generate({"input_ids": ids}, request)
    assert found.tokens == truth
    assert shape(found) == shape(decoder().generate({"input_ids": ids}, request))


def test_cancelled_rounds_are_counted(model, ids, truth) -> None:
    """Drafts of requests that are given up every time cost what they cost: regret is bounded."""

    class Wrong(OracleDrafter):
        def propose(self, context: Sequence[int], rows: int) -> DraftTree:
            bad = (truth[min(len(context), NEW - 1)] + 1) % 128
            return DraftTree.chain(context[-1], [bad] * (rows - 1), [0.9] * (rows - 1))

    costs = [1.0 + 0.1 * row for row in range(8)]
    drafter = PricedDrafter(Wrong(truth, SEED), costs)
    decoder = SpeculativeDecoder(build_target("transformers", model), drafter, SpecConfig(8, NEW))
    extra = 0.0
    for _ in range(30):
        out = decoder.generate({"input_ids": ids}, stop=After(3))
        assert out.cancelled and out.tokens == truth[:3]
        extra += sum(costs[r.rows - 1] - 1.0 for r in out.rounds)
    # 60 steps of plain decoding, of which a small part may be lost for ever.
    assert extra <= drafter.surplus + 0.1 * 60


@pytest.mark.parametrize("engine", ENGINES)
def test_some_of_a_batch(model, engine: str) -> None:
    asked = [prompt(SEED + i, length) for i, length in enumerate((5, 31, 12, 20, 1, 9))]
    answers = [reference(model, ids, NEW) for ids in asked]
    memory = NgramMemory(recency=0)
    config = SpecConfig(6, NEW)

    def decoder(batch: int, known: NgramMemory) -> BatchDecoder:
        target = build_target(engine, model)
        return BatchDecoder(target, lambda: NgramDrafter(known, online=True), config, batch)

    used = decoder(3, memory)
    # Never started, after the prefill, in the middle, twice not at all, and too late.
    stops = [After(0), After(1), After(5), None, threading.Event(), After(1000)]
    prompts = [
        BatchPrompt({"input_ids": ids}, stop=stop) for ids, stop in zip(asked, stops, strict=True)
    ]
    heard: list[list[int]] = [[] for _ in asked]
    out = used.generate(prompts, lambda index, tokens: heard[index].extend(tokens))
    assert [o.tokens for o in out] == heard
    assert [o.cancelled for o in out] == [True, True, True, False, False, False]
    assert [len(o.tokens) for o in out[:2]] == [0, 1] and len(out[2].rounds) == 4
    assert all(o.tokens == answer[: len(o.tokens)] for o, answer in zip(out, answers, strict=True))
    assert [o.tokens for o in out[3:]] == answers[3:]
    assert sorted(memory.answers) == sorted(answers[3:])
    fresh = NgramMemory(recency=0)
    fresh.extend(memory.answers)
    inputs = [{"input_ids": ids} for ids in asked]
    again = used.generate(inputs)
    assert [o.tokens for o in again] == answers
    assert [shape(o) for o in again] == [shape(o) for o in decoder(3, fresh).generate(inputs)]


def test_a_stop_that_raises_ends_its_request(model, ids, truth) -> None:
    drafter = Recorder(truth, SEED)
    decoder = SpeculativeDecoder(build_target("transformers", model), drafter, SpecConfig(4, NEW))

    def raising() -> bool:
        if After.__call__(count):
            raise OSError("the client is gone")
        return False

    for questions in (0, 2):
        count = After(questions)
        with pytest.raises(OSError, match="the client is gone"):
            decoder.generate({"input_ids": ids}, stop=raising)
    assert drafter.ends == [[], []]
    assert decoder.generate({"input_ids": ids}).tokens == truth


@pytest.mark.parametrize("when", ["before", "preparing", "answering"])
@pytest.mark.parametrize("mode", MODES)
def test_the_window_closes(model, ids, truth, mode: str, when: str) -> None:
    draft = ModelDrafter(tiny_llama(SEED), 3, capacity=128)
    decoder = SpeculativeDecoder(build_target("transformers", model), draft, SpecConfig(8, NEW))
    work, stop, told = Overlap(decoder, mode, limit=4), threading.Event(), []

    def prepare(unwanted: threading.Event) -> dict[str, torch.Tensor]:
        if when == "preparing":
            stop.set()
            told.append(mode == "off" or unwanted.wait(10))
        return {"input_ids": ids}

    def tell(tokens: list[int]) -> None:
        if when == "answering":
            stop.set()

    if when == "before":
        stop.set()
    request = Request(ids[0].tolist(), {"input_ids": ids})
    out = work.generate(prepare, request, tell, stop=stop)
    assert out.cancelled and out.tokens == (truth[:1] if when == "answering" else [])
    assert told == ([True] if when == "preparing" else [])
    assert not [t.name for t in threading.enumerate() if t.name.startswith("xspec-")]
    assert work.generate(lambda _: {"input_ids": ids}, request).tokens == truth
