"""The five-stage benchmark on a miniature dataset, with the embedded pair and with folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
)

from test_graphs import FakeCuda
from xspec_runtime import cli
from xspec_runtime.data.dsec import open_dataset
from xspec_runtime.data.dsec_miniature import write_miniature
from xspec_runtime.models import mini
from xspec_runtime.models.eventgpt import EventGPTConfig, EventGPTForConditionalGeneration
from xspec_runtime.models.vlm_pair import EmbeddedPair, FolderPair
from xspec_runtime.stages.clock import stage_models
from xspec_runtime.stages.record import parallel_record, statistics
from xspec_runtime.stages.run import StageOptions, _both, run_stages

PUBLISHED_PARALLEL = {
    *("egpt_prefill_complete", "vl_prefill_complete", "overlap_window", "hidden_tokens"),
    *("hidden_decode_time", "wall_clock_prefill", "wall_clock_decode", "wall_clock_total"),
    *("sequential_total", "parallel_speedup", "egpt_tokens_generated", "vl_tokens_generated"),
}
PUBLISHED_MODEL = {
    *("model", "stage1_time", "stage2_time", "stage3_time", "stage4_time", "stage5_time"),
    *("prefill_length", "output_tokens", "output_text", "num_output_tokens", "tokens_per_sec"),
    *("avg_token_time", "total_time", "prefill_complete_time", "gpu_memory_mb"),
}
PUBLISHED_ACCEPTANCE = {
    *("acceptance_rate", "matched_tokens", "total_tokens", "draft_tokens", "method"),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("dsec")
    write_miniature(root, ("500ms",), drives=1, clips=2)
    return root


def options(data: Path, out: Path, **values) -> StageOptions:
    return StageOptions(
        data, out, **({"duration": "500ms", "max_new_tokens": "6", "warmup": 0} | values)
    )


@pytest.mark.parametrize("mode", ["sequential", "overlapped"])
def test_record(mode, data, tmp_path):
    (folder,) = run_stages(options(data, tmp_path, mode=mode))
    record = json.loads((folder / "results.json").read_text())
    assert record["schema"] == "xspec.stages/1" and len(record["results"]) == 2
    first = record["results"][0]
    for model in ("eventgpt", "videollava"):
        assert set(first[model]) >= PUBLISHED_MODEL
        stages = [first[model][f"stage{i}_time"] for i in range(1, 6)]
        assert all(seconds > 0 for seconds in stages)
        assert sum(stages) == pytest.approx(first[model]["total_time"])
        assert first[model]["num_output_tokens"] == 6
    assert set(first["parallel"]) >= PUBLISHED_PARALLEL
    assert set(first["acceptance"]) >= PUBLISHED_ACCEPTANCE
    overlapped = mode == "overlapped"
    assert first["parallel"]["wall_clock_is"] == ("measured" if overlapped else "computed")
    assert (first["parallel"]["hidden_tokens_measured"] is not None) == overlapped
    page = (folder / "RESULTS.md").read_text()
    assert "against the target alone" in page and "| Stage 5 | LLM decode |" in page
    assert (folder / "stages.png").is_file() and (folder / "acceptance.png").is_file()


def test_tokens_are_those_of_plain_decoding(data):
    pair = EmbeddedPair()
    clip = open_dataset(data, "500ms").clips[1]
    for model, reference in zip(
        stage_models(pair, 8, "uniform", 1100), (pair.draft, pair.target), strict=True
    ):
        inputs = model.prepare(model.read(clip), "What moves?")
        ids = reference.generate(
            **inputs, max_new_tokens=8, do_sample=False, eos_token_id=mini.EOS, pad_token_id=0
        )
        wanted = ids[0, inputs["input_ids"].shape[1] :].tolist()
        assert model.run(clip, "What moves?").tokens == wanted


def test_sweep_resumes_and_keeps_what_is_done(data, tmp_path):
    wanted = options(data, tmp_path, max_new_tokens="3,5")
    folders = run_stages(wanted)
    assert [folder.name for folder in folders] == [
        "500ms_3tok_sequential", "500ms_5tok_sequential"
    ]  # fmt: skip
    journal = folders[0] / "samples.jsonl"
    head, first, second = journal.read_text().splitlines()
    marked = json.loads(first) | {"query": "kept"}
    # Killed within the second sample.
    journal.write_text(f"{head}\n{json.dumps(marked)}\n{second[:40]}")
    run_stages(wanted)
    results = json.loads((folders[0] / "results.json").read_text())["results"]
    assert [r["query"] == "kept" for r in results] == [True, False]
    journal.write_text(head.replace('"warmup": 0', '"warmup": 1') + "\n")
    with pytest.raises(ValueError, match="of a run with other options"):
        run_stages(wanted)


def test_a_damaged_clip_is_reported_and_left_out(data, tmp_path):
    broken = shutil.copytree(data, tmp_path / "data")
    open_dataset(broken, "500ms").clips[0].events.write_bytes(b"junk")
    (folder,) = run_stages(options(broken, tmp_path / "out"))
    record = json.loads((folder / "results.json").read_text())
    assert [r["sample_idx"] for r in record["results"]] == [1]
    assert "000000.npy" in record["errors"][0]["error"]
    for clip in open_dataset(broken, "500ms").clips:
        clip.events.write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"no sample of .* could be run: .*npy"):
        run_stages(options(broken, tmp_path / "all"))


def test_published_and_honest_speedups_differ():
    class Fake:
        started, tokens = 0.0, [1, 2, 3]

        def __init__(self, total, first):
            self.total, self.first_token = total, first
            self.stages = {"decode": total - first}
            self.emitted = [first, first + 0.1, total]

    draft, target = Fake(0.4, 0.1), Fake(1.0, 0.3)
    computed = parallel_record(draft, target, None)
    assert computed["parallel_speedup"] == pytest.approx(1.4)
    assert computed["overlap_window"] == pytest.approx(0.2)
    assert computed["hidden_tokens"] == 1
    measured = parallel_record(draft, target, 1.25)
    assert measured["hidden_tokens_measured"] == 2
    row = {
        "acceptance": {"acceptance_rate": 0.5, "accepted_prefix": 1, "matched_tokens": 1,
                       "total_tokens": 2},
        **{m: {**{f"stage{i}_time": 0.2 for i in range(1, 6)}, "total_time": 1.0,
               "num_output_tokens": 3} for m in ("eventgpt", "videollava")},
        "parallel": measured,
    }  # fmt: skip
    found = statistics([row], [1.0])["parallel"]
    assert found["parallel_speedup_avg"] == pytest.approx(1.4 / 1.25)
    assert found["speedup_against_target_alone"] == pytest.approx(0.8)


def llama() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=mini.VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, max_position_embeddings=512,
        eos_token_id=mini.EOS, bos_token_id=mini.BOS,
    )  # fmt: skip


def tower() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=1,
        image_size=28, patch_size=14,
    )  # fmt: skip


def saved(model, folder: Path) -> Path:
    model.save_pretrained(folder)
    mini.load_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["video_llava", "llava"])
def test_folders(kind, data, tmp_path, seed):
    draft = saved(
        EventGPTForConditionalGeneration(EventGPTConfig(tower(), llama(), event_token_id=0)),
        tmp_path / "draft",
    )
    ids = {"image_token_index": mini.IMAGE, "vision_feature_layer": -2}
    if kind == "llava":
        config = LlavaConfig(vision_config=tower(), text_config=llama(), **ids)
        model = LlavaForConditionalGeneration(config)
    else:
        config = VideoLlavaConfig(
            vision_config=tower(), text_config=llama(), video_token_index=mini.VIDEO, **ids
        )
        model = VideoLlavaForConditionalGeneration(config)
    target = saved(model, tmp_path / "target")
    pair = FolderPair(draft, target, dtype=torch.float32)
    frames = pair.read_video(open_dataset(data, "500ms").clips[0].video, "first-n")
    inputs = pair.target_inputs(frames, "What moves?")
    count = int((inputs["input_ids"] == (mini.IMAGE if kind == "llava" else mini.VIDEO)).sum())
    assert count == (4 if kind == "llava" else 8 * 5)
    (folder,) = run_stages(
        options(data, tmp_path / "out", draft=str(draft), target=str(target), max_samples=1)
    )
    assert json.loads((folder / "results.json").read_text())["statistics"]["n_samples"] == 1


def test_bad_options(data, tmp_path, monkeypatch, capsys):
    for values, words in (
        ({"mode": "both"}, "--mode must be one of sequential, overlapped"),
        ({"max_new_tokens": "20,x"}, "--max-new-tokens must be numbers in 2..512, got 'x'"),
        ({"max_new_tokens": "20,20"}, "--max-new-tokens names 20 more than once"),
        ({"max_samples": 0}, "--max-samples must be -1"),
        ({"warmup": -1}, r"--warmup must be in 0\.\.1024, got -1"),
        ({"threads": -1}, "--threads must be in 0"),
        ({"target": "x"}, "must both be mini"),
        ({"frames": "last"}, "--frames must be one of uniform, first-n"),
    ):
        with pytest.raises(ValueError, match=words):
            run_stages(options(data, tmp_path, **values))
    with pytest.raises(FileNotFoundError, match=r"no model: config\.json is missing"):
        saved_folder = tmp_path / "no_model"
        mini.load_tokenizer().save_pretrained(saved_folder)
        run_stages(options(data, tmp_path, target=str(saved_folder), draft=str(saved_folder)))

    def exhausted(*_):
        raise MemoryError("can't allocate memory: you tried to allocate 900 GiB")

    monkeypatch.setattr("xspec_runtime.stages.run.stage_models", exhausted)
    arguments = ["--dataset-dir", str(data), "--duration", "500ms", "--output-dir", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["xspec", "stages", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert "out of memory" in capsys.readouterr().err


def test_on_a_gpu_each_model_has_a_stream_of_its_own(monkeypatch) -> None:
    cuda, device = FakeCuda(monkeypatch), torch.device("cuda", 0)
    seen: list = []

    def run(clip, question) -> str:
        seen.append(torch.cuda.current_stream(device).cuda_stream)
        cuda.log.append("run")
        return f"{clip} {question}"

    model = SimpleNamespace(target=SimpleNamespace(device=device), run=run)
    assert _both((model, model), "clip", "why")[:2] == ("clip why", "clip why")
    assert cuda.log[:2] == ["side waits for main"] * 2
    assert len(set(seen)) == 2 and cuda.now.cuda_stream not in seen
    assert cuda.log.count("side is done") == 2
