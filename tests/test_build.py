"""The native module, the distributions made from the tree, and the pinned environment."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import xspec_kernels

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CHECKPOINTS = "xspec_runtime/models/checkpoints"
SKIPPED = shutil.ignore_patterns(
    ".git", ".venv", "build", "dist", "*.egg-info", "*.so", "__pycache__", ".*_cache"
)
USE_OPS = """
import pathlib, sys, torch, xspec_kernels, xspec_runtime
for module in (xspec_kernels, xspec_runtime):
    assert pathlib.Path(module.__file__).is_relative_to(sys.argv[1]), module.__file__
parents = torch.tensor([[-1, 0, 1]], dtype=torch.int32)
tokens, targets = torch.tensor([[4, 5, 6]]), torch.tensor([[5, 9, 7]])
bits = xspec_kernels.tree_mask(parents).ancestor_bits
print(xspec_kernels.verify_greedy(tokens, parents, targets, bits).output_ids.tolist())
print(xspec_kernels.info()["auto"]["verify_greedy"]["cpu"])
"""


def native_module():
    if os.environ.get("XSPEC_NATIVE", "").upper() == "OFF":
        pytest.skip("XSPEC_NATIVE=OFF: no native module was wanted")
    from xspec_kernels import _C

    return _C


def copy_of_tree(destination: Path) -> Path:
    """The source tree with one more checkpoint, so that the patterns are tested without any."""
    shutil.copytree(ROOT, destination, ignore=SKIPPED)
    probe = destination / "python" / CHECKPOINTS / "probe" / "model.safetensors"
    probe.parent.mkdir(parents=True)
    probe.write_bytes(b"probe")
    for package in ("xspec_runtime", "xspec_runtime/models"):
        (destination / "python" / package / "__init__.py").touch()
    (destination / "README.md").touch()
    return destination


def run(command: list, **options) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(command, capture_output=True, text=True, **options)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return result


def use_installed(wheel: Path, folder: Path) -> list[str]:
    """Install the wheel into an empty folder and run the ops from there.

    -S leaves out the .pth files of this environment, whose editable install would answer imports.
    """
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    run([*pip, "--target", folder, wheel], cwd=folder.parent)
    paths = [str(folder), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-S", "-c", USE_OPS, str(folder)]
    return run(command, cwd=folder.parent, env=environment).stdout.splitlines()


def test_native_module_is_built():
    module = native_module()
    assert xspec_kernels.info()["auto"]["verify_greedy"]["cpu"] == "cpp"
    assert module.device_count() >= 0
    assert bool(module.cuda_archs) == module.built_with_cuda


def test_native_module_links_no_torch_and_hides_cudart():
    if not shutil.which("readelf"):
        pytest.skip("readelf is not installed")
    path = native_module().__file__
    needed = run(["readelf", "-d", path]).stdout
    libraries = [line.split("[")[1].rstrip("]") for line in needed.splitlines() if "NEEDED" in line]
    assert libraries
    assert not [name for name in libraries if "cuda" in name or "torch" in name or "c10" in name]
    symbols = run(["readelf", "--dyn-syms", "-W", path]).stdout.splitlines()
    defined = [line.split()[-1] for line in symbols if line.split()[6:7] not in ([], ["UND"])]
    assert "PyInit__C" in defined
    assert not [name for name in defined if "cuda" in name.lower() or "xspec" in name]


@pytest.mark.slow
def test_sdist_and_wheel_work_outside_the_tree(tmp_path):
    tree = copy_of_tree(tmp_path / "tree")
    out = tmp_path / "dist"
    environment = {**os.environ, "XSPEC_CUDA": "OFF", "XSPEC_NATIVE": "ON"}
    run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, tree],
        env=environment,
        cwd=tmp_path,
    )
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    with tarfile.open(sdist) as archive:
        packed = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    with zipfile.ZipFile(wheel) as archive:
        shipped = set(archive.namelist())

    native = {str(file.relative_to(tree)) for file in (tree / "csrc").rglob("*") if file.is_file()}
    assert native and native | {"CMakeLists.txt", "LICENSE", "setup.py"} <= packed
    models = {
        str(file.relative_to(tree / "python"))
        for file in (tree / "python" / CHECKPOINTS).rglob("*")
        if file.is_file()
    }
    assert f"{CHECKPOINTS}/probe/model.safetensors" in models
    assert {f"python/{name}" for name in models} <= packed
    assert models | {"xspec_kernels/py.typed", "xspec_runtime/py.typed"} <= shipped
    modules = {
        str(file.relative_to(tree / "python"))
        for file in (tree / "python").rglob("*.py")
        if "xspec_runtime" in file.parts
    }
    assert modules <= shipped
    assert not [name for name in shipped if name.startswith(("csrc", "tests", "bench"))]
    assert use_installed(wheel, tmp_path / "site") == ["[[5, 9, -1]]", "cpp"]


def test_wheel_without_native_module(tmp_path):
    tree = copy_of_tree(tmp_path / "tree")
    environment = {**os.environ, "XSPEC_NATIVE": "OFF"}
    pip = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps"]
    run([*pip, "--wheel-dir", tmp_path, tree], env=environment, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("py3-none-any.whl")
    assert use_installed(wheel, tmp_path / "site") == ["[[5, 9, -1]]", "torch"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"PATH": "/nonexistent", "CXX": ""}, "needs a C++17 compiler"),
        ({"XSPEC_NATIVE": "maybe"}, "XSPEC_NATIVE=MAYBE, expected one of ON, OFF"),
        ({"XSPEC_CUDA": "yes"}, "XSPEC_CUDA=YES, expected one of AUTO, ON, OFF"),
    ],
)
def test_build_that_cannot_start_says_why(changes, message, tmp_path):
    result = subprocess.run(
        [sys.executable, ROOT / "setup.py", "-q", "build_ext", "--build-lib", tmp_path],
        env={**os.environ, **changes},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode != 0
    assert message in result.stderr.strip().splitlines()[-1]


OLD_SETUPTOOLS = """
import sys, setuptools
setuptools.__version__ = "65.5.0"
sys.path.insert(0, sys.argv[1])
import xspec_build
xspec_build.prepare_metadata_for_build_wheel(sys.argv[2])
"""


def test_old_setuptools_is_one_clear_line(tmp_path):
    """pip looks for build tools only where it isolates the build."""
    result = subprocess.run(
        [sys.executable, "-c", OLD_SETUPTOOLS, ROOT / "_build_backend", tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert "setuptools>=77, 65.5.0 is installed" in line and not list(tmp_path.iterdir())


def test_environment_meets_the_metadata():
    extras = PROJECT["optional-dependencies"]
    wanted = [*PROJECT["dependencies"], *extras["runtime"], *extras["test"], *extras["torch"]]
    unmet = []
    for requirement in map(Requirement, wanted):
        try:
            installed = Version(version(requirement.name))
        except PackageNotFoundError:
            installed = None
        if installed is None or not requirement.specifier.contains(installed, prereleases=True):
            unmet.append(f"{requirement} (found {installed})")
    assert unmet == []


def test_torch_is_pinned_and_never_required():
    pinned = (ROOT / "requirements" / "pinned.txt").read_text().splitlines()
    assert any(line.startswith("torch==") for line in pinned)
    names = {Requirement(line).name for line in PROJECT["dependencies"]}
    assert names == {"numpy", "nvtx"}


def test_version_is_said_once():
    assert xspec_kernels.__version__ == PROJECT["version"]
