"""`xspec train lora` and `xspec train lm-head`: the draft model itself, tuned on the target."""

from __future__ import annotations

from collections.abc import Callable
from inspect import Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from ..cli import command, progress_bar
from . import train_run as run_of
from .train import train

if TYPE_CHECKING:
    from ..adapters.training.draft_tuning import Lora

PairsFile = Annotated[
    Path, typer.Argument(help="Recorded pairs (.jsonl, or .json of `xspec extract`).")
]
Draft = Annotated[
    str, typer.Option(help="draft_raw or draft of the embedded pair, or a model's folder.")
]
Target = Annotated[
    str, typer.Option(help="Of a text draft: the target's folder. With --states: whose head.")
]
DatasetDir = Annotated[
    Path | None, typer.Option(help="Of the events, where PAIRS does not name it.")
]
Scenes = Annotated[
    int, typer.Option(help="Write the pairs of so many procedural scenes to PAIRS first.")
]
Prompts = Annotated[
    Path | None, typer.Option(help="Text draft: answer these, one a line, into PAIRS first.")
]
NewTokens = Annotated[int, typer.Option(help="Of answers to --prompts.")]
StatesDir = Annotated[
    Path | None, typer.Option(help="The target's states of the same answers, for --kl-weight.")
]
KlWeight = Annotated[float, typer.Option(help="Of the divergence from the target.")]
Dtype = Annotated[str, typer.Option(help="Of the draft: float32, bfloat16 or float16.")]
HiddenShare = Annotated[float, typer.Option(help="Of answers whose events are hidden.")]
LESS_MEMORY = "raise --gradient-accumulation, or take --dtype bfloat16"


@command(train, LESS_MEMORY)
def lora(
    pairs: PairsFile,
    output_dir: run_of.OutputDir,
    draft: Draft = "draft_raw",
    target: Target = "",
    dataset_dir: DatasetDir = None,
    scenes: Scenes = 0,
    prompts: Prompts = None,
    max_new_tokens: NewTokens = 128,
    states: StatesDir = None,
    kl_weight: KlWeight = 0.0,
    lora_rank: Annotated[int, typer.Option(help="Of the changes.")] = 16,
    lora_alpha: Annotated[float, typer.Option(help="They are scaled by alpha / rank.")] = 32.0,
    lora_dropout: Annotated[float, typer.Option(help="Of what they read.")] = 0.05,
    lora_modules: Annotated[str, typer.Option(help="Layers that are changed.")] = (
        "q_proj,k_proj,v_proj,o_proj"
    ),
    num_epochs: run_of.NumEpochs = 10,
    batch_size: run_of.BatchSize = 16,
    learning_rate: run_of.LearningRate = 1e-3,
    early_stopping: run_of.EarlyStopping = 3,
    val_split: run_of.ValSplit = 0.1,
    hidden_share: HiddenShare = 0.3,
    position_decay: run_of.PositionDecay = 1.0,
    gradient_accumulation: run_of.Accumulation = 1,
    device: run_of.Device = "cpu",
    dtype: Dtype = "float32",
    seed: run_of.Seed = 0,
    threads: run_of.Threads = 1,
) -> None:
    """Tune a draft by low-rank changes of its attention (peft), merged into its weights in the end;
    an interrupted run goes on where it stopped.
    """
    values = locals()
    from ..adapters.training.draft_folder import L6
    from ..adapters.training.draft_tuning import Lora, import_peft

    import_peft()
    modules = tuple(name.strip() for name in lora_modules.split(",") if name.strip())
    with run_of.options_named():
        lora = Lora(lora_rank, lora_alpha, lora_dropout, modules)
    _tune(L6, values, lora)


def _options_of(command: Callable[..., None], without: str) -> Callable[..., Any]:
    """Gives a function that takes keywords the options of `command`, less those whose names begin
    with `without`.
    """
    given = signature(command, eval_str=True).parameters.values()
    kept = [option for option in given if not option.name.startswith(without)]

    def give(function: Callable[..., None]) -> Callable[..., None]:
        function.__signature__ = Signature(kept)
        function.__annotations__ = {option.name: option.annotation for option in kept}
        return function

    return give


