"""Who may import whom, and what still works where a part is missing."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import xspec_kernels
from xspec_kernels import _dispatch

ROOT = Path(__file__).resolve().parent.parent
KERNELS_MAY_IMPORT = {"torch", "triton", "numpy", "xspec_kernels"}
UPSTREAM = {"bench", "tests"}


def imports(tree: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """Every imported name in full: `from a.b import c` gives a.b.c."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = "." * node.level + (node.module or "")
            yield from ((node, f"{prefix}.{alias.name}") for alias in node.names)


def guarded(tree: ast.AST) -> set[ast.AST]:
    """Import statements inside a `try`."""
    tries = [node for node in ast.walk(tree) if isinstance(node, ast.Try)]
    return {inner for block in tries for stmt in block.body for inner in ast.walk(stmt)}


def violations(path: str, source: str) -> list[str]:
    """Imports of one file that break the direction bench, tests -> runtime -> kernels."""
    tree = ast.parse(source)
    safe = guarded(tree)
    found = []
    package = Path(path).parts[0]
    for node, name in imports(tree):
        top, parts = name.split(".")[0], name.split(".")
        if top in UPSTREAM and package != "tests":
            found.append(f"{path}: imports {name}")
        if top == "nvtx" and node not in safe:
            found.append(f"{path}: imports {name} outside a try")
        if package == "xspec_kernels":
            known = top in sys.stdlib_module_names or top in KERNELS_MAY_IMPORT | {"nvtx", ""}
            if not known:
                found.append(f"{path}: imports {name}")
            if top == "triton" and path != "xspec_kernels/_triton.py":
                found.append(f"{path}: imports {name}, not through _triton.py")
            if name == "xspec_kernels._C" and path != "xspec_kernels/_native.py":
                found.append(f"{path}: imports {name}, not through _native.py")
        elif package == "xspec_runtime" and top == "xspec_kernels" and len(parts) > 1:
            inside = parts[1].startswith("_") or parts[1] == "kernels" or len(parts) > 2
            if inside:
                found.append(f"{path}: reaches into {name}")
    return found


def sources() -> Iterator[tuple[str, str]]:
    for base, package in ((ROOT, "xspec_kernels"), (ROOT / "python", "xspec_runtime")):
        for file in sorted((base / package).rglob("*.py")):
            yield str(file.relative_to(base)), file.read_text()


def test_import_direction():
    files = list(sources())
    assert len(files) > 6
    assert [line for path, source in files for line in violations(path, source)] == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("xspec_kernels/ops.py", "import transformers"),
        ("xspec_kernels/ops.py", "def f():\n    from xspec_runtime import engine"),
        ("xspec_kernels/kernels/new.py", "import triton.language as tl"),
        ("xspec_kernels/kernels/new.py", "from xspec_kernels import _C"),
        ("xspec_kernels/ranges.py", "import nvtx"),
        ("xspec_runtime/engine.py", "from xspec_kernels.kernels.kv_commit import kv_commit"),
        ("xspec_runtime/engine.py", "from xspec_kernels import kernels"),
        ("xspec_runtime/engine.py", "import xspec_kernels._dispatch"),
        ("xspec_runtime/measure.py", "from bench import e2e"),
    ],
)
def test_planted_violation_is_found(path, source):
    assert violations(path, source)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("xspec_runtime/engine.py", "from xspec_kernels import kv_commit\nimport transformers"),
        ("xspec_runtime/engine.py", "try:\n    import nvtx\nexcept ImportError:\n    nvtx = None"),
        ("xspec_kernels/kernels/new.py", "import torch\nfrom xspec_kernels._triton import tl"),
    ],
)
def test_allowed_import_passes(path, source):
    assert violations(path, source) == []


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "python")])
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
    )


def last_line(result: subprocess.CompletedProcess[str]) -> str:
    return (result.stdout + result.stderr).strip().splitlines()[-1]


BLOCK = "import sys; sys.modules.update(dict.fromkeys({names!r}))\n"
USE = """
import torch, xspec_kernels as x
parents = torch.tensor([[-1, 0]], dtype=torch.int32)
"""


def test_works_without_triton_and_native_module():
    block = BLOCK.format(names=["triton", "xspec_kernels._C", "nvtx"])
    result = run(block + USE + "print(x.tree_mask(parents).depth.tolist(), x.info()['auto'])")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("[[0, 1]]")
    assert "cpp" not in result.stdout and "'triton'" not in result.stdout


@pytest.mark.parametrize(
    ("backend", "missing"), [("triton", "triton cannot be imported"), ("cuda", "xspec_kernels._C")]
)
def test_missing_part_is_named_when_asked_for(backend, missing):
    block = BLOCK.format(names=["triton", "xspec_kernels._C"])
    tail = "x.verify_greedy(parents, parents, parents, parents.long(), backend={!r})"
    result = run(block + USE + tail.format(backend))
    assert result.returncode != 0
    assert "RuntimeError" in last_line(result) and missing in last_line(result)


def test_missing_torch_is_named():
    result = run(BLOCK.format(names=["torch"]) + "import xspec_kernels")
    assert result.returncode != 0
    assert "install torch" in last_line(result)


def test_backend_variable_is_obeyed_and_overruled():
    call = "print(x.tree_mask(parents{}).depth.tolist())"
    assert "needs CUDA tensors" in last_line(run(USE + call.format(""), XSPEC_BACKEND="triton"))
    assert "expected one of" in last_line(run(USE + call.format(""), XSPEC_BACKEND="quick"))
    named = run(USE + call.format(", backend='torch'"), XSPEC_BACKEND="triton")
    assert last_line(named) == "[[0, 1]]"


def test_op_without_a_kernel_says_so(monkeypatch):
    monkeypatch.setitem(_dispatch._IMPLEMENTATIONS, "plain", {"torch": None})
    with pytest.raises(RuntimeError, match="plain: there is no cuda kernel for this op"):
        _dispatch.choose("plain", "cuda", "cuda")


def test_backend_is_required_before_work():
    xspec_kernels.require_backend("auto", "cpu")
    with pytest.raises(RuntimeError, match="needs CUDA tensors, got cpu"):
        xspec_kernels.require_backend("cuda", "cpu", ("tree_mask",))
    with pytest.raises(RuntimeError, match="embed: there is no cuda kernel"):
        xspec_kernels.require_backend("cuda", "cpu", ("embed",))
    with pytest.raises(ValueError, match="'fast', expected one of auto"):
        xspec_kernels.require_backend("fast", "cpu")
