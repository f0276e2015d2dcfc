"""Draft and target on devices of their own: what crosses between them does so on purpose."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from running import invoke
from tiny import prompt, reference, tiny_llama
from virtual_devices import HOST, MixedDevices, VirtualDevices
from xspec_runtime import cli
from xspec_runtime.batch import BatchDecoder, BatchPrompt
from xspec_runtime.config import SpecConfig
from xspec_runtime.drafters.base import Drafter, Request
from xspec_runtime.drafters.draft_model import ModelDrafter
from xspec_runtime.drafters.graph_draft import GraphDrafter
from xspec_runtime.drafters.merge import MergedDrafter
from xspec_runtime.drafters.ngram import NgramDrafter, NgramMemory
from xspec_runtime.e2e import Options
from xspec_runtime.engine import SpeculativeDecoder
from xspec_runtime.inputs import check_device
from xspec_runtime.models import mini
from xspec_runtime.overlap import MODES, Overlap
from xspec_runtime.soak.bench import build_target
from xspec_runtime.targets.base import Target
from xspec_runtime.targets.llama import LlamaTarget
from xspec_runtime.workloads import MiniPair, Settings

SEED, NEW = 8, 16
DRAFT, TARGET = torch.device("cpu", 1), torch.device("cpu", 2)
DRAFTS = ("model", "graph")
ENGINES = ("transformers", "graphs")


@pytest.fixture
def apart() -> Iterator[VirtualDevices]:
    with VirtualDevices() as devices:
        yield devices


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return prompt(SEED)


@pytest.fixture(scope="module")
def truth(ids) -> list[int]:
    return reference(tiny_llama(SEED), ids, NEW)


def draft_on(device: torch.device, kind: str, seed: int = SEED) -> Drafter:
    model = tiny_llama(seed).to(device)
    if kind == "model":
        return ModelDrafter(model, 3, siblings=1, capacity=64)
    return GraphDrafter(LlamaTarget(model, 64, graphs=True), 3)


def target_on(device: torch.device, engine: str) -> Target:
    return build_target(engine, tiny_llama(SEED).to(device))


# The devices themselves


def test_devices_keep_tensors_apart(apart) -> None:
    host, one, two = (torch.ones(3, device=d) for d in (HOST, DRAFT, TARGET))
    assert [t.device for t in (host, one, two)] == [HOST, DRAFT, TARGET]
    assert (one + one).device == (2 * one[1:]).device == one.new_zeros(2).device == DRAFT
    for pair in ((one, two), (one, host), (host, two)):
        with pytest.raises(MixedDevices):
            torch.add(*pair)
    with pytest.raises(MixedDevices, match="numpy"):
        two.numpy()
    moved = one.to(TARGET)
    assert moved.device == (moved + two).device == TARGET and one.device == DRAFT
    moved += 1
    assert one.tolist() == [1.0] * 3 and two.cpu().device == two.to("cpu").device == HOST
    assert torch.tensor([1], device=DRAFT).device == DRAFT
    # Numbers, copies and indices of the host may cross.
    assert (one + torch.tensor(2.0)).device == one[torch.tensor([0, 2])].device == DRAFT
    one.copy_(host)
    model = tiny_llama(0).to(TARGET)
    assert model.device == TARGET
    with pytest.raises(MixedDevices):
        model(prompt(0))
    assert model(prompt(0).to(TARGET)).logits.device == TARGET


# A draft and a target


@pytest.mark.parametrize("fused", ["exact", "fast"])
@pytest.mark.parametrize("kind", DRAFTS)
@pytest.mark.parametrize("engine", ENGINES)
def test_answers_are_those_of_one_device(apart, ids, truth, engine, kind, fused) -> None:
    drafter = draft_on(DRAFT, kind)
    target = target_on(TARGET, engine)
    assert drafter.model.device == DRAFT and target.device == TARGET
    config = SpecConfig(8, NEW, prefill_fused=fused)
    decoder = SpeculativeDecoder(target, drafter, config)
    # The request's tensors are wherever they were made; the draft fetches them.
    for place in (HOST, TARGET):
        request = Request(ids[0].tolist(), {"input_ids": ids.to(place)})
        out = decoder.generate({"input_ids": ids.to(TARGET)}, request)
        assert out.tokens == truth
        # The draft is the target: every chain is right but for what the budget cuts.
        assert out.tokens_per_verify > 2 and out.prefill_drafted == (3 if fused == "fast" else 0)
    caches = [layer.keys for cache in (drafter.cache, target.cache) for layer in cache.layers]
    assert {apart.places.of(keys) for keys in caches[: len(caches) // 2]} == {DRAFT}
    assert {apart.places.of(keys) for keys in caches[len(caches) // 2 :]} == {TARGET}


def test_a_batch(apart, ids, truth) -> None:
    asked = [ids, prompt(SEED + 1, 9), prompt(SEED + 2, 31)]
    answers = [truth, *(reference(tiny_llama(SEED), one, NEW) for one in asked[1:])]
    memory = NgramMemory(recency=0)

    def make() -> MergedDrafter:
        return MergedDrafter([NgramDrafter(memory, online=True), draft_on(DRAFT, "model")])

    for engine in ENGINES:
        decoder = BatchDecoder(target_on(TARGET, engine), make, SpecConfig(6, NEW), 2)
        prompts = [
            BatchPrompt({"input_ids": one.to(TARGET)}, Request([], {"input_ids": one}))
            for one in asked
        ]
        assert [out.tokens for out in decoder.generate(prompts)] == answers


@pytest.mark.parametrize("kind", DRAFTS)
def test_a_draft_that_fetches_nothing_is_found(apart, ids, kind: str, monkeypatch) -> None:
    monkeypatch.setattr(Request, "inputs_on", lambda self, device: dict(self.draft_inputs))
    decoder = SpeculativeDecoder(
        target_on(TARGET, "transformers"), draft_on(DRAFT, kind), SpecConfig(8, NEW)
    )
    inputs = {"input_ids": ids.to(TARGET)}
    with pytest.raises((MixedDevices, ValueError, RuntimeError)):
        decoder.generate(inputs, Request([], inputs))


# The timeline


def overlapped(kind: str, mode: str | None, devices: VirtualDevices) -> Overlap:
    decoder = SpeculativeDecoder(
        target_on(TARGET, "graphs"), draft_on(DRAFT, kind), SpecConfig(8, NEW)
    )
    work = Overlap(decoder, mode, limit=6)
    run = work.head.run

    def elsewhere(*arguments) -> None:
        if threading.current_thread() is threading.main_thread():
            return run(*arguments)
        with VirtualDevices(devices.places):
            return run(*arguments)

    work.head.run = elsewhere
    return work


def arriving(ids: torch.Tensor, devices: VirtualDevices):
    """Inputs that are put on the target's device, on whatever thread."""

    def prepare(stop: threading.Event) -> dict[str, torch.Tensor]:
        if threading.current_thread() is threading.main_thread():
            return {"input_ids": ids.to(TARGET)}
        with VirtualDevices(devices.places):
            return {"input_ids": ids.to(TARGET)}

    return prepare


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", DRAFTS)
def test_modes_agree(apart, ids, truth, kind: str, mode: str) -> None:
    work = overlapped(kind, mode, apart)
    request = Request(ids[0].tolist(), {"input_ids": ids})
    for _ in range(2):
        out = work.generate(arriving(ids, apart), request)
        assert out.tokens == truth
    assert not [t.name for t in threading.enumerate() if t.name.startswith("xspec-")]


