"""The bytes that the operations of a compiled program take and give.

Decides what counts: the operands and results of everything that runs by itself, whole, as often as it runs. What caches
save, and what a kernel reads twice, is not known from a program.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from mtx.planning.hlo import Instruction, Program

# Nothing is computed or copied by these, or it is counted where it happens.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
    "partition-id", "replica-id", "opt-barrier",
}  # fmt: skip


def count_traffic(program: Program) -> dict[str, int]:
    """Bytes per step by what moves them: `products`, `attention` (calls of cuBLAS, and of cuDNN), `other`."""
    counts = Counter(products=0, attention=0, other=0)
    for computation, line in list_operations(program):
        target = call_target(line)
        kind = "products" if "cublas" in target else "attention" if "fmha" in target else "other"
        counts[kind] += program.executions[computation] * moved_bytes(program.computations[computation], line)
    return dict(counts)


def list_operations(program: Program) -> list[tuple[str, Instruction]]:
    """Computation and instruction of all that run by themselves, not as part of another one, such as a fusion."""
    lines = [line for computation in program.computations.values() for line in computation.values()]
    inside = {
        name.strip("%,")
        for line in lines
        if line.opcode not in ("while", "conditional", "call")
        for role in ("calls=", "to_apply=")
        for name in [line.attributes.partition(role)[2].partition(" ")[0]]
    }
    return [
        (name, line)
        for name, computation in program.computations.items()
        if name not in inside and program.executions[name]
        for line in computation.values()
        if line.opcode not in _FREE and not line.opcode.endswith(("-done", "-update"))
    ]


def moved_bytes(computation: Mapping[str, Instruction], line: Instruction) -> int:
    """Of the operands and results of an instruction of that computation."""
    operands = [shape for name in line.operands for shape in computation[name].shapes]
    return sum(shape.size_bytes for shape in (*operands, *line.shapes))


def call_target(line: Instruction) -> str:
    """The function of a library that an instruction calls, such as `__cublas$gemm`; "" if it calls none."""
    return line.attributes.partition('custom_call_target="')[2].partition('"')[0]
