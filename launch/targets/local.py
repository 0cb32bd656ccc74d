"""This machine: all processes of a run here, started again when they fail.

Decides the environment of each process, and what is recorded of each attempt. What an exit code leads to is decided in
`launch.restarts`.

Invariant: nothing of an earlier attempt is overwritten.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from launch import restarts
from launch.job import ATTEMPTS, LOGS, Job, LaunchError, find_run_dir, keep
from launch.processes import Attempt, write

HELP = "processes on this machine, started again when they fail"

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--processes", type=int, default=1, metavar="N", help="processes of the run; default: %(default)s")
    text = "simulated CPU devices of each process; default: the machine's own, GPUs shared out evenly"
    add("--devices-per-process", type=int, metavar="M", help=text)


def make_job(args: argparse.Namespace, command: Sequence[str]) -> Job:
    """The job that the arguments describe.

    Raises:
        LaunchError: They contradict each other.
    """
    run_dir = find_run_dir(command) or args.run_dir
    if run_dir is None:
        raise LaunchError("which run directory? give `--run-dir DIR`, here or in the command")
    for name, value, least in (
        ("--processes", args.processes, 1),
        ("--devices-per-process", args.devices_per_process or 1, 1),
        ("--max-restarts", args.max_restarts, 0),
        ("--backoff-s", args.backoff_s, 0),
        ("--grace-s", args.grace_s, 0),
    ):
        if value < least:
            raise LaunchError(f"{name} {value}: {least} or more")
    if args.devices_per_process is not None and any(word.startswith("--cpu-devices") for word in command):
        raise LaunchError("--devices-per-process and the command's own --cpu-devices say the same: give one of them")
    return Job(
        command=tuple(command),
        run_dir=run_dir,
        num_processes=args.processes,
        devices_per_process=args.devices_per_process,
        max_restarts=args.max_restarts,
        backoff_s=args.backoff_s,
        grace_s=args.grace_s,
    )


def render(job: Job) -> str:
    """What each process is started with, a shell line each; PORT stands for a free one."""
    lines = []
    for index in range(job.num_processes):
        words = [f"{name}={value}" for name, value in coordinates(job, index, "PORT").items()]
        lines.append(shlex.join([*words, *job.process_command]))
    return "\n".join(lines)


def coordinates(job: Job, index: int, port: object) -> dict[str, str]:
    """What process `index` is told of the others; nothing where it is alone."""
    if job.num_processes == 1:
        return {}
    return {
        "MTX_COORDINATOR": f"127.0.0.1:{port}",
        "MTX_NUM_PROCESSES": str(job.num_processes),
        "MTX_PROCESS_ID": str(index),
    }


def visible_gpus(job: Job, index: int, gpus: Sequence[str]) -> dict[str, str]:
    """The share of this machine's GPUs that process `index` sees; all of them where it is alone.

    Raises:
        LaunchError: They cannot be shared out evenly.
    """
    simulated = job.devices_per_process is not None or any(w.startswith("--cpu-devices") for w in job.command)
    if job.num_processes == 1 or simulated or not gpus:
        return {}
    share, rest = divmod(len(gpus), job.num_processes)
    if rest or not share:
        raise LaunchError(
            f"--processes {job.num_processes} cannot share {len(gpus)} GPUs evenly: choose a divisor of that, or "
            "make fewer visible (CUDA_VISIBLE_DEVICES)"
        )
    return {"CUDA_VISIBLE_DEVICES": ",".join(gpus[index * share : (index + 1) * share])}


def find_gpus(environment: Mapping[str, str]) -> list[str]:
    """The GPUs that this process may use, as CUDA names them."""
    if environment.get("JAX_PLATFORMS") == "cpu":
        return []
    if "CUDA_VISIBLE_DEVICES" in environment:
        return [name for name in environment["CUDA_VISIBLE_DEVICES"].split(",") if name.strip()]
    return [str(number) for number, _ in enumerate(Path("/dev").glob("nvidia[0-9]*"))]


def submit(job: Job) -> int:
    """Runs the job, again and again, until it is done or not worth another attempt; its exit code.

    Raises:
        LaunchError: It cannot be started.
    """
    if shutil.which(job.command[0]) is None:
        raise LaunchError(f"{job.command[0]}: no such program; activate its environment, or give its whole path")
    try:
        keep(job)
        return _Loop(job).run()
    except OSError as error:
        raise LaunchError(f"{error.filename or job.run_dir}: {error.strerror}; no attempt can be started") from None


class _Loop:
    """The attempts of one submission."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.folder = Path(job.run_dir)
        self.signals: list[int] = []

    def run(self) -> int:
        heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # nohup
        previous = {number: signal.signal(number, self._handle) for number in heard}
        try:
            newest, failures = restarts.newest_step(self.job.run_dir), 0
            while True:
                begin = time.monotonic()
                codes, own = self._run_attempt()
                seconds = time.monotonic() - begin
                reached = restarts.newest_step(self.job.run_dir)
                progress = reached is not None and (newest is None or reached > newest)
                newest = reached if progress else newest
                failures = 1 if progress else failures + 1
                decision = restarts.decide(
                    own,
                    stopping=bool(self.signals),
                    failures=failures,
                    max_restarts=self.job.max_restarts,
                    backoff_s=self.job.backoff_s,
                )
                self._record(event="ended", codes=codes, seconds=seconds, newest_step=reached, reason=decision.reason)
                if decision.restart:
                    when = f"in {decision.wait_s:.0f} s" if decision.wait_s else "at once"
                    say(f"{decision.reason}; newest checkpoint: {_or_none(reached)}; starts again {when}")
                    self._wait(decision.wait_s)
                if not decision.restart or self.signals:
                    say(f"{decision.reason}; ends with exit code {decision.code}")
                    return decision.code
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _run_attempt(self) -> Any:
        """The exit codes of one attempt; of all processes, and of those that ended by themselves."""
        job, gpus, port = self.job, find_gpus(os.environ), _free_port()
        commands = [
            (job.process_command, {**os.environ, **coordinates(job, i, port), **visible_gpus(job, i, gpus)})
            for i in range(job.num_processes)
        ]
        logs = self.folder / LOGS
        taken = [int(path.name) for path in logs.glob("*") if path.name.isdecimal()]
        number = max(taken, default=0) + 1
        attempt = Attempt(commands, logs / str(number), grace_s=job.grace_s, signals=self.signals, say=say)
        say(f"attempt {number}: {shlex.join(job.process_command)}" + _times(job.num_processes))
        return attempt.run(lambda pids: self._record(event="started", attempt=number, pids=pids))

    def _record(self, **fields: Any) -> None:
        """Appends to the record of attempts; on a full disk the run matters more."""
        line = json.dumps({"time": time.time(), "host": socket.gethostname(), **fields})
        try:
            with (self.folder / ATTEMPTS).open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            say(f"{self.folder / ATTEMPTS} cannot be written: {error.strerror}")

    def _wait(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not self.signals and time.monotonic() < deadline:
            time.sleep(0.05)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Passes a signal on; what a terminal sends as SIGTERM, after which a run saves."""
        self.signals.append(number if number == signal.SIGUSR1 else signal.SIGTERM)


def say(line: str) -> None:
    """Tells the user, apart from what the processes print."""
    write(sys.stderr, f"launch: {line}\n")


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _times(count: int) -> str:
    return f" ({count} processes)" if count > 1 else ""


def _or_none(step: int | None) -> str:
    return "none" if step is None else f"step {step}"
