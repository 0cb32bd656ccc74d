"""The memory of a compiled program: its largest buffers, and the lines of Python that they come from.

Decides how XLA's list of buffers is told to a person: room that several values take in turn is one buffer, and is named
after the value that says most about its origin.

Invariant: buffers of one allocation do not overlap; what is left out is smaller than what is shown.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from mtx.planning.hlo import Instruction, Program, Shape, read_integers

_ALLOCATION = re.compile(r"^allocation \d+: size \d+, (.*)$")
_VALUE = re.compile(r"^ value: <\d+ ([\w.-]+)[^>]*> \(size=(\d+),offset=(\d+)\): (\w+)\[([\d,]*)\]")
_ROW = re.compile(r'^(\d+) (?:"(.*)"|\{(.*)\})$')
_TABLES = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")


@dataclass(frozen=True)
class Buffer:
    """A piece of a device's memory.

    Attributes:
        size_bytes: Of the piece.
        shape: Of its largest value.
        is_argument: Whether it holds an argument of the program, such as a parameter.
        origin: The operation in the program that was traced, such as 'jit(step)/while/body/dot_general'.
        source: 'mtx/nn/linear.py:40', or empty where XLA made it up.
    """

    size_bytes: int
    shape: Shape
    is_argument: bool
    origin: str
    source: str


class Sources:
    """From instructions to lines of Python."""

    def __init__(self, text: str) -> None:
        """Args: text: Of the program, with its tables of files and stack frames."""
        self._tables: dict[str, dict[int, str]] = {name: {} for name in _TABLES}
        table = None
        for line in text.splitlines():
            if line in self._tables:
                table = self._tables[line]
            elif table is not None and (row := _ROW.match(line)):
                table[int(row[1])] = row[2] or row[3] or ""
            elif line.startswith(("%", "ENTRY")):
                break  # the tables stand before the first computation

    def find(self, instruction: Instruction) -> str:
        """'mtx/nn/linear.py:40'; empty where the instruction does not say."""
        if given := re.search(r'source_file="([^"]*)" source_line=(\d+)', instruction.attributes):
            return f"{_shorten(given[1])}:{given[2]}"
        frame = re.search(r"stack_frame_id=(\d+)", instruction.attributes)
        if frame is None or int(frame[1]) not in self._tables["StackFrames"]:
            return ""
        location = self._tables["FileLocations"][_field(self._tables["StackFrames"][int(frame[1])], "file_location_id")]
        return f"{_shorten(self._tables['FileNames'][_field(location, 'file_name_id')])}:{_field(location, 'line')}"


def _field(row: str, name: str) -> int:
    return int(re.findall(rf"\b{name}=(\d+)", row)[0])


def _shorten(path: str) -> str:
    """Of our own files from `mtx/` on."""
    return path[path.rindex("/mtx/") + 1 :] if "/mtx/" in path else path


def operation(instruction: Instruction) -> str:
    """The operation that was traced; empty where XLA made the instruction up."""
    found = re.search(r'op_name="([^"]*)"', instruction.attributes)
    return found[1] if found else ""


def read_buffers(text: str, program: Program, sources: Sources, count: int) -> list[Buffer]:
    """The largest buffers, largest first.

    Args:
        text: XLA's `buffer-assignment.txt` of the program.
        count: How many at most.

    Raises:
        ValueError: There is no buffer in the text.
    """
    lines = {name: line for computation in program.computations.values() for name, line in computation.items()}
    pieces: dict[tuple[int, int, int], list[tuple[str, Shape]]] = {}
    arguments: set[int] = set()
    allocation = -1
    for line in text.splitlines():
        if header := _ALLOCATION.match(line):
            allocation += 1
            if header[1].startswith("parameter"):
                arguments.add(allocation)
        elif value := _VALUE.match(line):
            piece = (-int(value[2]), allocation, int(value[3]))
            pieces.setdefault(piece, []).append((value[1], Shape(value[4], read_integers(value[5]))))
    if not pieces:
        raise ValueError("no buffers: this is not XLA's text on the buffers of a program")
    chosen: list[tuple[int, int, int]] = []
    for negative, number, offset in sorted(pieces):
        if len(chosen) == count:
            break
        overlaps = any(a == number and o < offset - negative and offset < o - n for n, a, o in chosen)
        if not overlaps:
            chosen.append((negative, number, offset))
    return [_describe(-n, pieces[n, a, o], a in arguments, lines, sources) for n, a, o in chosen]


def _describe(
    size: int,
    values: list[tuple[str, Shape]],
    is_argument: bool,
    lines: Mapping[str, Instruction],
    sources: Sources,
) -> Buffer:
    def telling(value: tuple[str, Shape]) -> tuple[int, bool, int]:
        line = lines.get(value[0])
        source = "" if line is None else sources.find(line)
        return value[1].size_bytes, source.startswith("mtx/"), 0 if line is None else len(operation(line))

    name, shape = max(values, key=telling)
    line = lines.get(name)
    return Buffer(
        size_bytes=size,
        shape=shape,
        is_argument=is_argument,
        origin=name if line is None else operation(line) or name,
        source="" if line is None else sources.find(line),
    )
