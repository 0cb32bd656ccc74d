"""The program that XLA compiled, read from its optimized HLO text: computations, and how often each one runs.

Decides how executions are counted: a loop's body as often as the loop turns, loops within loops multiplied; each branch
of a conditional as if it were always taken, and marked. (XLA's own cost analysis counts a loop's body once.) What the
computations hold that matters is read by `hlo_collectives` and `hlo_products`.

Invariant: nothing is guessed. Text that is not understood, and a loop whose turns are not known, is a ValueError.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

_BITS = {"pred": 8, "token": 0, "opaque": 0}  # of all other types their names tell
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.-]+) = (?=\S)")
_CALLED = re.compile(r"\b(calls|to_apply|body|condition|true_computation|false_computation)=%([\w.-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_PARENTHESIS = re.compile(r"[()]")


@dataclass(frozen=True)
class Shape:
    """Of an array on one device."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.dims)

    @property
    def size_bytes(self) -> int:
        """Elements of four bits are packed."""
        digits = re.search(r"\d+", self.dtype)
        bits = _BITS[self.dtype] if self.dtype in _BITS else int(digits[0]) if digits else 8
        return -(-self.size * bits // 8)


@dataclass(frozen=True)
class Instruction:
    """One line of a program.

    Attributes:
        name: Unique in the program.
        opcode: E.g. `dot`, `all-gather-start`.
        shapes: Of its results, in one line if they are nested.
        operands: Names of instructions of the same computation.
        arguments: Between its parentheses, as it stands there: of constants and parameters no names.
        attributes: The rest of the line.
    """

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    arguments: str
    attributes: str


@dataclass(frozen=True)
class _Call:
    caller: str
    times: int
    is_loop: bool
    is_branch: bool
    is_estimated: bool


@dataclass(frozen=True)
class Program:
    """The computations of a program by name, each with its instructions by name.

    Attributes:
        calls: For each computation the places where it is called.
        entry: Name of the computation that runs once.
    """

    computations: dict[str, dict[str, Instruction]]
    calls: dict[str, tuple[_Call, ...]]
    entry: str

    @functools.cached_property
    def executions(self) -> dict[str, int]:
        """How often each computation runs."""
        counts = {self.entry: 1}

        def count(name: str) -> int:
            if name not in counts:
                counts[name] = sum(count(call.caller) * call.times for call in self.calls[name])
            return counts[name]

        return {name: count(name) for name in self.computations}

    @functools.cached_property
    def looped(self) -> set[str]:
        """Computations inside a loop, be it one that turns once."""
        return self._inside(lambda call: call.is_loop)

    @functools.cached_property
    def conditional(self) -> set[str]:
        """Computations inside a branch of a conditional."""
        return self._inside(lambda call: call.is_branch)

    @functools.cached_property
    def estimated(self) -> set[str]:
        """Computations inside a loop whose turns are known at run time only."""
        return self._inside(lambda call: call.is_estimated)

    def _inside(self, enters: Callable[[_Call], bool]) -> set[str]:
        found: set[str] = set()
        while more := {
            name
            for name, calls in self.calls.items()
            if name not in found and any(enters(call) or call.caller in found for call in calls)
        }:
            found |= more
        return found

    def find(self, *opcodes: str) -> Iterator[tuple[str, Instruction]]:
        """The instructions with these opcodes that run at all, each with its computation."""
        for name, computation in self.computations.items():
            if self.executions[name]:
                yield from ((name, line) for line in computation.values() if line.opcode in opcodes)

    def conditionals(self) -> list[tuple[Instruction, int]]:
        """Every conditional and how often it is met."""
        return [(line, self.executions[name]) for name, line in self.find("conditional")]


def read_program(text: str, unknown_turns: int | Callable[[Instruction], int] | None = None) -> Program:
    """Reads `compiled.as_text()`.

    Args:
        unknown_turns: How often a loop turns whose number of turns is known at run time only; or what says so of such
            a loop, and is asked in the order of the text.

    Raises:
        ValueError: There is no program in the text, or a loop does not say how often it turns.
    """
    computations: dict[str, dict[str, Instruction]] = {}
    entry = None
    lines: dict[str, Instruction] = {}
    for line in text.splitlines():
        if header := _HEADER.match(line):
            lines = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif match := _INSTRUCTION.match(line):
            lines[match[1]] = _read_instruction(match[1], line[match.end() :])
    if entry is None:
        raise ValueError("no entry computation: this is not the text of an optimized HLO module")
    calls: dict[str, list[_Call]] = {name: [] for name in computations}
    for caller, lines in computations.items():
        for instruction in lines.values():
            if instruction.opcode.endswith(("-done", "-update")):
                continue  # they repeat what their -start calls
            is_loop = instruction.opcode == "while"
            turns = _count_turns(computations, lines, instruction) if is_loop else 1
            if turns is None and unknown_turns is None:
                raise ValueError(
                    f"how often does the loop {instruction.name} turn? It does not say: give unknown_turns"
                )
            guess = unknown_turns(instruction) if turns is None and callable(unknown_turns) else unknown_turns
            times = turns if turns is not None else int(guess or 0)  # type: ignore[arg-type]
            for role, called in _called(instruction):
                if called not in calls:
                    raise ValueError(f"{instruction.name} calls {called}, which is not in the text")
                call = _Call(
                    caller=caller,
                    # The condition is asked once more than the body runs; nothing that counts is in there.
                    times=times,
                    is_loop=is_loop,
                    is_branch=role not in ("calls", "to_apply", "body", "condition"),
                    is_estimated=turns is None,
                )
                calls[called].append(call)
    return Program(computations, {name: tuple(found) for name, found in calls.items()}, entry)


def _called(instruction: Instruction) -> list[tuple[str, str]]:
    branches = _BRANCHES.search(instruction.attributes)
    names = re.findall(r"%([\w.-]+)", branches[1]) if branches else []
    return [*_CALLED.findall(instruction.attributes), *(("branch", name) for name in names)]


def _read_instruction(name: str, line: str) -> Instruction:
    end = _closing(line, 0) + 1 if line.startswith("(") else line.index(" ")
    opening = line.index("(", end)
    closing = _closing(line, opening)
    arguments = line[opening + 1 : closing]
    return Instruction(
        name=name,
        opcode=line[end:opening].strip(),
        shapes=_read_shapes(line[:end]),
        operands=tuple(re.findall(r"%([\w.-]+)", arguments)),
        arguments=arguments,
        attributes=line[closing + 1 :],
    )


def _closing(line: str, opening: int) -> int:
    depth = 0
    for match in _PARENTHESIS.finditer(line, opening):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    raise ValueError(f"an instruction goes on in the next line: {line[:200]}")


def _read_shapes(text: str) -> tuple[Shape, ...]:
    return tuple(Shape(dtype, read_integers(dims)) for dtype, dims in _SHAPE.findall(text))


def read_integers(text: str) -> tuple[int, ...]:
    """All that stand in a text."""
    return tuple(map(int, re.findall(r"\d+", text)))


def _count_turns(
    computations: dict[str, dict[str, Instruction]],
    lines: dict[str, Instruction],
    loop: Instruction,
) -> int | None:
    """As XLA says itself, or as the condition does: counter < constant, from a constant, by ones; None: unknown."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(known[1])
    roles = dict(_called(loop))
    condition = computations[roles["condition"]]
    root = list(condition.values())[-1]
    bounds = [i for i in condition.values() if i.opcode == "constant" and i.name in root.operands]
    counters = [i for i in condition.values() if i.opcode == "get-tuple-element" and i.name in root.operands]
    if root.opcode == "compare" and "direction=LT" in root.attributes and len(bounds) == len(counters) == 1:
        index = int(re.findall(r"index=(\d+)", counters[0].attributes)[0])
        start = lines[lines[loop.operands[0]].operands[index]] if lines[loop.operands[0]].opcode == "tuple" else None
        body = computations[roles["body"]]
        end = list(body.values())[-1]
        step = body[end.operands[index]] if end.opcode == "tuple" else end
        ones = [o for o in step.operands if body[o].opcode == "constant" and body[o].arguments == "1"]
        if start is not None and start.opcode == "constant" and step.opcode == "add" and ones:
            return max(0, int(bounds[0].arguments) - int(start.arguments))
    return None
