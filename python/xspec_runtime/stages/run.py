"""A dataset through both models, sample by sample, resumable."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from time import perf_counter

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from ..data.captions import QUESTIONS
from ..data.dsec import Clip, Dataset, open_dataset, present_durations
from ..data.video import MODES as FRAME_MODES
from ..environment import environment
from ..errors import out_of_memory
from ..files import check_output, read_lines, write_json, write_text
from ..graphs import own_stream
from ..journal import Journal
from ..models.mini import decode_answer
from ..models.vlm_pair import EmbeddedPair, FolderPair, VlmPair
from .clock import StageModel, Timed, stage_models
from .record import SCHEMA, sample_record, statistics
from .report import draw, markdown

MODES = ("sequential", "overlapped")


@dataclass(frozen=True)
class StageOptions:
    """Arguments of one command; lists are separated by commas.

    Attributes:
        duration: of the datasets in `dataset_dir`, or "all".
        max_samples: clips of each dataset; -1 takes all.
        max_new_tokens: one run each.
        mode: "sequential" runs the draft, then the target; "overlapped" both at once, and the
            target once more by itself, which is what the overlap is compared with.
    """

    dataset_dir: Path
    output_dir: Path = Path("results/stages")
    duration: str = ""
    max_samples: int = -1
    max_new_tokens: str = "50"
    mode: str = "sequential"
    questions: Path | None = None
    target: str = "mini"
    draft: str = "mini"
    frames: str = "uniform"
    device: str = "cpu"
    dtype: str = "float32"
    warmup: int = 1
    threads: int = 1

    def limits(self) -> list[int]:
        """Numbers in `max_new_tokens`.

        Raises:
            ValueError: one is no number in 2..512, or there twice.
        """
        names = [name.strip() for name in self.max_new_tokens.split(",")]
        for name in names:
            if not name.isdecimal() or not 2 <= int(name) <= 512:
                raise ValueError(f"--max-new-tokens must be numbers in 2..512, got {name!r}")
            if names.count(name) > 1:
                raise ValueError(f"--max-new-tokens names {name} more than once")
        return [int(name) for name in names]

    def check(self) -> None:
        """Raise `ValueError` naming the first option that is out of range."""
        self.limits()
        for name, value, allowed in (
            ("--mode", self.mode, MODES),
            ("--frames", self.frames, FRAME_MODES),
            ("--dtype", self.dtype, ("float32", "bfloat16", "float16")),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        if self.max_samples != -1 and self.max_samples < 1:
            raise ValueError(
                f"--max-samples must be -1 (all) or at least 1, got {self.max_samples}"
            )
        for name, value in (("--warmup", self.warmup), ("--threads", self.threads)):
            if not 0 <= value <= 1024:
                raise ValueError(f"{name} must be in 0..1024, got {value}")
        if (self.target == "mini") != (self.draft == "mini"):
            raise ValueError("--target and --draft must both be mini, or both be folders")


def run_stages(options: StageOptions) -> list[Path]:
    """Run every (dataset, max_new_tokens); returns the folders with their results.

    An interrupted run goes on where it stopped when it is started again with the same options.

    Raises:
        ValueError, FileNotFoundError: an option, the dataset or a model is not usable.
    """
    options.check()
    datasets = _datasets(options)
    questions = read_lines(options.questions) if options.questions else []
    runs = [(data, limit) for data in datasets for limit in options.limits()]
    folders = [
        options.output_dir / f"{data.duration or data.folder.name}_{limit}tok_{options.mode}"
        for data, limit in runs
    ]
    for folder in folders:
        check_output(folder / "results.json")
    if options.threads:
        torch.set_num_threads(options.threads)
    pair = open_pair(options)
    for (data, limit), folder in zip(runs, folders, strict=True):
        _run_one(options, pair, data, limit, questions, folder)
    return folders


def _datasets(options: StageOptions) -> list[Dataset]:
    if options.duration != "all":
        return [open_dataset(options.dataset_dir, options.duration)]
    if not options.dataset_dir.is_dir():
        raise FileNotFoundError(f"dataset folder not found: {options.dataset_dir}")
    found = present_durations(options.dataset_dir)
    if not found:
        raise FileNotFoundError(f"{options.dataset_dir} holds no dataset of any duration")
    return [open_dataset(options.dataset_dir, duration) for duration in found]


def open_pair(options: StageOptions) -> VlmPair:
    """The models that `options` name."""
    dtype = getattr(torch, options.dtype)
    if options.target == "mini":
        return EmbeddedPair(options.device, dtype)
    return FolderPair(Path(options.draft), Path(options.target), options.device, dtype)


def _run_one(
    options: StageOptions,
    pair: VlmPair,
    data: Dataset,
    limit: int,
    questions: list[str],
    folder: Path,
) -> None:
    clips = data.clips if options.max_samples == -1 else data.clips[: options.max_samples]
    config = {
        **{k: str(v) if isinstance(v, Path) else v for k, v in asdict(options).items()},
        "max_new_tokens": limit,
        "dataset": str(data.folder),
        "num_samples": len(clips),
    }
    journal = Journal(folder / "samples.jsonl", config)
    models = stage_models(pair, limit, options.frames, _capacity(pair, limit))
    todo = [clip for clip in clips if clip.index not in journal.done]
    for clip in todo[: options.warmup]:
        # One that cannot be read is reported when its turn comes.
        _sample("sequential", pair, models, clip, _question(clip, questions))
    console = Console(stderr=True)
    columns = ("[progress.description]{task.description}", BarColumn(), MofNCompleteColumn(),
               TimeRemainingColumn())  # fmt: skip
    with journal, Progress(*columns, console=console) as bar:
        task = bar.add_task(folder.name, total=len(clips), completed=len(clips) - len(todo))
        for clip in todo:
            journal.write(_sample(options.mode, pair, models, clip, _question(clip, questions)))
            bar.advance(task)
    _write(folder, config, journal.rows)
    console.print("written:", folder, highlight=False, soft_wrap=True)


def _capacity(pair: VlmPair, limit: int) -> int:
    most = max(
        model.config.get_text_config().max_position_embeddings
        for model in (pair.draft, pair.target)
    )
    return most + limit


def _question(clip: Clip, questions: list[str]) -> str:
    if questions:
        return questions[clip.index % len(questions)]
    return clip.question or QUESTIONS[0]


def _sample(
    mode: str, pair: VlmPair, models: tuple[StageModel, StageModel], clip: Clip, question: str
) -> dict:
    wall = alone = None
    try:
        if mode == "sequential":
            draft, target = (model.run(clip, question) for model in models)
        else:
            alone = models[1].run(clip, question)
            draft, target, wall = _both(models, clip, question)
    except (ValueError, OSError, RuntimeError) as error:
        # The next sample would not fit either.
        if out_of_memory(error):
            raise
        return {"sample_idx": clip.index, "error": " ".join(str(error).split())}
    texts = [decode_answer(list(t.tokens), pair.tokenizer) for t in (draft, target)]
    record = sample_record(clip, question, draft, target, wall, texts)
    record["target_alone_time"] = alone.total if alone else None
    return record


def _both(
    models: tuple[StageModel, StageModel], clip: Clip, question: str
) -> tuple[Timed, Timed, float]:
    """Both models at once: a thread each, and on a GPU a stream."""

    def run(model: StageModel, beside: AbstractContextManager) -> Timed:
        with beside:
            return model.run(clip, question)

    streams = [_own_stream(model.target.device) for model in models]
    with ThreadPoolExecutor(2) as pool:
        start = perf_counter()
        draft, target = pool.map(run, models, streams)
    return draft, target, perf_counter() - start


@contextmanager
def _on(stream: torch.cuda.Stream) -> Iterator[None]:
    with torch.cuda.stream(stream):
        yield
    # What comes next may be on another stream.
    stream.synchronize()


def _own_stream(device: torch.device) -> AbstractContextManager:
    """Inside, work on the device goes to a stream of its own, behind what the caller has asked for
    so far.
    """
    if device.type != "cuda":
        return nullcontext()
    stream = own_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    return _on(stream)


def _write(folder: Path, config: dict, rows: list[dict]) -> None:
    results = sorted((r for r in rows if "error" not in r), key=lambda r: r["sample_idx"])
    errors = [r for r in rows if "error" in r]
    if not results:
        raise ValueError(f"no sample of {config['dataset']} could be run: {errors[0]['error']}")
    alone = [r["target_alone_time"] for r in results]
    now = datetime.now()
    record = {
        "schema": SCHEMA,
        "timestamp": now.strftime("%Y%m%d_%H%M%S"),
        "datetime": now.isoformat(timespec="seconds"),
        "dataset_name": Path(config["dataset"]).name,
        "config": config,
        "environment": environment(),
        "statistics": statistics(results, None if None in alone else alone),
        "results": results,
        "errors": errors,
    }
    write_json(folder / "results.json", record)
    plots = draw(record, folder)
    write_text(folder / "RESULTS.md", markdown(record, [path.name for path in plots]))
