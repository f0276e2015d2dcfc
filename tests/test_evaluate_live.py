from __future__ import annotations

import pytest

from xspec_runtime.evaluate.live import LiveScenes
from xspec_runtime.evaluate.report import evaluate_markdown, lines_of
from xspec_runtime.evaluate.run import EvaluateOptions, evaluate
from xspec_runtime.replay.arms import SOURCES, Variant


def test_live_sources_draft_for_the_embedded_pair():
    """Every answer is checked against plain decoding as it is measured."""
    options = EvaluateOptions(scenes=1, folds=1, rows=(12,), sources="memory tree,draft model")
    results = evaluate(options)
    assert results["complete"] and results["material"]["kind"] == "live"
    found = {
        name: next(iter(line.values()))[0] for name, line in lines_of(results, "verify").items()
    }
    hidden = found["draft model, draft hidden"]
    assert found["draft model"]["tokens_per_verify"] > hidden["tokens_per_verify"] >= 1
    assert found["combined, online"]["answers"] == 1
    assert "combined without draft model, online" in found
    assert "1 unseen scenes through the embedded pair" in evaluate_markdown(results)


def test_a_changed_answer_is_an_error():
    options = EvaluateOptions(scenes=1, folds=1, rows=(6,), sources="memory tree")
    scenes = LiveScenes(options)
    scene = scenes.items(0)[0]
    scene.answer = [*scene.answer[:-1], 3]
    drafter = SOURCES["memory tree"].make(scenes.training(0), Variant(6, 5))
    with pytest.raises(RuntimeError, match="changed the answer to scene 0"):
        scenes.decode(drafter, scene, 6, hide_draft=False)
