"""Profile mode: a verify as three launches in ranges, with the bits of one."""

from __future__ import annotations

import random

import pytest
import torch

from tape import TapeRecorder
from tiny import OracleDrafter, prompt, tiny_llama
from xspec_kernels import ranges
from xspec_runtime import graphs
from xspec_runtime.config import SpecConfig
from xspec_runtime.drafters.base import Request
from xspec_runtime.engine import SpeculativeDecoder
from xspec_runtime.targets import llama_graphs
from xspec_runtime.targets.llama import LlamaTarget

PARTS = ["verify.layers", "verify.head", "verify.tail"]


@pytest.fixture(params=["plain call", "tape"])
def captures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Without graphs, and with the CPU's stand-in for them."""
    if request.param == "tape":
        monkeypatch.setattr(graphs, "can_capture", lambda device: True)
        monkeypatch.setattr(graphs, "new_recorder", lambda device, pool: TapeRecorder())
    return request.param == "tape"


def test_bits_and_ranges(captures: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seed = random.randrange(2**32)
    ids = prompt(seed % 1000)
    whole, parts = (LlamaTarget(tiny_llama(2), 96, "torch", graphs=True) for _ in range(2))
    parts.graphs.profile = True
    plain = SpeculativeDecoder(whole, None, SpecConfig(1, 20)).generate({"input_ids": ids}).tokens
    for number in range(3):
        seen, answers = ranges.Events(), []
        for target in (whole, parts):
            drafter = OracleDrafter(plain, seed + number)
            decoder = SpeculativeDecoder(target, drafter, SpecConfig(7, 20))
            with ranges.listening(seen):
                answers.append(decoder.generate({"input_ids": ids}, Request(ids[0].tolist())))
        assert answers[0].tokens == answers[1].tokens == plain, seed
        accepted = [[r.accepted for r in answer.rounds] for answer in answers]
        assert accepted[0] == accepted[1] and sum(accepted[0]) > 0, seed
        for one, other in zip(whole.cache.layers, parts.cache.layers, strict=True):
            rows = slice(whole.cache.length)
            assert torch.equal(one.keys[:, :, rows], other.keys[:, :, rows]), seed
            assert torch.equal(one.values[:, :, rows], other.values[:, :, rows]), seed
        shown = [event.name for event in seen.found if event.name in PARTS]
        assert shown == PARTS * len(accepted[1]), seed


def test_one_target_changes_mode(captures: bool) -> None:
    target, ids = LlamaTarget(tiny_llama(2), 96, "torch", graphs=True), prompt(4)
    answers = []
    for profile in (False, True, False, True):
        target.graphs.profile = profile
        decoder = SpeculativeDecoder(target, None, SpecConfig(1, 12))
        answers.append(decoder.generate({"input_ids": ids}).tokens)
    assert answers == answers[:1] * 4
    assert len(target.graphs.verifies) >= 4


def test_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, want in (("1", True), ("0", False), (None, False)):
        monkeypatch.delenv("XSPEC_PROFILE", raising=False)
        if value is not None:
            monkeypatch.setenv("XSPEC_PROFILE", value)
        assert llama_graphs.LlamaGraphs(*_empty()).profile is want


def _empty() -> tuple:
    target = LlamaTarget(tiny_llama(2), 96, "torch", graphs=False)
    return target.decoder, target._rounds
