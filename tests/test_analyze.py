"""The analysis of adapters of states: figures by hand, chains as the drafter's, refusals, files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from running import bench_script, xspec
from xspec_runtime.adapters.alignment import STATE_LEVELS
from xspec_runtime.adapters.analysis.chains import (
    Chains,
    chains,
    predicted_features,
    replay,
    viability,
)
from xspec_runtime.adapters.analysis.published import (
    acceptance_metrics,
    comparison_markdown,
    position_stats,
)
from xspec_runtime.adapters.analysis.report import analysis_markdown, hidden_markdown
from xspec_runtime.adapters.analysis.run import find_adapters
from xspec_runtime.adapters.analysis.steps import (
    Compared,
    compare,
    correlation,
    cosine_curve,
    run_lengths,
    split_gap,
)
from xspec_runtime.adapters.eagle import EagleConfig, EagleFusion
from xspec_runtime.adapters.hidden import READS_DRAFT, HiddenAdapter, HiddenAdapterConfig
from xspec_runtime.adapters.scoring.steps import score
from xspec_runtime.adapters.training.runs import write_run
from xspec_runtime.adapters.training.states import ABSENT, States, open_states
from xspec_runtime.drafters.base import Request
from xspec_runtime.drafters.hidden import HiddenDrafter
from xspec_runtime.extract import StateFolder

ROOT = Path(__file__).resolve().parent.parent
WIDTH, DRAFT, VOCAB, GAMMA = 8, 6, 3, 4
HISTORY = [{"epoch": 1, **dict.fromkeys(
    ("train_loss", "val_loss", "token_match", "consecutive_tokens", "cos_sim", "accept_90",
     "match_above_90"), 0.5)}]  # fmt: skip


def material(seed: int = 0, count: int = 12) -> tuple[States, torch.Tensor]:
    """Random states; with so few tokens, what an untrained adapter proposes is often right."""
    generator = torch.Generator().manual_seed(seed)
    head = torch.randn(VOCAB, WIDTH, generator=torch.Generator().manual_seed(9))
    target = torch.randn(count, 10, WIDTH, generator=generator).half()
    draft = torch.randn(count, 9, DRAFT, generator=generator).half()
    lengths = torch.stack([torch.randint(2, 10, (count,), generator=generator),
                           torch.randint(1, 11, (count,), generator=generator)], 1)  # fmt: skip
    lengths[:2] = torch.tensor([[9, 10], [3, 9]])
    there = torch.arange(10) < lengths[:, 1:]
    tokens = (target.float() @ head.T).argmax(-1).masked_fill(~there, ABSENT)
    target = target.masked_fill(~there[..., None], 0)
    draft = draft.masked_fill((torch.arange(9) >= lengths[:, :1])[..., None], 0)
    return States(draft, target, lengths, tokens, None, f"digest {seed}", "a draft"), head


def adapter_of(level: str, alpha: float = 1.0) -> HiddenAdapter | EagleFusion:
    torch.manual_seed(3)
    if level == "EAGLE":
        adapter = EagleFusion(EagleConfig(VOCAB, 8, WIDTH, DRAFT, 1, 2, 16))
    else:
        sizes = {"bottleneck": 4, "wide": 8, "intermediate": 8, "heads": 2, "positions": 16}
        adapter = HiddenAdapter(HiddenAdapterConfig(level, WIDTH, DRAFT, alpha=alpha, **sizes))
    return adapter.eval().requires_grad_(False)


def compared(rows: list[list[float]], right: list[list[int]], first: int = 0) -> Compared:
    """Rows may end early; right tokens as 0 and 1."""
    width = max(map(len, rows))
    there = torch.tensor([[j < len(row) for j in range(width)] for row in rows])
    pad = [row + [0.0] * (width - len(row)) for row in rows]
    held = torch.tensor([row + [0] * (width - len(row)) for row in right]).bool()
    return Compared(first, torch.tensor(pad), held, held, {5: held, 10: held}, there)


def test_the_curve_by_hand():
    found = compared(
        [[0.99, 0.95, 0.7, 0.93, 0.93], [0.5, 0.91, 0.85]], [[1, 1, 1, 0, 1], [0, 1, 0]]
    )
    point, top = cosine_curve(found, (0.9, 0.995))
    assert point == pytest.approx({
        "tau": 0.9, "share": 5 / 8, "count": 5, "token_match": 4 / 5, "token_match_below": 1 / 3,
        "runs": 3, "run": 5 / 3, "run_right": (2 + 0 + 1) / 3, "consecutive": 1.0,
        "consecutive_right": 1.0,
    })  # fmt: skip
    assert top["count"] == 0 and top["token_match"] is None and top["run"] is None
    assert run_lengths(torch.tensor([[1, 1, 0, 1]]).bool()).tolist() == [[2, 1, 0, 1]]
    # Similarity is not acceptance: all alike, none right.
    alike = compared([[0.99, 0.98]], [[0, 0]])
    assert cosine_curve(alike, (0.9,))[0]["share"] == 1.0
    assert cosine_curve(alike, (0.9,))[0]["token_match"] == 0.0 and correlation(alike) is None


def test_acceptance_by_predicted_features_by_hand():
    # One answer of six tokens, three drafts a chain: behind 1, 2, ... 5 tokens.
    found = Chains(
        torch.tensor([[0, 3, 1, 0, 2, 1]]),
        torch.tensor([[0, 3, 3, 3, 2, 1]]),
        torch.tensor([[0, 3, 3, 3, 3, 3]]),
        torch.tensor([6]),
    )
    # First drafts: all but the chain behind 3. Second: of 4 right ones 3 have another, 2 right.
    # Third: of 2 right ones one has another, right.
    points = predicted_features(found, 3)
    assert [(p["drafts"], p["accepted"]) for p in points] == [(5, 4), (3, 2), (1, 1)]
    assert [p["alpha"] for p in points] == pytest.approx([0.8, 2 / 3, 1.0])
    # Rounds: behind 1 three are accepted and one more is known, behind 5 one.
    assert replay(found) == pytest.approx({
        "verifies": 2, "acceptance_rate": 4 / 6, "tokens_accepted": 2.0, "tokens_per_verify": 2.5,
        "first_token": 1.0,
    })  # fmt: skip
    nothing = Chains(*torch.zeros(3, 1, 4, dtype=torch.long), torch.tensor([1]))
    assert replay(nothing)["acceptance_rate"] is None and replay(nothing)["first_token"] is None
    assert predicted_features(nothing, 1)[0]["alpha"] is None


def counting(shift: int = 0) -> tuple[HiddenAdapter, States, torch.Tensor]:
    """B1 on the answer 0, 1, 2 ... as one-hot states. Its predictions are shorter than what they
    are made of: a token with two of them before it is wrong.
    """
    head = torch.eye(12)
    tokens = torch.arange(8)[None]
    states = States(torch.zeros(1, 1, DRAFT), head[tokens], torch.tensor([[1, 8]]), tokens, None,
                    "", "")  # fmt: skip
    adapter = HiddenAdapter(HiddenAdapterConfig("B1", 12, DRAFT, heads=2, intermediate=4))

    def forward(draft: torch.Tensor | None, target: torch.Tensor) -> torch.Tensor:
        size, token = target.max(-1)
        wrong = (size < 0.7).long()
        return 0.8 * size[..., None] * head[(token + 1 + shift + wrong) % 12]

    adapter.forward = forward
    return adapter, states, head


def test_predictions_are_read_where_states_are_not_known():
    adapter, states, head = counting()
    found = chains(adapter, states, head, 4)
    assert found.accepted.tolist() == [[0, 2, 2, 2, 2, 2, 2, 1]]
    alphas = [point["alpha"] for point in predicted_features(found, 4)]
    assert alphas == [1.0, 1.0, 0.0, None]
    assert replay(found)["tokens_per_verify"] == pytest.approx(7 / 3)
    assert compare(adapter, states, head).right.sum() == 7


@pytest.mark.parametrize("shift", [-1, 1])
def test_a_shift_by_one_is_seen(shift):
    adapter, states, head = counting(shift)
    found = chains(adapter, states, head, 4)
    assert found.accepted.sum() == 0 and replay(found)["tokens_per_verify"] == 1.0
    assert predicted_features(found, 1)[0]["alpha"] == 0.0
    assert not compare(adapter, states, head).right.any()
    goals = viability(replay(found), 1.6)
    assert [goal["met"] for goal in goals.values()] == [False, False, False, True]
    assert viability(replay(found))["speedup"]["met"] is None


@pytest.mark.parametrize("level", STATE_LEVELS)
def test_chains_are_the_drafters(level):
    """Every chain, with the draft shown and hidden, has the drafts of the runtime's drafter."""
    states, head = material()
    adapter = adapter_of(level)
    reads_draft = level in READS_DRAFT or level == "EAGLE"
    for hidden in (False, True)[: 1 + reads_draft]:
        found = chains(adapter, states, head, GAMMA, hidden)
        assert found.accepted.max() > (0 if level in ("L1", "L2", "L3", "L4") else 1)
        for i, (draft_length, length) in enumerate(states.lengths.tolist()):
            drafter = HiddenDrafter(
                adapter, GAMMA, head, lambda _, i=i, n=draft_length: states.draft[i, :n].float(),
                lambda count, i=i: states.target[i, :count].float(), hidden,
            )  # fmt: skip
            drafter.begin(Request())
            answer = states.tokens[i].tolist()
            for known in range(1, length):
                drafts = drafter.propose(answer[:known], GAMMA + 1).tokens[1:]
                wanted = answer[known:length]
                right = next((j for j, (a, b) in enumerate(zip(drafts, wanted, strict=False))
                              if a != b), min(len(drafts), len(wanted)))  # fmt: skip
                assert found.proposed[i, known] == len(drafts), (i, known)
                assert found.reach[i, known] == min(len(drafts), len(wanted))
                assert found.accepted[i, known] == right, (i, known, hidden)
            assert found.proposed[i, length:].sum() == 0 == found.proposed[i, 0]
    with pytest.raises(ValueError, match="gamma"):
        chains(adapter, states, head, 0)


