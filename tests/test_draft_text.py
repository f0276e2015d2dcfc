"""The draft's text as a source: places found again, trust learned, no look ahead."""

from __future__ import annotations

import pytest

from xspec_runtime.drafters.base import Drafter, Request
from xspec_runtime.drafters.draft_text import TRUST, DraftTextDrafter

TEXT = [1, 2, 3, 4, 5, 6, 2, 3, 9, 8]


def drafter(text: list[int] | None = None) -> DraftTextDrafter:
    made = DraftTextDrafter(lambda request: TEXT if text is None else text)
    made.begin(Request())
    return made


def paths(tree) -> list[list[int]]:
    leaves = set(range(1, len(tree))) - set(tree.parent_idx)
    found = []
    for node in sorted(leaves):
        path = []
        while node:
            path.insert(0, tree.tokens[node])
            node = tree.parent_idx[node]
        found.append(path)
    return found


def test_the_text_goes_on_behind_the_place_that_agrees_most():
    made = drafter()
    assert isinstance(made, Drafter)
    assert paths(made.propose([7, 6, 2, 3], 3)) == [[9, 8]]
    tree = drafter().propose([1, 2, 3], 64)
    assert paths(tree) == [[4, 5, 6, 2, 3, 9, 8], [9, 8]]
    assert tree.scores[1] == pytest.approx(TRUST[2])


def test_found_again_after_a_mismatch():
    made = drafter()
    assert paths(made.propose([1], 4)) == [[2, 3, 4]]
    assert len(made.propose([1, 77], 4)) == 1
    assert paths(made.propose([1, 77, 4], 3)) == [[5, 6]]


def test_trust_follows_what_the_target_does():
    made = drafter()
    first = made.propose([1], 2).scores[1]
    for _ in range(40):
        made.begin(Request())
        made.propose([1], 2)
        made.end([1, 2, 3, 4, 5, 6])
    made.begin(Request())
    trusted = made.propose([1], 2).scores[1]
    for _ in range(100):
        made.begin(Request())
        made.end([1, 50, 1, 50, 1, 50])
    made.begin(Request())
    assert first < trusted and made.propose([1], 2).scores[1] < trusted / 3


def test_no_proposal_depends_on_later_tokens(rng):
    for _ in range(20):
        text = [rng.randrange(5) for _ in range(30)]
        answer = [rng.randrange(5) for _ in range(20)]
        cut = rng.randint(1, 19)
        other = answer[:cut] + [rng.randrange(5) for _ in range(20 - cut)]
        one, two = drafter(text), drafter(text)
        for known in range(1, cut + 1):
            assert one.propose(answer[:known], 9) == two.propose(other[:known], 9)


def test_rows_and_bad_calls(rng):
    text = [rng.randrange(4) for _ in range(40)]
    made = drafter(text)
    for known in range(1, 30):
        tree = made.propose(text[:known], 1 + known % 7)
        assert 1 <= len(tree) <= 1 + known % 7
    with pytest.raises(ValueError, match="at least 29 tokens, got 2; call begin first"):
        made.propose([1, 2], 4)
    made.end([])
    assert len(drafter([]).propose([1, 2], 8)) == 1
    with pytest.raises(ValueError, match="at least 1 tokens, got 0"):
        drafter().propose([], 8)
