"""Shards of work, each one command that can be repeated: a pool of slots works them off, then one command merges.

    exit code 0        the task is done
    a final one, as 2  would only be repeated: all others are ended, and the array ends with that code
    6, on a host       the host was lost: the task goes back, and the host rests
    anything else      the task failed: it is tried again, on another host where there is one, after a pause

Decides which task runs where and how often. Which codes are final, `launch.restarts` decides; how a command gets to a
host, the words of its slot.

Invariant: the merge begins only when every shard is done, and when `run` returns or raises nothing of it runs any more.
"""

from __future__ import annotations

import os
import selectors
import shlex
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from launch import record, restarts, stream
from launch.job import LOGS, Job
from launch.loop import SIGNALS
from launch.processes import ALL_LOG, LOOK_S, POLL_S, Process, Start
from launch.stream import say

MERGE = "merge"
"""What the last command is called, beside the numbers of the tasks."""


def shard_command(job: Job, task: int) -> tuple[str, ...]:
    """The command of one task, counted from 0."""
    return (*job.command, "--shard", f"{task}/{job.tasks}")


def merge_command(job: Job) -> tuple[str, ...]:
    """What makes one thing of all shards."""
    return (*job.command, "--merge")


def render(job: Job) -> str:
    """The commands, a shell line each."""
    commands = [shard_command(job, task) for task in range(job.tasks or 0)]
    return "\n".join(shlex.join(command) for command in [*commands, merge_command(job)])


def run(job: Job, slots: Sequence[Sequence[str]]) -> int:
    """Works off all tasks, then merges; the exit code: 0, that of the task that ended it, or 4 when asked to stop.

    What tasks print is shown with `[TASK] ` before each line, and kept in `RUN_DIR/logs/ATTEMPT/TASK.log`, of later
    tries in `TASK-TRY.log`.

    Args:
        slots: Words that come before a command, for each place where one can run at a time. Equal words are the same
            host. No words are this machine, whose cores its slots share out.

    Raises:
        LaunchError: A command cannot be executed.
        OSError: The logs cannot be written.
    """
    pool = _Pool(job, slots)
    heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # nohup
    previous = {number: signal.signal(number, pool.hear) for number in heard}
    try:
        return pool.run()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@dataclass
class _Task:
    name: str
    command: tuple[str, ...]
    tries: int = 0
    failures: int = 0
    ready: float = 0.0
    failed_on: tuple[str, ...] | None = None


@dataclass
class _Host:
    losses: int = 0
    """In a row."""
    ready: float = 0.0
    given_up: bool = False


@dataclass
class _Running:
    task: _Task
    process: Process
    begin: float
    listens: bool = field(default=True)