def test_the_parts_of_the_gap_add_up():
    half = [[0.5] * 4]
    found = {
        "L4": {"shown": compared(half, [[1, 1, 0, 0]]), "hidden": compared(half, [[0, 1, 0, 0]])},
        "B1": {"shown": compared(half, [[1, 1, 0, 1]], 1)},
        "L5F": {"shown": compared(half, [[1, 1, 1, 1]], 1),
                "hidden": compared(half, [[1, 1, 1, 0]], 1)},
    }  # fmt: skip
    gap = split_gap(found)
    # Positions 1 to 3: L4 from its second column on.
    assert gap["positions"] == 3
    third = 1 / 3
    for level, parts in (
        ("L4", {"unread": third, "draft": 0.0, "modality": third, "capacity": third}),
        ("B1", {"unread": 2 * third, "capacity": third}),
        ("L5F", {"unread": 2 * third, "network": third, "draft": 0.0, "capacity": 0.0}),
    ):
        assert gap["levels"][level] == pytest.approx(parts)
        assert sum(gap["levels"][level].values()) == pytest.approx(1.0)
    del found["B1"]
    alone = split_gap(found)["levels"]
    assert alone["L4"]["modality"] is None and "network" not in alone["L5F"]
    far = {"L4": {"shown": compared([[0.5]], [[1]])}, "B1": {"shown": compared([[0.5]], [[1]], 1)}}
    assert split_gap(far) == {"positions": 0, "levels": {}}


