"""Kernels as the JIT would compile them for a GPU that is not here, and facts about the result."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

_MATRIX = re.compile(r"HMMA|HGMMA|UTCHMMA|OMMA")
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]+)", re.M)


class Facts(NamedTuple):
    """What the machine code of one kernel uses.

    Attributes:
        registers: per thread.
        spilled: bytes of stack and local memory a thread uses, plus instructions that touch them.
        shared: bytes of shared memory a program asks for.
        matrix: the matrix instructions, each with the number of times it is written.
        operations: every instruction likewise.
        digest: of the whole binary.
    """

    registers: int
    spilled: int
    shared: int
    matrix: dict[str, int]
    operations: Counter[str]
    digest: str

    def wide(self, prefix: str) -> bool:
        """Whether every instruction that starts with `prefix` moves 16 bytes a thread."""
        found = [name for name in self.operations if name.startswith(prefix)]
        return bool(found) and all(".128" in name for name in found)


def specialized(
    kernel: Any, cc: int, arguments: dict[str, Any], **options: Any
) -> tuple[str, Callable[[], Any]]:
    """(the key under which the JIT files the kernel for these arguments, what compiles it).

    `arguments` are those of a launch, tensors on the CPU included.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile, make_backend
    from triton.runtime.jit import create_function_from_signature

    target = GPUTarget("cuda", cc, 32)
    backend = make_backend(target)
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, _ = binder(**arguments)
    packed = kernel._pack_args(backend, dict(options), bound, specialization, options)
    parsed, signature, constants, attributes = packed

    def build() -> Any:
        source = ASTSource(kernel, signature, constants, attributes)
        return compile(source, target=target, options=parsed.__dict__)

    return repr(specialization), build


def facts(binary: Any) -> Facts:
    """Disassemble; the test skips where this Triton carries no disassembler."""
    import triton

    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    tools = [folder / "cuobjdump", folder / "nvdisasm"]
    if not all(os.access(tool, os.X_OK) for tool in tools):
        pytest.skip("this Triton carries no cuobjdump and nvdisasm")
    code = binary.asm["cubin"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        usage, text = (
            subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True)
            for tool, flag in zip(tools, ("--dump-resource-usage", "-c"), strict=True)
        )
    used = {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage.stdout)}
    operations = Counter(_INSTRUCTION.findall(text.stdout))
    touches = sum(n for name, n in operations.items() if name.startswith(("STL", "LDL")))
    return Facts(
        registers=used["REG"],
        spilled=used["STACK"] + used["LOCAL"] + touches,
        shared=binary.metadata.shared,
        matrix={name: n for name, n in operations.items() if _MATRIX.match(name)},
        operations=operations,
        digest=hashlib.sha256(code).hexdigest(),
    )
