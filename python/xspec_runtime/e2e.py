"""The end-to-end benchmark behind ``bench/e2e.py``: options in, table, results and plots out."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from .data.captions import QUESTIONS
from .data.dsec import open_dataset
from .e2e_options import Options
from .errors import out_of_memory
from .files import JsonLines, read_lines, write_json
from .inputs import check_lengths, check_questions, read_recording
from .measure import Sample, check_arms, run_interleaved, summarize
from .report import agreement_lines, print_table, temperature_table, write_results
from .temperature import (
    DEFAULT_ARMS,
    add_temperatures,
    parse_temperatures,
    sampling,
)
from .workloads import MiniPair, Settings, Workload
from .workloads.modes import MODES
from .workloads.text import text_workload
from .workloads.video import clip_tasks, from_file, reader, scene_videos
from .workloads.vlm import FolderRun


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
        names, runs = _measure(options, workload, console)
    config = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(options).items()}
    results = summarize(runs[0][1], names, workload, config, config.pop("command"))
    if planned := parse_temperatures(options.temperature):
        add_temperatures(results, runs, planned, names, workload)
    paths = write_results(results, options.output_dir)
    if options.json_file:
        write_json(options.json_file, results)
    print_table(results, console)
    if rows := results.get("temperatures"):
        console.print(temperature_table(rows), highlight=False, markup=False, soft_wrap=True)
    _print_notes(console, results, workload)
    console.print("written:", ", ".join(str(p) for p in paths), highlight=False, soft_wrap=True)
    return results


def _measure(
    options: Options, workload: Workload, console: Console
) -> tuple[list[str], list[tuple[float, list[Sample]]]]:
    """The names of the arms, and every sample of each temperature, with a progress bar."""
    names = options.arm_names() or [a for a in workload.arms if a not in workload.optional]
    temperatures = parse_temperatures(options.temperature)
    if temperatures and not options.arms:
        names = [name for name in DEFAULT_ARMS if name in workload.arms]
    check_arms(workload, names)
    steps = len(names) * (len(workload.tasks) + min(options.warmup, len(workload.tasks)))
    steps *= len(temperatures) or 1
    runs: list[tuple[float, list[Sample]]] = []
    columns = (
        "[progress.description]{task.description}",
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar, JsonLines(options.trace) as lines:
        task = bar.add_task("arms x samples", total=steps)
        for value in temperatures or [0.0]:
            at = sampling(workload, value, options.seed) if temperatures else workload
            try:
                samples = run_interleaved(
                    at,
                    names,
                    options.warmup,
                    lambda: bar.advance(task),
                    lines.write if options.trace else None,
                )
            except KeyboardInterrupt:
                if not runs:
                    raise
                break
            runs.append((value, samples))
            if len(samples) < len(names) * len(workload.tasks):
                break
    return names, runs


def set_threads(options: Options) -> None:
    """CPU threads as asked; the pair's matrices are too small to share, more than one slow it."""
    if options.threads or options.target == "mini":
        torch.set_num_threads(options.threads or 1)


def build_workload(options: Options, settings: Settings) -> Workload:
    """Tasks and arms the options ask for."""
    if options.target != "mini" and options.dataset_dir:
        return _folder_workload(options, settings)
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
            middle = Path(options.middle) if options.middle else None
            asked = prompts[: options.samples]
            return text_workload(settings, Path(options.target), asked, draft, middle)
        except Exception as error:
            raise _loading_error(options, error) from error
    if options.middle:
        raise ValueError("--middle goes with --target DIR; the pair's is the target in NF4")
    if options.prompts is not None:
        raise ValueError("--prompts goes with --target DIR; the pair takes --questions FILE")
    if options.draft not in ("", "draft", "draft_raw") and not Path(options.draft).is_dir():
        raise ValueError(
            f"--draft of the pair is draft, draft_raw or a folder, got {options.draft!r}"
        )
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
        tasks, faults = clip_tasks(pair, clips, asked)
    elif modes:
        tasks = scene_videos(pair, files, options.samples, options.seed, questions)
    else:
        tasks = pair.scene_tasks(options.samples, options.seed, questions)
    check_lengths(pair, tasks)
    workload = pair.workload(tasks)
    workload.files = files
    if clips:
        workload.facts["clips_left_out"] = len(faults)
        workload.notes += [f"left out: {line}" for line in faults]
    return from_file(pair, workload, modes) if modes else workload


def _folder_workload(options: Options, settings: Settings) -> Workload:
    """A converted EventGPT and the model it drafts for, on recorded clips."""
    if options.prompts or options.adapters or options.adapter_level or options.middle:
        raise ValueError(
            "--prompts and --middle go with a text model, --adapters with the embedded pair; "
            "--dataset-dir with --target DIR takes --questions"
        )
    questions = read_lines(options.questions) if options.questions else []
    clips = open_dataset(options.dataset_dir, options.duration).clips[: options.samples]
    run = FolderRun(settings, Path(options.draft), Path(options.target), clips, questions)
    return from_file(run, run.workload(), options.overlap_modes())


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
        if arm["identical"] is not None and arm["identical"] < arm["samples"]
    ]
    ahead = [a for a in results["arms"] if a.get("stages") and a["name"] not in MODES]
    if modes := sorted({a["stages"]["mode"] for a in ahead}):
        console.print(
            "times are from the video file to the last token; NAME_MODE: the draft writes text in "
            f"that mode ({', '.join(modes)}), NAME: no draft text before the target's first token"
        )
    console.print("not identical to the target:", ", ".join(different) if different else "none")
    for line in (*agreement_lines(results), *workload.notes):
        console.print(line, highlight=False, soft_wrap=True)
