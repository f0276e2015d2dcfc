from __future__ import annotations

import pytest
import torch

from xspec_runtime import metrics as m


def test_worked_examples():
    assert m.tokens_per_verify(49, 14) == 3.5
    assert m.acceptance_rate(3, 10) == 0.3
    assert m.acceptance_rate(0, 0) is None
    assert m.accept_histogram([2, 0, 2, 4]) == {0: 1, 1: 0, 2: 2, 3: 0, 4: 1}
    assert m.accept_histogram([]) == {}
    assert m.gain(3.0, 21.0, 14.0) == pytest.approx(2.0)
    assert m.accepted_prefix([4, 0, 5]) == 3.0
    assert m.accepted_prefix([]) is None


def test_position_match_leaves_out_the_given_token_and_counts_short_drafts_as_misses():
    assert m.position_match([9, 1, 2], [9, 1, 3, 4, 5]) == 0.25
    assert m.position_match([9, 1], [9, 1], start=0) == 1.0
    assert m.position_match([1], [1]) is None


def test_a_beginning_of_sequence_id_is_no_prediction():
    assert m.without_bos([1, 5, 1]) == [5, 1]
    assert m.without_bos([5, 1]) == [5, 1]
    assert m.without_bos([]) == []
    draft, target = [1, 7, 8], [1, 3, 8, 4, 4]
    assert m.published_acceptance(draft, target, bos=None)["acceptance_rate"] == 2 / 5
    assert m.published_acceptance(draft, target) == {
        "acceptance_rate": 1 / 4,
        "matched_tokens": 1,
        "total_tokens": 4,
        "draft_tokens": 2,
        "method": "token_level_matching",
    }


def test_a_shift_moves_the_comparison():
    adapted, target = [5, 6, 9, 8], [4, 5, 6, 7, 8]
    assert m.match_rate(adapted, target) == 0.0
    assert m.match_rate(adapted, target, 1) == 3 / 4
    assert m.consecutive_matches(adapted, target) == 0
    assert m.consecutive_matches(adapted, target, 1) == 2
    assert m.match_rate([5, 6, 9, 9], [4, 5, 6], 1) == 1.0, "over the shorter text"
    assert m.match_rate([], [1, 2]) is None
    assert m.published_run(adapted, target, 1) == {
        "consecutive_matches": 2,
        "total_matches": 3,
        "total_tokens": 4,
        "acceptance_rate": 0.75,
    }


def test_first_token_and_top_k():
    pairs = [([5], [4, 5]), ([], [4, 5]), ([4], [4, 6]), ([9], [4])]
    assert m.first_token_accuracy(pairs, 1) == 1 / 3, "the last target has no such token"
    assert m.first_token_accuracy(pairs) == 1 / 4
    assert m.first_token_accuracy([]) is None
    ranked = [[1, 2], [], [3, 4, 5]]
    assert m.top_k_accuracy(ranked, [1, 1, 5]) == 1 / 3
    assert m.top_k_accuracy(ranked, [2, 1, 5], 3) == 2 / 3
    assert m.top_k_accuracy([], []) is None
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        m.top_k_accuracy(ranked, [1, 1, 1], 0)


def test_acceptance_by_depth_counts_only_what_was_at_stake():
    # Chains of 2, 2, 2 and 1 drafts of which 2, 0, 1 and 1 were accepted.
    assert m.acceptance_by_depth([2, 0, 1, 1], [2, 2, 2, 1]) == [3 / 4, 1 / 2]
    assert m.acceptance_by_depth([0, 0], [0, 0]) == []
    with pytest.raises(ValueError, match="3 of 2 proposed"):
        m.acceptance_by_depth([3], [2])


