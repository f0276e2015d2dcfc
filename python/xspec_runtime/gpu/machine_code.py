"""Kernels as Triton compiles them for GPUs that are not here, and facts about the machine code."""

from __future__ import annotations

import ast
import hashlib
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

_MATRIX = re.compile(r"HMMA|HGMMA|UTC\w*MMA|OMMA")
_WIDE_LOAD = re.compile(r"LDG(STS)?\.\S*128|UTMALDG")
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]+)", re.M)


class Facts(NamedTuple):
    """What the machine code of one kernel uses.

    Attributes:
        registers: per thread.
        spills: bytes of stack and local memory a thread uses, plus instructions that touch them.
        shared: bytes of shared memory a program asks for.
        matrix: the matrix instructions, each with the number of times it is written.
        wide_loads: instructions that load 16 bytes a thread, or whole tiles by the copy engine.
        instructions: how many are written in all, the filling at the end apart.
    """

    registers: int
    spills: int
    shared: int
    matrix: dict[str, int]
    wide_loads: int
    instructions: int


class Launch(NamedTuple):
    """One kernel launch, recorded instead of run; `given` are its arguments and options."""

    kernel: Any
    positional: tuple[Any, ...]
    given: dict[str, Any]


@contextmanager
def recorded(cc: int) -> Iterator[list[Launch]]:
    """Inside, ops of xspec_kernels on CPU tensors with `backend="triton"` launch nothing.

    What they would launch on a card of compute capability `cc` (90 for 9.0) is in the list; their
    results are memory nobody has written.

    Raises:
        RuntimeError: Triton is missing, or runs as an interpreter.
    """
    modules = _kernel_modules()
    launches: list[Launch] = []

    def record(kernel: Any, grid: Any, device: Any, *args: Any, **meta: Any) -> None:
        launches.append(Launch(kernel, args, meta))

    with ExitStack() as patches:
        patches.enter_context(mock.patch.dict(os.environ))
        os.environ.pop("XSPEC_PDL", None)
        for name, replacement in (
            ("launch", record),
            ("card_of", lambda device: cc),
            ("unusable", lambda device_type: None),
        ):
            for module in modules:
                if hasattr(module, name):
                    patches.enter_context(mock.patch.object(module, name, replacement))
        yield launches


def _kernel_modules() -> list[Any]:
    import sys

    import xspec_kernels

    state = xspec_kernels.info()
    if state["interpreted"] or not state["triton"][:1].isdigit():
        why = "TRITON_INTERPRET=1 is set" if state["interpreted"] else state["triton"]
        raise RuntimeError(f"kernels cannot be compiled here: {why}")
    return [module for name, module in sys.modules.items() if name.startswith("xspec_kernels.")]


class Source(NamedTuple):
    """What the JIT would compile for one launch.

    Attributes:
        digest: 16 hex digits over the code of the kernel and of all it calls, the types and
            constants of the launch, its options and the target; comments do not count.
        constants: the launch's compile-time arguments by name.
        compile: makes the binary.
    """

    digest: str
    constants: dict[str, Any]
    compile: Callable[[], Any]


def source_of(launch: Launch, cc: int) -> Source:
    """The launch as Triton's JIT would see it on compute capability `cc`."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile, make_backend
    from triton.runtime.jit import create_function_from_signature

    kernel, target = launch.kernel, GPUTarget("cuda", cc, 32)
    backend = make_backend(target)
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = binder(*launch.positional, **launch.given)
    packed = kernel._pack_args(backend, dict(launch.given), bound, specialization, options)
    parsed, signature, constants, attributes = packed

    def build() -> Any:
        made = ASTSource(kernel, signature, constants, attributes)
        return compile(made, target=target, options=parsed.__dict__)

    names = {key[0]: value for key, value in constants.items()}
    named = {parameter.name: names.get(parameter.num) for parameter in kernel.params}
    key = repr((code_of(kernel), specialization, sorted(options.items()), cc))
    return Source(hashlib.sha256(key.encode()).hexdigest()[:16], named, build)


def code_of(kernel: Any) -> list[str]:
    """The kernel and all Triton functions it calls, without comments and docstrings, and the
    module constants they read."""
    from triton.runtime import JITFunction

    found: dict[str, str] = {}
    waiting = [kernel]
    while waiting:
        function = waiting.pop()
        tree = ast.parse(function.src)
        body = tree.body[0].body
        if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
            del body[0]
        found[f"{function.__module__}.{function.__name__}"] = ast.unparse(tree)
        for node in ast.walk(tree):
            name = node.id if isinstance(node, ast.Name) else None
            value = function.fn.__globals__.get(name)
            if isinstance(value, JITFunction):
                if f"{value.__module__}.{value.__name__}" not in found:
                    waiting.append(value)
            elif isinstance(value, (int, float, str)):
                found[f"{function.__module__}.{name}"] = repr(value)
    return [f"{name}\n{text}" for name, text in sorted(found.items())]


def disassembler_missing() -> str | None:
    """Why machine code cannot be read here, or None."""
    missing = [tool.name for tool in _tools() if not os.access(tool, os.X_OK)]
    return f"this Triton carries no {' and '.join(missing)}" if missing else None


def _tools() -> list[Path]:
    import triton

    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    return [folder / "cuobjdump", folder / "nvdisasm"]


def disassemble(binary: Any) -> tuple[dict[str, int], Counter[str]]:
    """Resources of a compiled kernel (REG, STACK, LOCAL), and its instructions with their counts.

    Raises:
        RuntimeError: this Triton carries no disassembler.
    """
    if missing := disassembler_missing():
        raise RuntimeError(missing)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage, text = (
            subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True)
            for tool, flag in zip(_tools(), ("--dump-resource-usage", "-c"), strict=True)
        )
    used = {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage.stdout)}
    return used, Counter(_INSTRUCTION.findall(text.stdout))


def facts(binary: Any) -> Facts:
    """What `Source.compile` made; raises as `disassemble` does."""
    used, operations = disassemble(binary)
    touches = sum(n for name, n in operations.items() if name.startswith(("STL", "LDL")))
    return Facts(
        registers=used["REG"],
        spills=used["STACK"] + used["LOCAL"] + touches,
        shared=binary.metadata.shared,
        matrix={name: n for name, n in sorted(operations.items()) if _MATRIX.match(name)},
        wide_loads=sum(n for name, n in operations.items() if _WIDE_LOAD.match(name)),
        instructions=operations.total() - operations["NOP"],
    )
