"""An example of every command, as docs/commands.md shows it; a test parses them all."""

from __future__ import annotations

EXAMPLES = {
    "xspec analyze": "xspec analyze states_test --run runs --level L4,B1",
    "xspec ask": 'xspec ask "What is happening in this scene?" --events clip.npy --video clip.mp4',
    "xspec convert": "xspec convert EventGPT-7b eventgpt-7b --clip clip-vit-large-patch14-336",
    "xspec dataset check": "xspec dataset check data --duration 1s --read",
    "xspec dataset generate": "xspec dataset generate data --durations 500ms,1s --clips 3",
    "xspec doctor": "xspec doctor",
    "xspec evaluate": "xspec evaluate pairs.jsonl --rows 6,16 --limit 200",
    "xspec extract": (
        "xspec extract --dataset-dir data --duration 1s --output pairs.json --states states"
    ),
    "xspec report": "xspec report time.sqlite --json figures.json",
    "xspec score": "xspec score states_test --run runs --level L4",
    "xspec stages": "xspec stages --dataset-dir data --duration all --max-new-tokens 20,50,100",
    "xspec star": "xspec star runs/l4",
    "xspec tokens": "xspec tokens pairs.json --tokenizer mini --inspect inspect",
    "xspec train head": "xspec train head pairs.jsonl head.safetensors --num-epochs 14",
    "xspec train hidden": (
        "xspec train hidden --states states --pairs pairs.json --level L4 --output-dir runs/l4"
    ),
    "xspec train lm-head": "xspec train lm-head pairs.json --output-dir runs/lm_head",
    "xspec train lora": "xspec train lora pairs.json --output-dir runs/lora --lora-rank 16",
    "xspec train token": "xspec train token pairs.jsonl --output-dir runs/token",
    "xspec vocab": "xspec vocab eventgpt-7b Video-LLaVA-7B-hf --apply pairs.json",
    "python bench/compile_table.py": "python bench/compile_table.py --check",
    "python bench/cost_model.py": "python bench/cost_model.py --card h200,4090 --rows 1,22,64",
    "python bench/drop_in.py": (
        "python bench/drop_in.py --target build/smollm2 --prompts bench/prompts/grounded.json "
        "--samples 6"
    ),
    "python bench/e2e.py": "python bench/e2e.py --gamma 5 --samples 8",
    "python bench/full_size.py": "python bench/full_size.py --weights nf4 --rows 22",
    "python bench/gpu_suite.py": "python bench/gpu_suite.py --out results/gpu",
    "python bench/memory.py": "python bench/memory.py --tokens 100000 --rows 6,16",
    "python bench/nf4.py": "python bench/nf4.py --dry-run",
    "python bench/publish.py": "python bench/publish.py --check",
    "python bench/reference.py": "python bench/reference.py --check",
    "python bench/regret.py": "python bench/regret.py --samples 8 --repeats 3",
    "python bench/replay.py": "python bench/replay.py pairs.jsonl --rows 6,16 --json replay.json",
    "python bench/smollm2.py": "python bench/smollm2.py --to build/smollm2",
    "python bench/soak.py": "python bench/soak.py --minutes 2 --seed 7",
    "python bench/stages.py": "python bench/stages.py --dataset-dir data --duration 1s",
    "python bench/verify.py": "python bench/verify.py --config mini --rows 1,6,22",
}
