"""Where the time of a compiled step goes, by kind of operation: from a profile of one step and the program's text."""

from __future__ import annotations

import collections
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
from jax.profiler import ProfileData

_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%([\w.\-]+) = .*? ([\w\-]+)\((.*)$", re.MULTILINE)
_KINDS = {
    "matmul": ("dot", "cublas", "fmha"),
    "collective": ("all-gather", "all-reduce", "reduce-scatter", "permute"),
    "copy or slice": ("copy", "slice", "concatenate", "transpose", "stack"),
    "reduction": ("reduce",),
}


def profile(run_once: Callable[[], object], program: str) -> dict[str, float]:
    """Share of the operations' time by kind; operations that run side by side each count their own.

    Args:
        run_once: Runs the step to its end.
        program: The compiled program's text.
    """
    kinds = {name: _kind(opcode, rest) for name, opcode, rest in _INSTRUCTION.findall(program)}
    seconds: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run_once()
        for file in Path(folder).rglob("*.xplane.pb"):
            for plane in ProfileData.from_file(str(file)).planes:
                for line in plane.lines:
                    for event in line.events:
                        if event.name in kinds:
                            seconds[kinds[event.name]] += event.duration_ns
    total = sum(seconds.values())
    return {kind: value / total for kind, value in seconds.most_common()}


def _kind(opcode: str, rest: str) -> str:
    """Fusions are named after the operation that they end in."""
    if opcode == "while":
        return "loop"
    operation = re.search(r'op_name="[^"]*?([\w\-]+)"', rest)
    name = operation.group(1) if operation else opcode
    for kind, words in _KINDS.items():
        if any(word in name or word in opcode for word in words):
            return kind
    return "elementwise"
