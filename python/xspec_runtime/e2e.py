"""The end-to-end benchmark behind ``bench/e2e.py``: options in, table, results and plots out."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from .data.captions import QUESTIONS
from .files import JsonLines, read_lines, write_json
from .measure import run_interleaved, summarize
from .report import check_output_dir, print_table, write_results
from .workloads import MiniPair, Settings, Workload, text_workload

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Options:
    """Arguments of one run, as the command line names them."""

    command: str
    gamma: int = 5
    rows: int = 16
    arms: str = ""
    samples: int = 24
    warmup: int = 2
    max_new_tokens: int = 128
    target: str = "mini"
    draft: str = ""
    prompts: Path | None = None
    questions: Path | None = None
    events: Path | None = None
    video: Path | None = None
    device: str = "cpu"
    dtype: str = "float32"
    backend: str = "auto"
    seed: int = 0
    threads: int = 0
    output_dir: Path = Path("results/e2e")
    json_file: Path | None = None
    trace: Path | None = None

    def settings(self) -> Settings:
        """Checked settings.

        Raises:
            ValueError: an option is out of range; the message names it.
        """
        limits = (
            ("--gamma", self.gamma, 1, 63),
            ("--rows", self.rows, 1, 64),
            ("--samples", self.samples, 1, 100_000),
            ("--warmup", self.warmup, 0, 1000),
            ("--max-new-tokens", self.max_new_tokens, 1, 512),
            ("--threads", self.threads, 0, 1024),
        )
        for name, value, low, high in limits:
            if not low <= value <= high:
                raise ValueError(f"{name} must be in {low}..{high}, got {value}")
        if self.dtype not in DTYPES:
            raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.device.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError(f"--device {self.device}: there is no CUDA device; use --device cpu")
        if self.video and not self.events:
            raise ValueError("--video goes with --events: the draft needs an event stream")
        return Settings(
            self.gamma,
            self.rows,
            self.max_new_tokens,
            self.device,
            DTYPES[self.dtype],
            self.backend,
        )


def run_e2e(options: Options) -> dict:
    """Run, print and write; returns the results dictionary."""
    console = Console()
    transformers.logging.set_verbosity_error()
    settings = options.settings()
    check_output_dir(options.output_dir)
    for file in filter(None, (options.json_file, options.trace)):
        check_output_dir(file.parent)
    set_threads(options)
    workload = build_workload(options, settings)
    names = [n.strip() for n in options.arms.split(",") if n.strip()] or list(workload.arms)
    steps = len(names) * (len(workload.tasks) + min(options.warmup, len(workload.tasks)))
    columns = (
        "[progress.description]{task.description}",
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar, JsonLines(options.trace) as lines:
        task = bar.add_task("arms x samples", total=steps)
        samples = run_interleaved(
            workload,
            names,
            options.warmup,
            lambda: bar.advance(task),
            lines.write if options.trace else None,
        )
    config = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(options).items()}
    results = summarize(samples, names, workload, config, config.pop("command"))
    paths = write_results(results, options.output_dir)
    if options.json_file:
        write_json(options.json_file, results)
    print_table(results, console)
    _print_notes(console, results, workload)
    console.print("written:", ", ".join(str(p) for p in paths), highlight=False, soft_wrap=True)
    return results


def set_threads(options: Options) -> None:
    """CPU threads as asked; the pair's matrices are too small to share, more than one slow it."""
    if options.threads or options.target == "mini":
        torch.set_num_threads(options.threads or 1)


def build_workload(options: Options, settings: Settings) -> Workload:
    """Tasks and arms the options ask for."""
    if options.target != "mini":
        if options.prompts is None:
            raise ValueError("--target DIR is a text model and needs --prompts FILE")
        prompts = read_lines(options.prompts)
        draft = Path(options.draft) if options.draft else None
        return text_workload(settings, Path(options.target), prompts[: options.samples], draft)
    if options.prompts is not None:
        raise ValueError("--prompts goes with --target DIR; the pair takes --questions FILE")
    if options.draft not in ("", "draft", "draft_raw"):
        raise ValueError(f"--draft of the pair is draft or draft_raw, got {options.draft!r}")
    questions = read_lines(options.questions) if options.questions else list(QUESTIONS)
    if options.events:
        frames, image = read_recording(options.events, options.video)
    pair = MiniPair(settings, options.draft or "draft")
    if options.events:
        asked = questions[: options.samples]
        tasks = [pair.task(f"question {i}", q, frames, image) for i, q in enumerate(asked)]
    else:
        tasks = pair.scene_tasks(options.samples, options.seed, questions)
    return pair.workload(tasks)


def read_recording(events: Path, video: Path | None) -> tuple[np.ndarray, np.ndarray]:
    """A recorded event stream, and its video or, without one, the stream itself cut into 8 slices.

    Returns:
        frames uint8 ``[8, 64, 64, 3]`` and the event image uint8 ``[64, 64, 3]``.
    """
    from .data.events import load_events, rasterize, split_by_count
    from .data.images import resize
    from .data.video import load_video
    from .models.mini import FRAMES, IMAGE_SIZE

    stream = load_events(events)
    image = rasterize(stream)
    if video is not None:
        frames = load_video(video, FRAMES)
    else:
        frames = np.stack([rasterize(part) for part in split_by_count(stream, FRAMES)])
    return resize(frames, IMAGE_SIZE, "squash"), resize(image[None], IMAGE_SIZE, "squash")[0]


def _print_notes(console: Console, results: dict, workload: Workload) -> None:
    ties = results["near_ties"]
    console.print(
        f"near ties: {ties['below_2_ulp']} of {ties['steps']} steps had a top-2 gap below 2 ulp"
    )
    seen = results["verbatim_in_training"]
    if seen is not None:
        console.print(
            f"verbatim in the memory's training answers: {seen['captions']} of "
            f"{results['config']['samples']} ({seen['share']:.0%})"
        )
    different = [
        f"{arm['name']} {arm['samples'] - arm['identical']}"
        for arm in results["arms"]
        if arm["identical"] < arm["samples"]
    ]
    console.print("not identical to the target:", ", ".join(different) if different else "none")
