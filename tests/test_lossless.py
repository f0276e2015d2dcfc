"""Every lossless arm against transformers' generate on the embedded pair, fp32."""

from __future__ import annotations

import pytest

from xspec_runtime.arms import HfArm
from xspec_runtime.models import mini
from xspec_runtime.workloads import OURS, PLAIN, MiniPair, Settings

SCENES = 200


@pytest.fixture(scope="module")
def pair() -> MiniPair:
    return MiniPair(Settings(gamma=5, rows=16))


@pytest.fixture(scope="module")
def truth(pair: MiniPair) -> list[tuple]:
    arm = HfArm(
        "hf_generate",
        mini.load("target"),
        True,
        max_new_tokens=pair.settings.max_new_tokens,
        eos_token_id=mini.EOS,
        pad_token_id=mini.PAD,
    )
    return [(task, arm.run(task).tokens) for task in pair.scene_tasks(SCENES)]


@pytest.mark.parametrize("arm", [PLAIN, *OURS])
def test_two_hundred_scenes_identical_to_generate(pair: MiniPair, truth, arm: str) -> None:
    decoder = pair.decoder(arm)
    different, ties, steps = [], 0, 0
    for task, expected in truth:
        out = decoder.generate(task.inputs, task.request)
        ties, steps = ties + out.near_ties, steps + len(out.tokens)
        if out.tokens != expected:
            different.append(task.name)
    print(f"{arm}: {ties} of {steps} steps with a top-2 gap below 2 ulp; different: {different}")
    assert not different
    if arm != "target":
        assert out.tokens_per_verify > 1


def test_share_of_answers_known_verbatim(pair: MiniPair, truth) -> None:
    seen = {tuple(answer) for answer in pair.answers}
    known = sum(tuple(tokens) in seen for _, tokens in truth)
    print(f"{known} of {SCENES} test answers stand verbatim among {len(seen)} training answers")
    assert known < 0.2 * SCENES