def test_acceptance_by_depth_of_independent_drafts_gives_the_expected_tokens(rng):
    alpha, gamma = 0.7, 4
    accepted = []
    for _ in range(20_000):
        got = 0
        while got < gamma and rng.random() < alpha:
            got += 1
        accepted.append(got)
    for share in m.acceptance_by_depth(accepted, [gamma] * len(accepted)):
        assert share == pytest.approx(alpha, abs=0.02)
    mean = sum(accepted) / len(accepted)
    assert mean + 1 == pytest.approx(m.expected_tokens(alpha, gamma), abs=0.05)


def test_expected_tokens():
    assert m.expected_tokens(0.5, 5) == pytest.approx((1 - 0.5**6) / 0.5)
    assert m.expected_tokens(1.0, 5) == 6.0
    assert m.expected_tokens(0.0, 5) == 1.0
    with pytest.raises(ValueError, match="alpha must be from 0 to 1"):
        m.expected_tokens(1.5, 5)


def test_speedups_of_totals_and_of_samples_differ():
    plain, ours = [10.0, 1000.0], [1.0, 1000.0]
    assert m.speedup_of_totals(plain, ours) == pytest.approx(1010 / 1001)
    assert m.mean_of_ratios(plain, ours) == 5.5
    for speedup in (m.speedup_of_totals, m.mean_of_ratios):
        with pytest.raises(ValueError, match="got 2 of plain decoding and 1 of ours"):
            speedup(plain, [1.0])
        with pytest.raises(ValueError, match="positive"):
            speedup(plain, [1.0, 0.0])


def test_similarity_is_counted_over_valid_positions():
    target = torch.tensor([[[1.0, 0.0]] * 4, [[0.0, 2.0]] * 4])
    predicted = target.clone()
    predicted[0, 2] = torch.tensor([1.0, 1.0])
    predicted[1, 0] = torch.tensor([0.0, -1.0])
    similarity = m.cosine(predicted.bfloat16(), target)
    assert similarity[0, 2] == pytest.approx(2**-0.5, abs=1e-3)
    assert similarity[1, 0] == -1.0
    assert m.accept_at(similarity, 0.9) == 6 / 8
    assert m.accept_at(similarity, 0.9, [4, 1]) == pytest.approx(3 / 5)
    assert m.accept_at(similarity, 0.9, [0, 0]) is None
    assert m.consecutive_similar(similarity, 0.9) == [2, 0]
    assert m.consecutive_similar(similarity, 0.5, [3, 4]) == [3, 0]
    found = m.published_similarity(similarity, [4, 1])
    assert set(found) == {"cos_sim", "accept_80", "accept_85", "accept_90", "accept_95"}
    assert found["accept_90"] == pytest.approx(3 / 5)
    assert found["cos_sim"] == pytest.approx((3 + 2**-0.5 - 1) / 5, abs=1e-3)
    with pytest.raises(ValueError, match="one shape"):
        m.cosine(target, target[:1])
    with pytest.raises(ValueError, match=r"lengths must be 2 numbers from 0 to 4, got \[5, 1\]"):
        m.accept_at(similarity, 0.9, [5, 1])


def test_verify_cost_recovers_what_made_the_times(rng):
    tokens = [rng.randint(20, 50) for _ in range(40)]
    accepted = [rng.randint(0, 12) for _ in tokens]
    step, verify = 15.0, 69.0
    # The verify gives what it accepts and one token, the first token is the prefill's.
    times = [verify + step * (n - 1 - a - 1) for n, a in zip(tokens, accepted, strict=True)]
    found = m.verify_cost(times, tokens, accepted)
    assert found.step == pytest.approx(step) and found.verify == pytest.approx(verify)
    with pytest.raises(ValueError, match="answers of different lengths"):
        m.verify_cost([1.0, 1.0], [5, 5], [0, 0])


def test_impossible_counts():
    with pytest.raises(ValueError, match="at least one verify, got 0"):
        m.tokens_per_verify(3, 0)
    with pytest.raises(ValueError, match="times must be positive"):
        m.gain(2.0, 0.0, 1.0)