def test_the_published_form():
    states, head = material()
    adapter = adapter_of("L4")
    found = compare(adapter, states, head)
    metrics = acceptance_metrics(found, WIDTH, 5)
    known = score(adapter, states, torch.arange(len(states)), head)
    same = {"token_top1_match": "token_match", "token_consecutive_mean": "consecutive_tokens",
            "cos_sim_mean": "cos_sim", "accept_90": "accept_90", "accept_80": "accept_80",
            "consecutive_mean_90": "consecutive_90", "cosim_90_token_match": "match_above_90",
            "cosim_token_pearson_r": "correlation"}  # fmt: skip
    assert {name: metrics[name] for name in same} == pytest.approx(
        {name: known[own] for name, own in same.items()}
    )
    for key in ("hidden_dim", "consecutive_median_95", "num_hidden_tokens_min", "sd_gamma_decode",
                "sd_accept_rate_decode_gamma5", "position_accept_90", "position_token_accept",
                "token_top10_match", "cosim_98_count", "token_sd_decode_accept_rate"):  # fmt: skip
        assert key in metrics
    assert not [key for key in metrics if "speedup" in key or "_ms" in key]
    stats = position_stats(found)
    assert stats[0]["num_samples"] == len(states) and stats[-1]["position"] == len(stats) - 1
    json.dumps([metrics, stats, acceptance_metrics(compared([[0.9]], [[1]]), 4)], allow_nan=False)
    text = comparison_markdown(metrics, 0.81)
    assert "| E2E Speedup | - | 0.81x |" in text and "similarity is no acceptance" in text


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """Test states, the head, and untrained adapters in the folders that training writes."""
    folder = tmp_path_factory.mktemp("analyze")
    for name, seed in (("train", 1), ("test", 0)):
        states, head = material(seed)
        store, keys = StateFolder(folder / name), list(map(str, range(len(states))))
        for i, (of_draft, of_target) in enumerate(states.lengths.tolist()):
            store.add(keys[i], {"draft": states.draft[i, :of_draft].contiguous(),
                                "target": states.target[i, :of_target].contiguous()})  # fmt: skip
        store.pack(keys, 5, {"draft": "a draft"})
    save_file({"lm_head.weight": head}, folder / "head.safetensors")
    digest = open_states(folder / "train", head).digest
    for level in ("L4", "B1", "EAGLE"):
        record = {"command": "c", "level": level, "train_answers": 1, "val_answers": 1,
                  "split": "s", "digest": digest, "finished": "1"}  # fmt: skip
        write_run(folder / "runs" / level, adapter_of(level), HISTORY, record)
    return folder


