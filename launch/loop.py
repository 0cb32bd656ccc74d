"""Attempts at a job, one after the other, until it is done or not worth another one.

Decides what is recorded of each attempt. What an exit code leads to is decided in `launch.restarts`; how processes get
to where they run, in `launch/targets`.

Invariant: nothing of an earlier attempt is overwritten.
"""

from __future__ import annotations

import shlex
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

from launch import record, restarts
from launch.job import ATTEMPTS, LOGS, Job
from launch.processes import Attempt, Start
from launch.stream import say

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
PREFLIGHT = "preflight"


class Place:
    """Where the processes of a job run. A target has a class of its own; this one says what is usual."""

    def wait_until_ready(self, stopping: Callable[[], bool]) -> None:
        """Returns when an attempt can begin, or when `stopping()` is true. Tells whom it waits for.

        Raises:
            LaunchError: It never can.
        """

    def starts(self, command: Sequence[str], logs: Path) -> list[Start]:
        """What to start here so that the command runs in all processes; `logs` is the folder of the attempt.

        Raises:
            LaunchError: It cannot be started.
        """
        raise NotImplementedError

    def trouble(self, logs: Path) -> str | None:
        """Why the attempt should end, where exit codes do not say so; None: it should not. Asked every second."""

    def codes(self, logs: Path, codes: list[int], own: list[int]) -> list[int]:
        """The exit codes that say how the attempt ended.

        Args:
            codes: Of all that was started here, in the order of `starts`.
            own: Of what was not ended from here.
        """
        return own

    def clean_up(self, logs: Path) -> None:
        """After an attempt: returns when nothing of it can write any more."""


class Loop:
    """The attempts of one submission."""

    def __init__(self, job: Job, place: Place, *, carries_on: bool = False) -> None:
        """Args: carries_on: Whether a scheduler started this loop after another one of the same job: then failures
        of that one count."""
        self.job, self.place = job, place
        self.folder = Path(job.run_dir)
        self.signals: list[int] = []
        """Those that asked to stop, in the order they came."""
        self._carries_on = carries_on

    def run(self) -> int:
        """The exit code that the job ended with.

        Raises:
            LaunchError: It cannot be started.
            OSError: The run directory cannot be written.
        """
        heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # nohup
        previous = {number: signal.signal(number, self._handle) for number in heard}
        try:
            if self.job.preflight:
                self.place.wait_until_ready(lambda: bool(self.signals))
                code = restarts.telling(self._attempt(self.job.preflight_command, PREFLIGHT)[1])
                if code or self.signals:
                    say(f"the hosts are not ready: {restarts.describe(code)}; no attempt was started")
                    return restarts.as_exit(code) or restarts.PREEMPTED
            return self._repeat()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _repeat(self) -> int:
        job = self.job
        newest = restarts.newest_step(job.run_dir)
        failures = restarts.failures_recorded(self.folder / ATTEMPTS, newest) if self._carries_on else 0
        while True:
            self.place.wait_until_ready(lambda: bool(self.signals))
            begin = time.monotonic()
            codes, own = self._attempt(job.process_command) if not self.signals else ([], [-signal.SIGTERM])
            seconds = time.monotonic() - begin
            reached = restarts.newest_step(job.run_dir)
            progress = reached is not None and (newest is None or reached > newest)
            newest = reached if progress else newest
            failures = 1 if progress else failures + 1
            decision = restarts.decide(
                own,
                stopping=bool(self.signals),
                failures=failures,
                max_restarts=job.max_restarts,
                backoff_s=job.backoff_s,
            )
            record.try_append(
                self.folder,
                event="ended",
                codes=codes,
                seconds=seconds,
                newest_step=reached,
                failures=failures,
                reason=decision.reason,
            )
            if decision.restart:
                when = f"in {decision.wait_s:.0f} s" if decision.wait_s else "at once"
                say(f"{decision.reason}; newest checkpoint: {_or_none(reached)}; starts again {when}")
                self._wait(decision.wait_s)
            if not decision.restart or self.signals:
                say(f"{decision.reason}; ends with exit code {decision.code}")
                return decision.code

    def _attempt(self, command: Sequence[str], kind: str = "attempt") -> tuple[list[int], list[int]]:
        """The exit codes of one attempt: of all that was started, and those that say how it ended."""
        prefix = "" if kind == "attempt" else f"{kind}-"
        names = [path.name[len(prefix) :] for path in (self.folder / LOGS).glob(f"{prefix}*")]
        number = max((int(name) for name in names if name.isdecimal()), default=0) + 1
        logs = self.folder / LOGS / f"{prefix}{number}"
        event = "started" if kind == "attempt" else kind
        attempt = Attempt(
            self.place.starts(command, logs),
            logs,
            grace_s=self.job.grace_s,
            signals=self.signals,
            say=say,
            find_trouble=lambda: self.place.trouble(logs),
        )
        say(f"{kind} {number}: {shlex.join(command)}{_times(self.job.num_processes)}")
        try:
            codes, own = attempt.run(
                lambda pids: record.try_append(self.folder, event=event, attempt=number, pids=pids)
            )
        finally:
            self.place.clean_up(logs)
        return codes, self.place.codes(logs, codes, own)

    def _wait(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not self.signals and time.monotonic() < deadline:
            time.sleep(0.05)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Passes a signal on; what a terminal sends as SIGTERM, after which a run saves."""
        self.signals.append(number if number == signal.SIGUSR1 else signal.SIGTERM)


def _times(count: int) -> str:
    return f" ({count} processes)" if count > 1 else ""


def _or_none(step: int | None) -> str:
    return "none" if step is None else f"step {step}"
