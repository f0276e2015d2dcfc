"""Commands as a shell runs them, scripts of bench/ as modules, and work shared by two processes."""

from __future__ import annotations

import importlib.util
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner, Result

from xspec_runtime import commands

ROOT = Path(__file__).resolve().parent.parent


def bench_script(name: str) -> ModuleType:
    """A script of bench/, as a module of its own."""
    spec = importlib.util.spec_from_file_location(f"bench_{name}", ROOT / "bench" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def invoke(app: typer.Typer, *arguments: object) -> Result:
    """What a command says, and its status."""
    return CliRunner().invoke(app, list(map(str, arguments)))


def xspec(*arguments: object) -> int:
    """The status of an `xspec` command; what it says goes where pytest captures it."""
    with pytest.raises(SystemExit) as stopped:
        commands.app(list(map(str, arguments)))
    return stopped.value.code


def in_two_processes(work: Callable[[], Any], folder: Path) -> list[Any]:
    """What `work` gives in each of two processes that train together."""
    context = multiprocessing.get_context("fork")
    out = context.Queue()

    def rank_of(rank: int) -> None:
        torch.set_num_threads(1)
        store = f"file://{folder / 'store'}"
        torch.distributed.init_process_group("gloo", store, rank=rank, world_size=2)
        out.put(work())
        torch.distributed.destroy_process_group()

    workers = [context.Process(target=rank_of, args=(rank,)) for rank in range(2)]
    for worker in workers:
        worker.start()
    found = [out.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join(60)
    return found