def options(work: Path, output: Path, *more: object) -> list[object]:
    head = work / "head.safetensors"
    return ["analyze", work / "test", "--run", work / "runs", "--target", head, "--gamma", 3,
            "--output-dir", output, *more]  # fmt: skip


def test_the_command_writes_its_folder(work, tmp_path, capsys):
    e2e = ROOT / "bench/results/hidden_e2e_cpu.json"
    assert xspec(*options(work, tmp_path, "--e2e", e2e)) == 0
    printed = capsys.readouterr().out
    assert "0-alpha" in printed and "not met" in printed
    assert {path.name for path in tmp_path.iterdir()} == {
        "results.json", "RESULTS.md", "cosine_match.png", "predicted_features.png", "gap.png",
        "L4", "B1", "EAGLE",
    }  # fmt: skip
    assert {path.name for path in (tmp_path / "L4").iterdir()} == {
        "acceptance_metrics.json", "position_stats.json", "METRICS_COMPARISON.md",
    }  # fmt: skip
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["complete"] and results["schema"] == "xspec.analysis/1"
    assert list(results["levels"]) == ["L4", "B1", "EAGLE"]
    assert set(results["levels"]["B1"]) == {"parameters", "run", "shown"}
    live = {arm["name"]: arm for arm in json.loads(e2e.read_text())["arms"]}
    shown = results["levels"]["L4"]["shown"]
    assert shown["viability"]["speedup"]["value"] == live["l4"]["speedup_total"]
    assert len(shown["alpha"]) == 3 and shown["curve"][2]["tau"] == 0.9
    assert analysis_markdown(results) in (tmp_path / "RESULTS.md").read_text()
    # A run's own folder, and a level of those there.
    assert list(find_adapters([work / "runs/B1"], VOCAB)) == ["B1"]
    assert list(find_adapters([work / "runs"], VOCAB, "EAGLE,L4", "latest")) == ["L4", "EAGLE"]


