"""Waiting for a word of host memory, natively and without the native module."""

from __future__ import annotations

from threading import Thread

import pytest
import torch

from xspec_kernels import _native


@pytest.fixture(params=["native", "python"], autouse=True)
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "python":
        monkeypatch.setattr(_native, "module", None)


def test_a_word_that_has_changed_and_one_that_does_not() -> None:
    words = torch.tensor([3, -(2**62)])
    assert _native.await_change(words[0], 2, 0) and _native.await_change(words[1], 0, 10**9)
    assert not _native.await_change(words[0], 3, 0)
    assert not _native.await_change(words[1], -(2**62), 2000)


def test_other_threads_run_meanwhile() -> None:
    """Whoever writes the word needs the interpreter, for many turns of it."""
    word, turns = torch.zeros((), dtype=torch.int64), 0

    def work() -> None:
        nonlocal turns
        for _ in range(20_000):
            turns += 1
        word.fill_(7)

    thread = Thread(target=work)
    thread.start()
    assert _native.await_change(word, 0, 60_000_000)
    assert turns == 20_000
    thread.join()
