"""Every published option of the adapters' programs exists, under its name or one that is listed."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest
import typer

from running import bench_script
from xspec_runtime.commands import app

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs" / "adapters.md"
# Of https://github.com/xifan-zhang/EventGPT.
PUBLISHED = {
    "train_and_evaluate.py": "train_benchmark test_benchmark output_dir task_name num_epochs "
    "batch_size learning_rate max_train_samples device early_stopping",
    "train_hidden_adapter.py": "train_data val_data val_split adapter_level bottleneck_dim "
    "num_blocks num_heads num_layers ffn_dim num_epochs batch_size learning_rate early_stopping "
    "vlm_only",
    "train_lora_adapter.py": "lora_rank lora_alpha lora_dropout token_loss_weight lm_head_path "
    "gradient_accumulation val_chunks val_dataset_dir",
    "train_eagle_fusion.py": "cached_dir output_dir hidden_dim num_fusion_layers "
    "num_attention_heads use_kl_loss kl_weight early_stopping",
    "extract_tokens_train.py": "dataset_dir output_file questions_file single_question "
    "max_questions max_samples max_new_tokens extract_hidden_states",
    "extract_hidden_states.py": "split chunked chunk_size quant duration max_questions resume "
    "save_interval existing_chunks event_image_key",
    "extract_vl_lm_head.py": "model_id output_path",
    "measure_feature_acceptance.py": "checkpoint test_data lm_head batch_size egpt_prefill_ms "
    "egpt_per_token_ms vl_prefill_ms vl_per_token_ms adapter_latency_ms gamma_decode vlm_only",
    "eval_two_phase.py": "prefill_checkpoint decode_checkpoint decode_vlm_only gamma_decode "
    "no_prefill label",
    "benchmark_e2e_wallclock.py": "dataset_dir adapter_dir max_samples max_new_tokens gamma warmup "
    "questions_file output_dir configs event_image_key",
    "benchmark_e2e_sd.py": "adapter_checkpoint gamma_decode",
    "run_full_benchmark.py": "max_samples num_questions max_tokens output_dir",
    "evaluate_sd_outputs.py": "max_samples max_tokens max_draft adapter_path num_questions",
    "prefill_then_verify.py": "max_draft_tokens",
    "benchmark_parallel_prefill_5stages.py": "dataset_dir max_samples max_new_tokens output_dir "
    "device use_token_adapter token_adapter_path",
    "tokenizer alignment": "eventgpt_path videollava_path test_texts",
}


@cache
def listed() -> dict[tuple[str, str], tuple[str, str]]:
    """(program, option) -> (command, what the table says), of the documentation."""
    found = {}
    for line in DOCS.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) != 4 or not cells[1].startswith("`--"):
            continue
        program, options, command, name = cells
        for option in re.findall(r"`--(\w+)`", options):
            found[program.strip("`"), option] = command.strip("`"), name
    return found


@cache
def names_of(command: str) -> frozenset[str]:
    """Options of a command, and its arguments in capitals."""
    if command.endswith(".py"):
        found = typer.main.get_command(bench_script(Path(command).stem).app)
    else:
        found = typer.main.get_command(app)
        for part in command.removeprefix("xspec ").split():
            found = found.commands[part]
    names = (name for parameter in found.params for name in parameter.opts)
    return frozenset(name if name.startswith("--") else name.upper() for name in names)


@pytest.mark.parametrize("program", list(PUBLISHED))
def test_every_published_option_has_its_name(program):
    for option in PUBLISHED[program].split():
        assert (program, option) in listed(), f"{program} --{option} is not in {DOCS.name}"
        command, said = listed()[program, option]
        if command == "none":
            assert said
            continue
        same = said == "the same"
        here = [f"--{option.replace('_', '-')}"] if same else re.findall(r"`([^`]+)`", said)
        assert here and set(here) <= names_of(command), f"{command} lacks {here} for --{option}"


def test_the_table_lists_nothing_else():
    published = {(p, option) for p, options in PUBLISHED.items() for option in options.split()}
    assert set(listed()) == published


def test_the_walk_notices_a_missing_name():
    assert "--lora-rank" in names_of("xspec train lora")
    assert "--lora-rank" not in names_of("xspec train lm-head")
    assert "PAIRS" in names_of("xspec train token") and "--adapters" in names_of("bench/e2e.py")