@pytest.mark.parametrize("kind", DRAFTS)
def test_the_draft_goes_on_while_the_target_prefills(
    apart, ids, truth, kind: str, monkeypatch
) -> None:
    work = overlapped(kind, None, apart)
    assert work.mode == "concurrent"
    target, before = work.decoder.target, []
    prefill = target.prefill

    def slow(*arguments, **options):
        before.append(len(work.head.tokens))
        deadline = time.monotonic() + 20
        while len(work.head.tokens) < 6 and time.monotonic() < deadline:
            time.sleep(0.001)
        return prefill(*arguments, **options)

    monkeypatch.setattr(target, "prefill", slow)
    request = Request(ids[0].tolist(), {"input_ids": ids})
    out = work.generate(arriving(ids, apart), request)
    assert out.tokens == truth
    assert before[0] < 6 and work.stages.hidden_tokens == 6
    # The draft is the target: all of its text is in the first round, and right.
    assert out.rounds[0].accepted >= 5


def test_on_one_device_the_draft_stops_for_the_target() -> None:
    drafter = draft_on(HOST, "model")
    decoder = SpeculativeDecoder(build_target("transformers", tiny_llama(SEED)), drafter)
    assert Overlap(decoder).mode == "window"


# The pair, and its options


def test_the_pair_puts_each_model_on_its_device(apart) -> None:
    both = Settings(device="cpu:2", draft_device="cpu:1", max_new_tokens=12)
    pair = MiniPair(both)
    assert (pair.target.device, pair.draft_model.device) == (TARGET, DRAFT)
    # Pinned memory is for GPUs; elsewhere an upload is a copy.
    pair._uploads = {name: lambda pixels, name=name: pixels.to(name) for name in pair._uploads}
    tasks = pair.scene_tasks(2)
    assert {t.device for t in tasks[0].inputs.values()} == {TARGET}
    assert {t.device for t in tasks[0].request.draft_inputs.values()} == {DRAFT}
    plain = SpeculativeDecoder(pair.target, None, SpecConfig(1, 12, (mini.EOS,)))
    truths = [plain.generate(task.inputs).tokens for task in tasks]
    decoder = pair.decoder("tree")
    assert [decoder.generate(task.inputs, task.request).tokens for task in tasks] == truths


def test_options() -> None:
    assert Options("", device="cpu", draft_device="cpu").settings().drafting_device == "cpu"
    assert Settings(device="cuda:1").drafting_device == "cuda:1"
    assert Settings(device="cuda:1", draft_device="cuda:0").drafting_device == "cuda:0"
    for name in ("target_device", "draft_device"):
        option = f"--{name.replace('_', '-')}"
        with pytest.raises(ValueError, match=f"{option} must be cpu, cuda or cuda:N, got 'meta'"):
            Options("", **{name: "meta"}).settings()
    with pytest.raises(ValueError, match="--device must be cpu, cuda or cuda:N, got 'cpu:1'"):
        check_device("cpu:1")


def test_asking_refuses_a_device_that_is_none(tmp_path: Path) -> None:
    np.save(tmp_path / "events.npy", np.zeros(3))
    for option in ("--draft-device", "--target-device"):
        events = tmp_path / "events.npy"
        out = invoke(cli.app, "ask", "What?", "--events", events, option, "meta")
        assert out.exit_code == 2 and "must be cpu, cuda or cuda:N, got 'meta'" in out.stderr
