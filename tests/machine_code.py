"""Kernels as the JIT would compile them for a GPU that is not here, and facts about the result."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from xspec_runtime.gpu import machine_code


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
    if missing := machine_code.disassembler_missing():
        pytest.skip(missing)
    found = machine_code.facts(binary)
    return Facts(
        registers=found.registers,
        spilled=found.spills,
        shared=found.shared,
        matrix=found.matrix,
        operations=machine_code.disassemble(binary)[1],
        digest=hashlib.sha256(binary.asm["cubin"]).hexdigest(),
    )


def operands_outlive(ptx: str) -> bool:
    """Whether no register is written while a matrix instruction of 9.0 may still read it.

    Such an instruction runs on after it was issued. One that takes an operand from registers has to
    end before these are written for the next step: no wait may leave any of them running.
    """
    in_registers = re.search(r"wgmma\.mma_async\S* \{[^}]*\}, \{", ptx)
    waits = re.findall(r"wgmma\.wait_group\S* (\d+)", ptx)
    return bool(waits) and not (in_registers and any(map(int, waits)))


def waits_first(ptx: str) -> bool:
    """Whether nothing but prefetches stands before the one wait for the kernel before."""
    body = ptx[ptx.index(".entry") :]
    body = body[body.index("{") :]
    before, *behind = body.split("griddepcontrol.wait")
    touches = r"\b(ld|st|atom|red)\.(global|relaxed|acquire)|\bcp\.async|\bbra\b|\bret;"
    return len(behind) == 1 and not re.search(touches, before)


def publishes_partials(ptx: str) -> bool:
    """Whether sums are counted once all threads stored theirs, and read once the count is known."""
    marks = r"st\.global|bar\.sync|atom\.global\.gpu\.acq_rel\.add|ld\.global\.cg"
    order = re.findall(marks, ptx)
    if order.count("atom.global.gpu.acq_rel.add") != 1:
        return False
    at = order.index("atom.global.gpu.acq_rel.add")
    return (
        "st.global" in order[:at]
        and order[at - 1] == order[at + 1] == "bar.sync"
        and "ld.global.cg" in order[at:]
        and "ld.global.cg" not in order[:at]
    )
