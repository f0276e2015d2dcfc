from __future__ import annotations

import pytest

from xspec_runtime.metrics import (
    accept_histogram,
    acceptance_rate,
    gain,
    position_match,
    tokens_per_verify,
)


def test_worked_examples():
    assert tokens_per_verify(49, 14) == 3.5
    assert acceptance_rate(3, 10) == 0.3
    assert acceptance_rate(0, 0) is None
    assert accept_histogram([2, 0, 2, 4]) == {0: 1, 1: 0, 2: 2, 3: 0, 4: 1}
    assert accept_histogram([]) == {}
    assert gain(3.0, 21.0, 14.0) == pytest.approx(2.0)


def test_position_match_leaves_out_the_given_token_and_counts_short_drafts_as_misses():
    assert position_match([9, 1, 2], [9, 1, 3, 4, 5]) == 0.25
    assert position_match([9, 1], [9, 1], start=0) == 1.0
    assert position_match([1], [1]) is None


def test_impossible_counts():
    with pytest.raises(ValueError, match="at least one verify, got 0"):
        tokens_per_verify(3, 0)
    with pytest.raises(ValueError, match="times must be positive"):
        gain(2.0, 0.0, 1.0)
