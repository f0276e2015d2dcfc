"""The end-to-end benchmark behind ``bench/e2e.py``: options in, table, results and plots out."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from xspec_kernels import require_backend

from .config import PREFILL_FUSED
from .data.captions import QUESTIONS
from .data.dsec import open_dataset
from .errors import out_of_memory
from .files import JsonLines, check_output, read_lines, write_json
from .inputs import check_device, check_lengths, check_questions, read_recording
from .measure import Sample, check_arms, run_interleaved, summarize
from .report import print_table, write_results
from .targets.transformers import OPS
from .text_workload import text_workload
from .video_workload import clip_tasks, from_file, overlap_modes, reader, scene_videos
from .workloads import ENGINES, WEIGHTS, MiniPair, Settings, Workload

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
    dataset_dir: Path | None = None
    duration: str = ""
    overlap: str = ""
    prefill_fused: str = "exact"
    engine: str = "transformers"
    weights: str = "float"
    device: str = "cpu"
    target_device: str = ""
    draft_device: str = ""
    adapters: Path | None = None
    adapter_level: str = ""
    adapter: str = ""
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
            RuntimeError: the backend cannot run on the device.
        """
        limits = (
            ("--gamma", self.gamma, 1, 63),
            ("--rows", self.rows, 1, 64),
            ("--samples", self.samples, 1, 100_000),
            ("--warmup", self.warmup, 0, 1000),
            ("--max-new-tokens", self.max_new_tokens, 1, 512),
            ("--threads", self.threads, 0, 1024),
            # Scenes before those of seed 0 are for training.
            ("--seed", self.seed, 0, 1_000_000),
        )
        for name, value, low, high in limits:
            if not low <= value <= high:
                raise ValueError(f"{name} must be in {low}..{high}, got {value}")
        if self.dtype not in DTYPES:
            raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.prefill_fused not in PREFILL_FUSED:
            raise ValueError(
                f"--prefill-fused must be one of {', '.join(PREFILL_FUSED)}, "
                f"got {self.prefill_fused!r}"
            )
        if self.engine not in ENGINES:
            raise ValueError(f"--engine must be one of {', '.join(ENGINES)}, got {self.engine!r}")
        if self.weights not in WEIGHTS:
            raise ValueError(f"--weights must be one of {', '.join(WEIGHTS)}, got {self.weights!r}")
        check_device(self.device)
        target = self.target_device or self.device
        check_device(target, "--target-device")
        check_device(self.draft_device or self.device, "--draft-device")
        try:
            ops = OPS if self.engine == "transformers" else None
            require_backend(self.backend, torch.device(target).type, ops)
        except (ValueError, RuntimeError) as error:
            named = "XSPEC_BACKEND" if self.backend == "auto" else "--backend"
            raise type(error)(f"{named}: {error}") from None
        names = self.arm_names()
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"--arms names {twice[0]} more than once")
        self.overlap_modes()
        if self.duration and not self.dataset_dir:
            raise ValueError("--duration goes with --dataset-dir")
        if self.dataset_dir and (self.events or self.target != "mini"):
            raise ValueError("--dataset-dir goes with the embedded pair, without --events")
        if self.video and not self.events:
            raise ValueError("--video goes with --events: the draft needs an event stream")
        return Settings(
            self.gamma,
            self.rows,
            self.max_new_tokens,
            self.prefill_fused,
            self.engine,
            self.weights,
            target,
            DTYPES[self.dtype],
            self.backend,
            self.draft_device or self.device,
            self.adapters,
            self.adapter_level,
            self.adapter,
        )

    def overlap_modes(self) -> list[str]:
        """How the draft may work beside the preparation of a video; none where none is read.

        Raises:
            ValueError: see `video_workload.overlap_modes`.
        """
        films = self.video or self.dataset_dir
        return overlap_modes(self.overlap, films, self.events, self.target)

    def arm_names(self) -> list[str]:
        """The arms asked for; none stands for all."""
        return [name.strip() for name in self.arms.split(",") if name.strip()]

    def check_outputs(self) -> None:
        """Raise `OSError` unless everything can be written; creates nothing."""
        own = (self.output_dir / name for name in ("results.json", "RESULTS.md"))
        for file in filter(None, (*own, self.json_file, self.trace)):
            check_output(file)


