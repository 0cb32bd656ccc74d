"""Attempts that no loop counts: a scheduler starts the workers of a run again, and each finds out which attempt it is.

Decides when a run is given up, and how long it waits before it is tried again: host 0 does, by the record of attempts
in the run directory, and the others follow it.

    host 0   counts the attempts without progress, waits, and opens the folder RUN_DIR/logs/N of its attempt
    host I   waits for a folder of host 0 that it has not taken part in yet

Invariant: no host takes part in an attempt twice, so that none joins what host 0 has already left.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launch import record, restarts
from launch.job import ATTEMPTS, LOGS, Job
from launch.nodes import read_nodes
from launch.stream import say

POLL_S = 0.5
"""Between two looks at a file system that hosts share."""


class Unattended:
    """The attempt that a host takes part in."""

    def __init__(self, job: Job, index: int) -> None:
        """Args: index: Number of this host."""
        self._job, self._index = job, index
        self._folder = Path(job.run_dir)
        self._failures = 0
        self._newest: int | None = None

    def join(self, stopping: Callable[[], bool]) -> tuple[Path | None, int]:
        """The folder of the attempt's logs; None and an exit code where there is no attempt.

        Raises:
            OSError: The run directory cannot be read or written.
        """
        if self._index:
            return self._follow(stopping)
        self._newest = restarts.newest_step(self._job.run_dir)
        self._failures = restarts.failures_recorded(self._folder / ATTEMPTS, self._newest)
        if self._failures > self._job.max_restarts:
            reason = f"given up: {self._failures} attempts in a row without a newer checkpoint"
            say(f"{reason}; see {self._folder / LOGS}")
            self._record(event="ended", codes=[], newest_step=self._newest, failures=0, reason=reason)
            return None, restarts.GIVEN_UP
        wait_s = restarts.backoff(self._failures - 2, self._job.backoff_s)
        if wait_s:
            say(f"{self._failures} attempts in a row without a newer checkpoint: waits for {wait_s:.0f} s")
        deadline = time.monotonic() + wait_s
        while time.monotonic() < deadline and not stopping():
            time.sleep(POLL_S / 10)
        if stopping():
            return None, restarts.PREEMPTED
        number = 1 + max(_numbers(self._folder / LOGS), default=0)
        self._record(event="started", attempt=number, pids=[os.getpid()])
        return self._folder / LOGS / str(number), 0

    def ended(self, codes: list[int], own: list[int]) -> None:
        """Records how the attempt ended. Args: codes, own: As `launch.processes.Attempt.run` returns them."""
        if self._index:
            return
        code = restarts.telling(own)
        reached = restarts.newest_step(self._job.run_dir)
        progress = reached is not None and (self._newest is None or reached > self._newest)
        # What ended for good, and is submitted again, begins to count anew.
        final = code == restarts.DONE or code in restarts.FINAL
        failures = 0 if final else 1 if progress else self._failures + 1
        reason = restarts.describe(code)
        self._record(event="ended", codes=codes, newest_step=reached, failures=failures, reason=reason)

    def _follow(self, stopping: Callable[[], bool]) -> tuple[Path | None, int]:
        limit_s = self._job.start_timeout_s + restarts.backoff(self._job.max_restarts, self._job.backoff_s)
        deadline, told = time.monotonic() + limit_s, False
        while not stopping():
            logs = self._folder / LOGS
            newest = logs / str(max(_numbers(logs), default=0))
            nodes = read_nodes(newest)
            if 0 in nodes and nodes[0].codes is None and self._index not in nodes:
                return newest, 0
            if time.monotonic() > deadline:
                say(f"host 0 has begun no new attempt in {limit_s:.0f} s: see whether its pod runs, and {logs}")
                return None, restarts.STALLED
            if not told:
                say(f"waits for host 0 to begin a new attempt in {logs}")
                told = True
            time.sleep(POLL_S)
        return None, restarts.PREEMPTED

    def _record(self, **fields: Any) -> None:
        """Appends to the record of attempts; without it a run would not be given up, so it must be possible."""
        self._folder.mkdir(parents=True, exist_ok=True)
        record.append(self._folder, **fields)


def _numbers(logs: Path) -> list[int]:
    return [int(path.name) for path in logs.glob("*") if path.name.isdecimal()]
