"""From the start of a process to its first token, by stage.

``python -m xspec_runtime.cold_start [REPEATS [FILE.json]]``. Each repeat is a process of its own
that does what ``xspec ask`` does, and then builds every arm of an end-to-end run. Modules are in
the system's file cache from the second repeat on.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

STAGES = ("interpreter", "torch", "transformers", "xspec_runtime", "weights", "drafters")
REQUEST = ("first token", "second request", "arms of e2e")


def process_age() -> float:
    """Seconds since this process began; on systems without /proc, since Python counts."""
    try:
        started = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError):
        return time.perf_counter()


class Stages:
    """Wall and CPU seconds that each stage took."""

    def __init__(self) -> None:
        self.wall: dict[str, float] = {}
        self.cpu: dict[str, float] = {}
        self._last = (0.0, 0.0)

    def reached(self, stage: str) -> None:
        """`stage` ends here; the next one begins."""
        now = process_age(), time.process_time()
        self.wall[stage], self.cpu[stage] = (b - a for a, b in zip(self._last, now, strict=True))
        self._last = now


def probe(events: Path, video: Path) -> dict[str, dict[str, float]]:
    """This process's stages; most of its time is the imports, so they are here."""
    stages = Stages()
    stages.reached("interpreter")
    import torch

    stages.reached("torch")
    from transformers import PreTrainedModel  # noqa: F401 - most of transformers comes with it

    stages.reached("transformers")
    from .inputs import blank_video, read_events, read_video
    from .overlap import Overlap
    from .workloads import MiniPair, Settings

    torch.set_num_threads(1)
    stages.reached("xspec_runtime")
    pair = MiniPair(Settings())
    stages.reached("weights")
    task = pair.task("cold", "What is happening?", blank_video(video), read_events(events))
    work = Overlap(pair.decoder("tree"))
    stages.reached("drafters")
    question = "What is happening?"
    heard: list[int] = []

    def first(stage: str) -> None:
        heard.clear()

        def hear(tokens: list[int]) -> None:
            if not heard:
                stages.reached(stage)
            heard.extend(tokens)

        work.generate(
            lambda stop: pair.task("cold", question, read_video(video, stop)).inputs,
            task.request,
            hear,
        )
        stages.reached(f"rest of {stage}")

    first("first token")
    first("second request")
    arms = pair.workload([task]).arms
    for make in arms.values():
        make()
    stages.reached("arms of e2e")
    return {"wall": stages.wall, "cpu": stages.cpu}


def measure(events: Path, video: Path, repeats: int = 5) -> dict[str, dict[str, float]]:
    """Medians over processes, in seconds; ``to first token`` is the sum of what leads there.

    Raises:
        RuntimeError: a process failed; the message ends with its last line.
    """
    command = [
        sys.executable,
        "-m",
        f"{__package__}.cold_start",
        "--probe",
        str(events),
        str(video),
    ]
    found = []
    for _ in range(repeats):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"the process failed: {done.stderr.strip().splitlines()[-1]}")
        found.append(json.loads(done.stdout.splitlines()[-1]))
    clocks = {}
    for clock in ("wall", "cpu"):
        rows = [one[clock] for one in found]
        total = median(sum(row[s] for s in (*STAGES, REQUEST[0])) for row in rows)
        medians = {s: median(row[s] for row in rows) for s in (*STAGES, *REQUEST)}
        clocks[clock] = {**medians, "to first token": total}
    return clocks


def main() -> None:
    """Measure on a procedural scene; prints a table."""
    from .cli import run_cli

    if sys.argv[1:2] == ["--probe"]:
        found = probe(Path(sys.argv[2]), Path(sys.argv[3]))
        sys.stdout.write(json.dumps(found) + "\n")
        return
    run_cli(_report)


def _report() -> None:
    import numpy as np
    from rich.console import Console
    from rich.table import Table

    from .data.scene_video import write_scene
    from .data.scenes import event_stream, make_sample, render
    from .environment import environment
    from .files import check_output, write_json

    if len(sys.argv) > 3 or not (sys.argv[1:] or ["5"])[0].isdigit() or sys.argv[1:2] == ["0"]:
        raise ValueError(f"expected [REPEATS [FILE.json]], got {' '.join(sys.argv[1:])}")
    repeats = int((sys.argv[1:] or ["5"])[0])
    file = Path(sys.argv[2]) if len(sys.argv) > 2 else None
    if file:
        check_output(file)
    sample, draw = make_sample(1_000_000), np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        events, video = Path(folder, "events.npy"), Path(folder, "video.mp4")
        np.save(events, event_stream(render(sample.scene, draw), draw), allow_pickle=True)
        write_scene(video, sample.video)
        clocks = measure(events, video, repeats)
    table = Table("stage", "wall s", "CPU s", title=f"medians of {repeats} processes")
    for stage, seconds in clocks["wall"].items():
        table.add_row(stage, f"{seconds:.2f}", f"{clocks['cpu'][stage]:.2f}")
    Console().print(table)
    if file:
        command = " ".join(["python -m", f"{__package__}.cold_start", *sys.argv[1:]])
        write_json(
            file,
            {
                "schema": "xspec.cold/1",
                "environment": environment() | {"threads": 1},
                "command": command,
                "complete": True,
                "seconds": clocks,
            },
        )


if __name__ == "__main__":
    main()