def run_e2e(options: Options) -> dict:
    """Run, print and write; returns the results dictionary."""
    console = Console()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    settings = options.settings()
    options.check_outputs()
    set_threads(options)
    workload = build_workload(options, settings)
    with workload.files:
        names, samples = _measure(options, workload, console)
    config = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(options).items()}
    results = summarize(samples, names, workload, config, config.pop("command"))
    paths = write_results(results, options.output_dir)
    if options.json_file:
        write_json(options.json_file, results)
    print_table(results, console)
    _print_notes(console, results, workload)
    console.print("written:", ", ".join(str(p) for p in paths), highlight=False, soft_wrap=True)
    return results


def _measure(
    options: Options, workload: Workload, console: Console
) -> tuple[list[str], list[Sample]]:
    """The names of the arms, and every sample, with a progress bar."""
    names = options.arm_names() or list(workload.arms)
    check_arms(workload, names)
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
    return names, samples


def set_threads(options: Options) -> None:
    """CPU threads as asked; the pair's matrices are too small to share, more than one slow it."""
    if options.threads or options.target == "mini":
        torch.set_num_threads(options.threads or 1)


def build_workload(options: Options, settings: Settings) -> Workload:
    """Tasks and arms the options ask for."""
    if options.target != "mini":
        if options.questions or options.events:
            raise ValueError("--questions and --events go with the embedded pair, not --target DIR")
        if options.adapters or options.adapter_level:
            raise ValueError("--adapters goes with the embedded pair, not --target DIR")
        if options.prompts is None:
            raise ValueError("--target DIR is a text model and needs --prompts FILE")
        prompts = read_lines(options.prompts)
        draft = Path(options.draft) if options.draft else None
        try:
            return text_workload(settings, Path(options.target), prompts[: options.samples], draft)
        except Exception as error:
            raise _loading_error(options, error) from error
    if options.prompts is not None:
        raise ValueError("--prompts goes with --target DIR; the pair takes --questions FILE")
    if options.draft not in ("", "draft", "draft_raw"):
        raise ValueError(f"--draft of the pair is draft or draft_raw, got {options.draft!r}")
    questions = read_lines(options.questions) if options.questions else list(QUESTIONS)
    check_questions(questions)
    clips = []
    if options.dataset_dir:
        clips = open_dataset(options.dataset_dir, options.duration).clips[: options.samples]
    if options.events:
        frames, image = read_recording(options.events, options.video)
    pair = MiniPair(settings, options.draft or "draft")
    modes, files = options.overlap_modes(), ExitStack()
    if options.events:
        asked = questions[: options.samples]
        read = reader(options.video) if options.video else None
        tasks = [pair.task(f"question {i}", q, frames, image, read) for i, q in enumerate(asked)]
    elif clips:
        asked = questions if options.questions else None
        tasks = clip_tasks(pair, clips, asked)
    elif modes:
        tasks = scene_videos(pair, files, options.samples, options.seed, questions)
    else:
        tasks = pair.scene_tasks(options.samples, options.seed, questions)
    check_lengths(pair, tasks)
    workload = pair.workload(tasks)
    workload.files = files
    return from_file(pair, workload, modes) if modes else workload


def _loading_error(options: Options, error: Exception) -> Exception:
    """`error`, which names the models where it does not name them itself."""
    text = " ".join(str(error).split())
    known = isinstance(error, (ValueError, RuntimeError, OSError))
    if out_of_memory(error) or (known and options.target in text):
        return error
    folders = f"{options.target} and {options.draft}" if options.draft else options.target
    what = text if known else f"{type(error).__name__}: {text}"
    return ValueError(f"the models in {folders} cannot be used: {what[:300]}")


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
    fused = results["prefill_fused"]
    if fused["drafted"]:
        console.print(
            f"drafts in the prefill: {fused['accepted']} of {fused['drafted']} accepted; "
            f"{fused['different_answers']} of {fused['answers']} answers and "
            f"{fused['different_tokens']} of {fused['tokens']} tokens differ from plain decoding"
        )
    different = [
        f"{arm['name']} {arm['samples'] - arm['identical']}"
        for arm in results["arms"]
        if arm["identical"] < arm["samples"]
    ]
    if modes := sorted({a["stages"]["mode"] for a in results["arms"] if a.get("stages")}):
        console.print(
            "times are from the video file to the last token; NAME_MODE: the draft writes text in "
            f"that mode ({', '.join(modes)}), NAME: no draft text before the target's first token"
        )
    console.print("not identical to the target:", ", ".join(different) if different else "none")