@command(train, LESS_MEMORY)
@_options_of(lora, without="lora_")
def lm_head(**values: Any) -> None:
    """Tune the language-model head of a draft, which gets one of its own where it shared its
    embeddings; an interrupted run goes on where it stopped.
    """
    from ..adapters.training.draft_folder import L6_HEAD

    _tune(L6_HEAD, values, None)


def _tune(level: str, values: dict[str, Any], lora: Lora | None) -> None:
    import transformers

    from ..adapters.training.draft_answers import open_draft_answers
    from ..adapters.training.draft_folder import load_draft, save_draft
    from ..adapters.training.draft_tuning import DraftTraining, tune_draft
    from ..adapters.training.loop import split_rows
    from ..e2e_options import DTYPES
    from ..inputs import check_device

    with run_of.options_named():
        plan = DraftTraining(
            values["num_epochs"], values["batch_size"], values["learning_rate"],
            values["early_stopping"], values["val_split"], values["hidden_share"],
            values["position_decay"], values["seed"], values["gradient_accumulation"],
            kl_weight=values["kl_weight"],
        )  # fmt: skip
    if values["dtype"] not in DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, got {values['dtype']!r}")
    check_device(values["device"])
    if plan.kl_weight and not values["states"]:
        raise ValueError("--kl-weight needs --states, the target's states of the same answers")
    path, draft, output_dir = values["pairs"], values["draft"], values["output_dir"]
    run_of.prepare(output_dir, values["threads"])
    transformers.utils.logging.disable_progress_bar()
    model = load_draft(draft, values["device"], DTYPES[values["dtype"]])
    _write_pairs(path, model, values)
    answers = open_draft_answers(path, model, draft, values["target"], values["dataset_dir"])
    teacher = _teacher(values, path) if plan.kl_weight else None
    train_rows, held = split_rows(len(answers), plan.held_out, answers.folds)
    record = {
        "method": "low-rank changes, merged" if lora else "language-model head",
        "pairs": str(path),
        "digest": answers.digest,
        "draft": draft,
        "train_answers": len(train_rows),
        "val_answers": len(held),
        "split": "by drive" if answers.folds else "the last answers",
    }

    def work(state: Path, show) -> tuple[Any, list[dict[str, Any]]]:
        tuned, history, record["parameters"] = tune_draft(
            level, model, answers, plan, lora, teacher, state, show
        )
        return tuned, history

    run_of.run_training(
        level, output_dir, plan, work, record,
        lambda tuned, folder: save_draft(tuned, folder, draft),
    )  # fmt: skip


def _write_pairs(path: Path, model, values: dict[str, Any]) -> None:
    """The pairs of ``--scenes`` or of ``--prompts``, where they are asked for and not there yet."""
    from ..adapters.mini.states import scenes_missing
    from ..adapters.mini.texts import write_scene_pairs
    from ..adapters.training.draft_answers import write_prompt_pairs
    from ..files import read_lines

    scenes, prompts = values["scenes"], values["prompts"]
    missing = scenes_missing(path, scenes)
    if not missing and (path.exists() or not prompts):
        return
    run_of.alone("write the pairs of --scenes or --prompts")
    if scenes:
        with Console(stderr=True).status(f"answers to {scenes} scenes"):
            write_scene_pairs(path, scenes)
        return
    if not values["target"]:
        raise ValueError("--prompts needs --target, the folder of the model that answers them")
    lines = read_lines(prompts)
    with progress_bar("answers") as show:
        target = Path(values["target"])
        write_prompt_pairs(path, target, model, lines, values["max_new_tokens"], show)


def _teacher(values: dict[str, Any], path: Path):
    from ..adapters.training.draft_tuning import Teacher
    from ..adapters.training.states import open_states, read_head

    head = read_head(values["target"] or "mini")
    return Teacher(open_states(values["states"], head, path), head)
