"""The draft beside the video: equal answers in every mode, times that add up, nothing left over."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from running import invoke
from test_graphs import FakeCuda
from tiny import prompt, reference, tiny_llama
from xspec_runtime import cli
from xspec_runtime import overlap as module
from xspec_runtime.config import SpecConfig
from xspec_runtime.data.video_file import Stopped
from xspec_runtime.drafters.base import Request
from xspec_runtime.drafters.draft_model import ModelDrafter
from xspec_runtime.drafters.merge import MergedDrafter
from xspec_runtime.drafters.ngram import NgramDrafter, NgramMemory
from xspec_runtime.engine import SpeculativeDecoder
from xspec_runtime.head_start import HeadStart
from xspec_runtime.inputs import read_video
from xspec_runtime.models import mini
from xspec_runtime.overlap import MODES, Overlap, Stages, check_mode
from xspec_runtime.targets.transformers import TransformersTarget
from xspec_runtime.workloads import MiniPair, Settings

NEW = 24
SEED = 5


@pytest.fixture(scope="module")
def target() -> TransformersTarget:
    return TransformersTarget(tiny_llama(SEED), 128)


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return prompt(SEED)


@pytest.fixture(scope="module")
def truth(target, ids) -> list[int]:
    return reference(target.model, ids, NEW)


@pytest.fixture(autouse=True)
def _nothing_left_running():
    yield
    assert not [t.name for t in threading.enumerate() if t.name.startswith("xspec-")]


def request_of(ids: torch.Tensor) -> Request:
    return Request(ids[0].tolist(), {"input_ids": ids})


def overlap(target, mode: str, draft_seed: int = SEED, fused: str = "exact", **options) -> Overlap:
    """A draft that is the target itself, or another model with another seed."""
    draft = ModelDrafter(tiny_llama(draft_seed), gamma=3, capacity=128)
    memory = NgramDrafter(NgramMemory(recency=0), online=True)
    config = SpecConfig(8, NEW, prefill_fused=fused)
    return Overlap(
        SpeculativeDecoder(target, MergedDrafter([memory, draft]), config), mode, **options
    )


def after(work: Overlap, ids: torch.Tensor, tokens: int):
    """Inputs that are there once the draft has said so many tokens."""

    def prepare(stop):
        while len(work.head.tokens) < tokens and not stop.is_set():
            time.sleep(0.001)
        return {"input_ids": ids}

    return prepare


@pytest.mark.parametrize("fused", ["off", "exact", "fast"])
@pytest.mark.parametrize("draft_seed", [SEED, SEED + 1])
@pytest.mark.parametrize("mode", MODES)
def test_tokens_equal_generate(target, ids, truth, mode, draft_seed, fused):
    work = overlap(target, mode, draft_seed, fused, limit=12)
    heard: list[int] = []
    for _ in range(2):
        heard.clear()
        prepare = after(work, ids, 0 if mode == "off" else 5)
        work.head.tokens = []
        out = work.generate(prepare, request_of(ids), heard.extend)
        assert out.tokens == heard == truth


def test_window_counts_what_it_hid(target, ids, truth):
    work = overlap(target, "window", limit=12)
    out = work.generate(after(work, ids, 6), request_of(ids))
    s = work.stages
    assert 6 <= s.drafted_tokens <= 12 and 5 <= s.hidden_tokens <= s.drafted_tokens
    # The draft is the target: what it said seeds the first round, which accepts all of it.
    assert out.rounds[0].accepted >= min(s.drafted_tokens, 8) - 1
    assert 0 < s.window_used_ms <= s.draft_ms
    assert s.window_used_ms <= s.video_ms < s.ttft_ms < s.total_ms
    assert s.as_dict()["mode"] == "window" and f"{s.hidden_tokens} of" in str(s)


def test_window_stops_at_its_limit_and_at_the_end_of_sequence(target, ids, truth):
    work = overlap(target, "window", limit=4)

    def slow(stop):
        deadline = time.monotonic() + 10
        while len(work.head.tokens) < 4 and time.monotonic() < deadline:
            time.sleep(0.001)
        return {"input_ids": ids}

    assert work.generate(slow, request_of(ids)).tokens == truth
    assert work.head.tokens == truth[:4] and work.stages.hidden_tokens == 4

    end = truth[2]
    decoder = SpeculativeDecoder(
        target, ModelDrafter(tiny_llama(SEED), 3, capacity=128), SpecConfig(8, NEW, (end,))
    )
    work = Overlap(decoder, "off")
    expected = truth[: truth.index(end) + 1]
    assert work.generate(lambda stop: {"input_ids": ids}, request_of(ids)).tokens == expected
    assert work.head.tokens == expected


def test_off_is_one_after_another_on_this_thread(target, ids):
    work = overlap(target, "off", limit=6)
    threads = []

    def prepare(stop):
        threads.append(threading.current_thread())
        assert not work.head.times
        return {"input_ids": ids}

    work.generate(prepare, request_of(ids))
    s = work.stages
    assert threads == [threading.main_thread()]
    assert (s.hidden_tokens, s.window_used_ms, s.drafted_tokens) == (0, 0.0, 6)
    assert s.video_ms + s.draft_ms < s.ttft_ms


def test_concurrent_goes_on_beside_the_prefill(target, ids, truth, monkeypatch):
    work = overlap(target, "concurrent", limit=12)
    prefill = target.prefill
    before = []

    def slow_prefill(*arguments, **options):
        before.append(len(work.head.tokens))
        deadline = time.monotonic() + 10
        while len(work.head.tokens) < 12 and time.monotonic() < deadline:
            time.sleep(0.001)
        return prefill(*arguments, **options)

    monkeypatch.setattr(target, "prefill", slow_prefill)
    out = work.generate(lambda stop: {"input_ids": ids}, request_of(ids))
    assert out.tokens == truth
    assert before[0] < 12 and work.stages.hidden_tokens == 12
    # What came during the prefill is in the first round's tree: 8 rows, all right.
    assert out.rounds[0].accepted == 7


def test_a_thread_that_starts_late_has_no_text_of_the_last_request(target, ids, monkeypatch):
    work = overlap(target, "concurrent", limit=6)
    work.generate(lambda stop: {"input_ids": ids}, request_of(ids))
    work.head.tokens = [1, 2, 3]
    monkeypatch.setattr(work.head, "run", lambda *_: None)
    with ThreadPoolExecutor(1, "xspec-late") as pool:
        work.head.run_beside(pool, request_of(ids), 6, ())
        assert work.head.tokens == []


def test_the_drafts_prompt_is_read_once(target, ids, monkeypatch):
    work = overlap(target, "window", limit=6)
    begun = []
    begin = work.head.draft.begin
    monkeypatch.setattr(work.head.draft, "begin", lambda r: begun.append(r) or begin(r))
    requests = [request_of(ids), request_of(ids)]
    for request in requests:
        work.generate(after(work, ids, 0), request)
    assert len(begun) == 2 and all(a is b for a, b in zip(begun, requests, strict=True))
    # The same request again, and the decoder without a window, begin anew.
    work.generate(after(work, ids, 0), requests[1])
    work.decoder.generate({"input_ids": ids}, requests[1])
    assert len(begun) == 4


# On a GPU streams are a thread's own.


def test_inputs_are_prepared_on_the_callers_stream(target, ids, truth, monkeypatch):
    cuda = FakeCuda(monkeypatch)
    work = overlap(target, "window", limit=2)
    monkeypatch.setattr(module, "_stream_of", lambda device: cuda.now)
    prepare = lambda stop: cuda.log.append("prepared") or {"input_ids": ids}  # noqa: E731
    assert work.generate(prepare, request_of(ids)).tokens == truth
    assert cuda.log == ["on main", "prepared", "off"]


@torch.inference_mode()
def test_what_ran_beside_is_waited_for(ids, monkeypatch):
    cuda = FakeCuda(monkeypatch)
    head = HeadStart(ModelDrafter(tiny_llama(SEED), gamma=3, capacity=128))
    head._stream = cuda._Stream(cuda, "branch")
    prefill = head.draft.begin
    monkeypatch.setattr(head.draft, "begin", lambda r: cuda.log.append("prefill") or prefill(r))
    request = request_of(ids)
    with ThreadPoolExecutor(1) as pool:
        head.run_beside(pool, request, 1, ())
        head._running.result()
        head.begin(request)
        beside = ["branch waits for main", "on branch", "branch waits for branch", "prefill", "off"]
        assert cuda.log == [*beside, "main waits for branch"]
        # Nobody asked for it, and the next request does not run beside.
        head.run_beside(pool, request, 1, ())
        head._running.result()
        head.abandon()
        cuda.log.clear()
        head.start(request_of(ids))
    assert cuda.log == ["main waits for branch", "prefill"]


class Boom(Exception):
    pass


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("where", ["prepare", "draft", "target", "interrupt"])
def test_errors_surface_once_and_leave_the_decoder_usable(
    target, ids, truth, mode, where, monkeypatch
):
    work = overlap(target, mode, limit=NEW)
    released = threading.Event()

    def fail(*_: object, **__: object):
        raise KeyboardInterrupt if where == "interrupt" else Boom(where)

    def prepare(stop):
        if where == "prepare":
            fail()
        if where in ("draft", "interrupt") and mode == "window":
            assert stop.wait(10)
            released.set()
            raise Stopped("nobody wants them")
        return {"input_ids": ids}

    with monkeypatch.context() as patch:
        if where in ("draft", "interrupt"):
            patch.setattr(work.head.draft, "begin", fail)
        if where == "target":
            patch.setattr(target, "prefill", fail)
        expected = KeyboardInterrupt if where == "interrupt" else Boom
        with pytest.raises(expected) as caught:
            work.generate(prepare, request_of(ids))
    assert caught.value.__context__ is None
    assert released.is_set() == (where in ("draft", "interrupt") and mode == "window")
    assert not [t.name for t in threading.enumerate() if t.name.startswith("xspec-")]
    assert work.generate(lambda stop: {"input_ids": ids}, request_of(ids)).tokens == truth


def test_bad_input(target):
    with pytest.raises(ValueError, match="overlap must be one of window, concurrent, off, got 'x'"):
        check_mode("x")
    with pytest.raises(ValueError, match="limit must be at least 1, got 0"):
        overlap(target, "window", limit=0)
    memory = NgramDrafter(NgramMemory(recency=0), online=True, name="memory")
    for drafter, name in ((None, "plain decoding"), (memory, "memory")):
        with pytest.raises(ValueError, match=f"no draft model in '{name}'"):
            Overlap(SpeculativeDecoder(target, drafter))


def test_the_head_start_is_found_and_shared(target):
    draft = ModelDrafter(tiny_llama(SEED), 3, capacity=128)
    decoder = SpeculativeDecoder(target, draft, SpecConfig(8, NEW))
    first, second = Overlap(decoder), Overlap(decoder, "off")
    assert isinstance(decoder.drafter, HeadStart) and decoder.drafter.draft is draft
    assert first.head is second.head is decoder.drafter
    assert first.stages == Stages("window")


# The embedded pair on a video file


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    av = pytest.importorskip("av")
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    rng = np.random.default_rng(SEED)
    scene = rng.integers(0, 256, (24, 72, 3)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=20)
        stream.height, stream.width, stream.pix_fmt = 192, 256, "yuv420p"
        for i in range(40):
            frame = np.ascontiguousarray(scene[:, 8 * i : 8 * i + 256])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


def test_modes_agree_on_the_embedded_pair(clip):
    pair = MiniPair(Settings())
    scenes = pair.scene_tasks(1)
    question = "What do you see?"
    image = np.full((64, 64, 3), 255, np.uint8)
    image[20:40, 10:30] = (0, 0, 255)
    task = pair.task("clip", question, read_video(clip), image)
    plain = SpeculativeDecoder(pair.target, None, SpecConfig(1, 128, (mini.EOS,)))
    tasks = [task, *scenes]
    truth = [plain.generate(t.inputs).tokens for t in tasks]
    answers = {}
    decoder = pair.decoder("tree")
    for mode in MODES:
        work = Overlap(decoder, mode)

        def from_file(stop, work=work, waits=mode != "off"):
            deadline = time.monotonic() + 10
            while waits and not work.head.tokens and time.monotonic() < deadline:
                time.sleep(0.001)
            return pair.task("clip", question, read_video(clip, stop), image).inputs

        work.head.clear()
        answers[mode] = [work.generate(from_file, task.request, frames=8).tokens]
        s = work.stages
        assert s.mode == mode and s.drafted_tokens > 0 and s.video_ms > 0
        assert (s.hidden_tokens > 0) == (mode != "off")
        for scene in scenes:
            out = work.generate(lambda stop, scene=scene: scene.inputs, scene.request)
            answers[mode].append(out.tokens)
    assert all(answers[mode] == truth for mode in MODES)


def test_asking_says_where_the_time_went(clip, tmp_path):
    steps = np.arange(500)
    events = {"x": steps % 64, "y": steps % 48, "t": steps, "p": steps % 2}
    np.save(tmp_path / "events.npy", events)

    def ask(*options: object):
        events = tmp_path / "events.npy"
        return invoke(cli.app, "ask", "What is there?", "--events", events, *options)

    wrong = ask("--overlap", "both")
    assert wrong.exit_code == 2
    assert "--overlap must be one of window, concurrent, off, got 'both'" in wrong.stderr
    answer = ask("--video", clip, "--max-new-tokens", 12)
    assert answer.exit_code == 0, answer.output
    assert "window: video " in answer.stderr and "tokens hidden" in answer.stderr
    assert answer.stdout.strip()