def test_bad_input_is_named_and_leaves_nothing(work, tmp_path, capsys):
    head = work / "head.safetensors"
    (tmp_path / "x.json").write_text("{}")
    for arguments, said in (
        (["analyze", work / "train", "--run", work / "runs", "--target", head], "trained the"),
        (options(work, tmp_path / "out", "--gamma", 0), "--gamma must be 1 or more, got 0"),
        (options(work, tmp_path / "out", "--level", "L9"), "'L9'"),
        (options(work, tmp_path / "out", "--level", "L2"), "no run of L2"),
        (options(work, tmp_path / "out", "--run", work / "runs/B1"), "name one of them"),
        (options(work, tmp_path / "out", "--e2e", tmp_path / "x.json"), "no result of bench/e2e"),
        (["analyze", work / "test", "--run", tmp_path, "--target", head], "no run of"),
        (["analyze", tmp_path / "no", "--run", work / "runs", "--target", head], "no"),
    ):
        if "--output-dir" not in arguments:
            arguments += ["--output-dir", tmp_path / "out"]
        assert xspec(*arguments) == 2
        assert said in " ".join(capsys.readouterr().err.split()), said
    assert not (tmp_path / "out").exists()


def test_ctrl_c_writes_nothing(work, tmp_path, monkeypatch, capsys):
    from xspec_runtime.adapters.analysis import run as analysis_run

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(analysis_run, "chains", stop)
    assert xspec(*options(work, tmp_path / "out")) == 130
    assert "interrupted" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_table_takes_any_arm():
    def arm(name: str, **values: object) -> dict:
        return {"name": name, "acceptance_rate": 0.5, "tokens_per_verify": 2.0, "samples": 8,
                "speedup_total": 1.5, "identical": 8, **values}  # fmt: skip

    levels = {"L4": {"parameters": 1000}, "B1": {"parameters": 234}}
    arms = [arm("target"), arm("l4"), arm("l4_hidden", tokens_per_verify=1.25), arm("l4_b1"),
            arm("l6", parameters=7), arm("ngram"),
            arm("alone_hidden", acceptance_rate=None)]  # fmt: skip
    lines = hidden_markdown({"arms": arms}, {"levels": levels}).splitlines()[2:]
    assert lines == [
        "| `l4` | 1,000 | 50.0% | 2.00 | 1.25 | 1.50x | 8/8 |",
        "| `l4_b1` | 1,234 | 50.0% | 2.00 | - | 1.50x | 8/8 |",
        "| `l6` | 7 | 50.0% | 2.00 | - | 1.50x | 8/8 |",
        "| `ngram` | - | 50.0% | 2.00 | - | 1.50x | 8/8 |",
        "| `alone_hidden` | - | - | 2.00 | - | 1.50x | 8/8 |",
    ]


@pytest.fixture(scope="module")
def publish():
    return bench_script("publish").publish


def test_the_tables_of_the_adapters_page_are_generated(publish, tmp_path):
    page = ROOT / "docs/adapters.md"
    publish(page, check=True)
    edited = tmp_path / "adapters.md"
    edited.write_text(page.read_text().replace("| `b1` |", "| `b2` |", 1))
    with pytest.raises(ValueError, match="is not what"):
        publish(edited, check=True)
    publish(edited, check=False)
    assert edited.read_text() == page.read_text()
    with pytest.raises(ValueError, match="no tables"):
        publish(ROOT / "docs" / "performance.md", check=True)
