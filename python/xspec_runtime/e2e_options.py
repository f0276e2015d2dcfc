"""Options of the end-to-end benchmark, checked before work starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from xspec_kernels import require_backend

from .adapters.mini.text import trained_arms
from .adapters.training.runs import STAR
from .config import PREFILL_FUSED
from .files import check_output
from .inputs import check_device
from .targets.transformers import OPS
from .temperature import check_sampling, parse_temperatures
from .workloads import ENGINES, WEIGHTS, Settings
from .workloads.video import overlap_modes

ADAPTER_RUNS = ("", "latest", STAR)
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
    middle: str = ""
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
    temperature: str = ""
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
        self._check_together()
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
            ValueError: see `workloads.video.overlap_modes`.
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

    def _check_together(self) -> None:
        names = self.arm_names()
        if self.arms and not names:
            raise ValueError(f"--arms names no arm, got {self.arms!r}")
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"--arms names {twice[0]} more than once")
        if parse_temperatures(self.temperature):
            check_sampling(names)
        self.overlap_modes()
        self._check_adapters()
        if self.duration and not self.dataset_dir:
            raise ValueError("--duration goes with --dataset-dir")
        if self.dataset_dir and self.events:
            raise ValueError("--dataset-dir has event streams of its own: leave out --events")
        if self.dataset_dir and self.target != "mini" and not self.draft:
            raise ValueError(
                "--dataset-dir goes with the embedded pair, or with --target DIR and --draft DIR"
            )
        if self.video and not self.events:
            raise ValueError("--video goes with --events: the draft needs an event stream")

    def _check_adapters(self) -> None:
        """Before models are loaded: the runs are there, and for the pair."""
        if self.adapter not in ADAPTER_RUNS:
            raise ValueError(
                f"--adapter must be {' or '.join(filter(None, ADAPTER_RUNS))}, got {self.adapter!r}"
            )
        if self.adapter and not self.adapters:
            raise ValueError("--adapter needs --adapters, the folder of trained adapters")
        if self.target == "mini":
            tapped = self.engine == "transformers"
            trained_arms(self.adapters, self.adapter_level, self.adapter, tapped)
