"""Reads the collectives of a compiled program from its HLO text."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

KINDS = ("all-reduce", "reduce-scatter", "all-gather", "all-to-all", "collective-permute")
_OPERATION = re.compile(rf"^\s*(?:ROOT )?%?[\w.-]+ = (.*?) ({'|'.join(KINDS)})(?:-start)?\((.*)$")
_CALLED = re.compile(r"(?:to_apply|calls|body|condition|branch_computations)=\{?((?:%[\w.-]+(?:, )?)+)")


@dataclass(frozen=True)
class Collective:
    """One operation.

    Attributes:
        kind: One of KINDS.
        shapes: Of its results; XLA may join several exchanges into one operation.
        groups: Devices that exchange with each other, as the text has them.
        looped: Whether it is inside the body of a loop.
    """

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    groups: str
    looped: bool

    @property
    def group_size(self) -> int:
        """Devices in a group: {{0,1},{2,3}}, [groups,devices]<=[...] or mesh['a'=2,'b'=4] {'b'}."""
        if self.groups.startswith("mesh"):
            sizes = dict(re.findall(r"'(\w+)'=(\d+)", self.groups))
            return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", self.groups[self.groups.index("{") :]))
        if self.groups.startswith("{"):
            return len(self.groups[2 : self.groups.index("}")].split(","))
        return int(self.groups[1 : self.groups.index("]")].split(",")[-1])


def read_collectives(text: str) -> list[Collective]:
    """Every collective of a program."""
    computations: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if header := re.match(r"^(?:ENTRY )?%?([\w.-]+) .*\{$", line):
            lines = computations.setdefault(header[1], [])
        else:
            lines.append(line)
    calls = {
        name: set(re.findall(r"%([\w.-]+)", " ".join(_CALLED.findall("\n".join(body)))))
        for name, body in computations.items()
    }
    looped = set(re.findall(r" body=%?([\w.-]+)", text))
    assert looped or " while(" not in text
    while more := {callee for name in looped for callee in calls[name]} - looped:
        looped |= more
    found = []
    for name, body in computations.items():
        for match in filter(None, map(_OPERATION.match, body)):
            shapes = tuple(
                tuple(map(int, filter(None, dims.split(",")))) for dims in re.findall(r"\w+\[([\d,]*)\]", match[1])
            )
            groups = re.search(r"replica_groups=(\{\{.*?\}\}|\[[^ ]*|mesh\[.*?\{.*?\})", match[3])
            assert groups, match[0]
            found.append(Collective(match[2], shapes, groups[1], name in looped))
    assert len(found) == len(re.findall(rf" (?:{'|'.join(KINDS)})(?:-start)?\(", text))
    return found