class _Pool:
    """The slots and what runs in them."""

    def __init__(self, job: Job, slots: Sequence[Sequence[str]]) -> None:
        self._job, self._slots = job, [tuple(words) for words in slots]
        self._hosts = {words: _Host() for words in self._slots}
        self._running: dict[int, _Running] = {}
        self._folder = Path(job.run_dir)
        folders = (self._folder / LOGS).glob("*")
        self._attempt = max((int(path.name) for path in folders if path.name.isdecimal()), default=0) + 1
        self._logs = self._folder / LOGS / str(self._attempt)
        self._signals: list[int] = []
        self._passed_on = 0
        self._deadline: float | None = None
        """When what still runs is killed."""
        self._code: int | None = None
        """What the array ends with, as soon as it is known before all is done."""

    def hear(self, number: int, frame: FrameType | None) -> None:
        """Every signal asks to stop."""
        self._signals.append(number)

    def run(self) -> int:
        """See `run`."""
        job, begin = self._job, time.monotonic()
        self._logs.mkdir(parents=True)
        say(f"{job.tasks} tasks, {len(self._slots)} at a time: {shlex.join(shard_command(job, 0))}")
        record.try_append(self._folder, event="started", attempt=self._attempt, pids=[])
        self._common = stream.Log(self._logs / ALL_LOG, say)
        self._selector = selectors.DefaultSelector()
        try:
            tasks = [_Task(str(number), shard_command(job, number)) for number in range(job.tasks or 0)]
            code = self._work(tasks) or self._work([_Task(MERGE, merge_command(job))])
        finally:
            for running in self._running.values():
                running.process.send(signal.SIGKILL)
            for running in self._running.values():
                running.process.finish()
            self._selector.close()
            self._common.close()
        reason = "stopped as asked" if self._signals and code else restarts.describe(code)
        fields = {"codes": [code], "seconds": time.monotonic() - begin, "newest_step": None, "failures": 0}
        record.try_append(self._folder, event="ended", **fields, reason=reason)
        say(f"{reason}; ends with exit code {code}")
        return code

    def _work(self, waiting: list[_Task]) -> int:
        """Runs tasks to their ends; 0 when all are done."""
        count, done, looked = len(waiting), 0, time.monotonic()
        while self._running or (waiting and self._code is None):
            self._heed_signals()
            if self._code is None:
                self._start_ready(waiting)
            for key, _ in self._selector.select(POLL_S):
                if not key.data.process.read():
                    self._deafen(key.data)
            if time.monotonic() > looked + LOOK_S:
                looked = time.monotonic()
                for running in self._running.values():
                    running.process.show_life()
            for slot in [slot for slot, running in self._running.items() if not running.process.runs()]:
                if self._ended(slot, waiting):
                    done += 1
                    if count > 1:
                        say(f"{done} of {count} done")
            if self._code is None and all(host.given_up for host in self._hosts.values()):
                say("no host is left")
                self._code = restarts.STALLED
            if self._deadline is not None and time.monotonic() > self._deadline:
                self._deadline = time.monotonic() + self._job.grace_s
                self._send_all(signal.SIGKILL)
        return 0 if done == count else self._code or 0

    def _start_ready(self, waiting: list[_Task]) -> None:
        now = time.monotonic()
        for slot, words in enumerate(self._slots):
            host = self._hosts[words]
            if slot in self._running or host.given_up or now < host.ready:
                continue
            elsewhere = {other for other, state in self._hosts.items() if other != words and not state.given_up}
            for task in waiting:
                if now >= task.ready and not (task.failed_on == words and elsewhere):
                    waiting.remove(task)
                    self._start(slot, task)
                    break

    def _start(self, slot: int, task: _Task) -> None:
        words = self._slots[slot]
        task.tries += 1
        start = Start(
            words=[*words, *task.command],
            environment={**os.environ, **dict(self._job.environment)},
            name=task.name if task.tries == 1 else f"{task.name}-{task.tries}",
            label=task.name,
            cores=() if words else _share_of_cores(slot, len(self._slots)),
        )
        running = _Running(task, Process(start, self._logs, self._common, say), time.monotonic())
        self._running[slot] = running
        self._selector.register(running.process.output, selectors.EVENT_READ, running)

    def _ended(self, slot: int, waiting: list[_Task]) -> bool:
        """Looks at what has ended in a slot; whether its task is done."""
        running, words = self._running.pop(slot), self._slots[slot]
        task, host, now = running.task, self._hosts[words], time.monotonic()
        self._deafen(running)
        running.process.send(signal.SIGKILL)  # what it may have left behind
        running.process.finish()
        code = running.process.code()
        record.try_append(
            self._folder, event="task", task=task.name, attempt=task.tries, code=code, seconds=now - running.begin
        )
        if code == restarts.DONE:
            host.losses = 0
            return True
        if self._code is not None:  # ended by us, or not wanted any more
            return False
        what = f"task {task.name}: {restarts.describe(code)}"
        if code in restarts.FINAL:
            say(f"{what}; the others are ended")
            self._stop(code)
            return False
        if code == restarts.STALLED and words:
            host.losses += 1
            host.given_up = host.losses > self._job.max_restarts
            host.ready = now + self._pause(host.losses)
            say(f"{what}; goes back, its host {'is given up' if host.given_up else 'rests'}")
        else:
            task.failures += 1
            task.failed_on = words
            task.ready = now + self._pause(task.failures)
            if task.failures > self._job.max_restarts:
                say(f"{what}; given up: it failed {task.failures} times")
                self._stop(restarts.as_exit(code))
                return False
            say(f"{what}; tried again in {task.ready - now:.0f} s")
        waiting.insert(0, task)
        return False

    def _pause(self, failures: int) -> float:
        """Seconds before the next try."""
        return min(restarts.LONGEST_BACKOFF_S, self._job.backoff_s * 2.0 ** (failures - 1))

    def _stop(self, code: int) -> None:
        """Nothing is started any more, and what runs is ended."""
        self._code = code
        self._deadline = time.monotonic() + self._job.grace_s
        self._send_all(signal.SIGTERM)

    def _heed_signals(self) -> None:
        heard, self._passed_on = len(self._signals) - self._passed_on, len(self._signals)
        if heard and self._code is None:
            say("asked to stop: what is done is kept, and the same command goes on")
            self._stop(restarts.PREEMPTED)
        elif heard:
            say("asked to stop again: the tasks are killed")
            self._send_all(signal.SIGKILL)

    def _send_all(self, number: int) -> None:
        for running in self._running.values():
            running.process.send(number)

    def _deafen(self, running: _Running) -> None:
        if running.listens:
            self._selector.unregister(running.process.output)
            running.listens = False


def _share_of_cores(slot: int, slots: int) -> list[int]:
    """So that commands that use all cores they may run on do not crowd each other out; empty: there are too few."""
    cores = sorted(os.sched_getaffinity(0))
    return cores[slot * len(cores) // slots : (slot + 1) * len(cores) // slots]
