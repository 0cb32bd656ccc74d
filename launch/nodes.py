"""What the hosts of an attempt tell each other and the loop, through files in the folder of its logs.

    node-I.json     written by host I when it has begun, and again, with exit codes, when it has ended

Invariant: a reader sees a whole file or none.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from launch.processes import ENDED_WELL


@dataclass(frozen=True)
class Node:
    """A host of an attempt.

    Attributes:
        node: Its number.
        host: Its name.
        pid: Of what started the processes there.
        time: When it wrote this, in seconds since 1970 by its own clock.
        processes: Numbers of its processes.
        codes: Their exit codes, negative for a signal; None while they run.
        own: Of these, the codes of those that were not ended from outside.
    """

    node: int
    host: str
    pid: int
    time: float
    processes: list[int]
    codes: list[int] | None = None
    own: list[int] | None = None


def announce(logs: Path, node: Node) -> None:
    """Tells the others.

    Raises:
        OSError: The folder cannot be written.
    """
    logs.mkdir(parents=True, exist_ok=True)
    temporary = logs / f".node-{node.node}.{os.getpid()}"
    temporary.write_text(json.dumps(asdict(node)) + "\n", encoding="utf-8")
    temporary.replace(logs / f"node-{node.node}.json")


def read_nodes(logs: Path) -> dict[int, Node]:
    """The hosts that have said something, by their numbers."""
    nodes = (Node(**json.loads(path.read_text(encoding="utf-8"))) for path in logs.glob("node-*.json"))
    return {node.node: node for node in nodes}


def find_trouble(logs: Path, hosts: Sequence[str], seconds: float, start_timeout_s: float) -> str | None:
    """Why an attempt should end: a host that does not begin, or whose processes failed; None: it need not.

    Args:
        hosts: Names, in the order of their numbers.
        seconds: Since the attempt began.
        start_timeout_s: That a host has to say that it has begun.
    """
    nodes = read_nodes(logs)
    for node in nodes.values():
        failed = [code for code in node.codes or () if code not in ENDED_WELL]
        if failed:
            return f"host {node.host}: of processes {_range(node.processes)}, {len(failed)} failed"
    missing = [name for number, name in enumerate(hosts) if number not in nodes]
    if missing and seconds > start_timeout_s:
        shown = ", ".join(missing[:8]) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
        return (
            f"{len(missing)} of {len(hosts)} hosts have not begun after {start_timeout_s:.0f} s: {shown}; look whether "
            f"they are up and see {logs}"
        )
    return None


def own_codes(logs: Path) -> list[int]:
    """The exit codes of all processes that ended by themselves, as far as their hosts have told."""
    return [code for _, node in sorted(read_nodes(logs).items()) for code in node.own or ()]


def _range(processes: Sequence[int]) -> str:
    return str(processes[0]) if len(processes) == 1 else f"{processes[0]}-{processes[-1]}"
