"""How long an attempt takes from the start of its process to its first loss, by what it was doing.

Decides nothing about the run. Invariant: the parts add up to the whole.
"""

from __future__ import annotations

import os
import time
from pathlib import Path


class Startup:
    """Seconds from the start of the process, one part after the other."""

    def __init__(self) -> None:
        """What came before is the part `python`: the interpreter and the command line."""
        self.parts: dict[str, float] = {}
        self._last = time.perf_counter() - _seconds_of_process()
        self.end("python")

    def end(self, part: str) -> None:
        """Counts the time since the last call to a part; to what it has, if it has been counted before."""
        now = time.perf_counter()
        self.parts[part] = self.parts.get(part, 0.0) + now - self._last
        self._last = now

    @property
    def seconds(self) -> float:
        """All parts together."""
        return sum(self.parts.values())


def _seconds_of_process() -> float:
    """The age of this process, to a hundredth; 0 where the system does not say."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        return 0.0
    began = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - began
