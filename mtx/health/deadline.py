"""The wall-clock limit of a run: how long until it must have stopped.

Decides which clock counts: a duration is measured by the age of the process, which no change of the date touches; a
time of day by the clock on the wall, which is what it means.
"""

from __future__ import annotations

import os
import time
from datetime import datetime

from mtx.config.deadline import parse_stop_before
from mtx.errors import UserError


class Deadline:
    """`Train.stop_before`."""

    def __init__(self, stop_before: float | str) -> None:
        """Starts counting, for a duration from the start of the process.

        Args:
            stop_before: See `parse_stop_before`.

        Raises:
            UserError: It has passed.
        """
        self._limit = parse_stop_before(stop_before)
        self._born = time.monotonic() - _process_age_s()
        self.cause = f"Train.stop_before = {stop_before!r}"
        if self.remaining_seconds() <= 0:
            raise UserError(f"{self.cause} has passed: set a later one, or Train.stop_before = None")

    def remaining_seconds(self) -> float:
        """Seconds until then; negative afterwards."""
        if isinstance(self._limit, datetime):
            return self._limit.timestamp() - time.time()
        return self._born + self._limit - time.monotonic()


def _process_age_s() -> float:
    """Seconds since this process was started, imports and all (proc_pid_stat(5), field 22)."""
    with open("/proc/self/stat", encoding="utf-8", errors="replace") as file:
        started_ticks = int(file.read().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started_ticks / os.sysconf("SC_CLK_TCK")
