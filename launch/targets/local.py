"""This machine: all processes of a run here, started again when they fail.

Invariant: what runs here runs as this user, with this environment, and ends with this launcher.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch import arguments, array, registry
from launch.affinity import cores_near
from launch.coordinates import LOOPBACK, coordinates, find_gpus, free_port, join_address, visible_gpus
from launch.detach import detach
from launch.environment import past_proxy
from launch.job import Job, LaunchError
from launch.loop import Loop, Place
from launch.processes import Start

HELP = "processes on this machine, started again when they fail"


@dataclass(frozen=True)
class LocalJob(Job):
    """A job on this machine.

    Attributes:
        detach: Whether the loop goes on when the terminal is closed.
    """

    detach: bool = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--processes", type=int, default=1, metavar="N", help="processes of the run; default: %(default)s")
    add("--detach", action="store_true", help="go on when this terminal is closed")


def make_job(args: argparse.Namespace, command: Sequence[str]) -> LocalJob:
    """The job that the arguments describe.

    Raises:
        LaunchError: They contradict each other.
    """
    arguments.check_least(("--processes", args.processes, 1))
    return LocalJob(processes_per_node=args.processes, detach=args.detach, **arguments.common_fields(args, command))


def render(job: Job) -> str:
    """What each process is started with, a shell line each; PORT stands for a free one."""
    if job.tasks is not None:
        return array.render(job)
    lines = []
    for index in range(job.num_processes):
        environment = [*job.environment, *coordinates(job, index, join_address(LOOPBACK, "PORT")).items()]
        settings = [f"{name}={shlex.quote(value)}" for name, value in environment]  # a quoted name sets nothing
        lines.append(" ".join([*settings, shlex.join(job.process_command)]))
    return "\n".join(lines)


def submit(job: LocalJob) -> int:
    """Runs the job, again and again, until it is done or not worth another attempt; its exit code, or 0 where it goes
    on without this process.

    Raises:
        LaunchError: It cannot be started.
    """
    if shutil.which(job.command[0]) is None:
        raise LaunchError(f"{job.command[0]}: no such program; activate its environment, or give its whole path")
    if job.detach:
        away = detach(job.run_dir)
        if away is not None:
            registry.wait_for(job.name, away[0])
            follow = f"python -m launch logs {job.name} --follow"
            print(f"launch: {job.name} goes on as process {away[0]}, its output in {away[1]}\nlaunch: follow: {follow}")
            print(f"launch: stop: python -m launch stop {job.name}", flush=True)
            return 0
    return registry.run_registered(job, "local", lambda: _run(job))


def _run(job: Job) -> int:
    if job.tasks is not None:
        return array.run(job, [[]] * (job.parallel or len(os.sched_getaffinity(0))))
    return Loop(job, Here(job)).run()


def state(record: registry.Record) -> str:
    """What a job does."""
    return registry.process_state(record)


def stop(record: registry.Record, signal_number: int) -> None:
    """Stops a job.

    Raises:
        LaunchError: It is on another machine.
    """
    registry.stop_process(record, signal_number)


def log_command(record: registry.Record) -> list[str] | None:
    """None: its log is in the run directory."""
    return None


class Here(Place):
    """This machine."""

    def __init__(self, job: Job) -> None:
        self._job = job

    def starts(self, command: Sequence[str], logs: Path) -> list[Start]:
        job, gpus = self._job, find_gpus(os.environ)
        address = join_address(LOOPBACK, free_port())
        visible = [visible_gpus(job, index, gpus) for index in range(job.num_processes)]
        shares = [own.get("CUDA_VISIBLE_DEVICES", "") for own in visible]
        return [
            Start(
                words=command,
                environment={
                    **os.environ,
                    **dict(job.environment),
                    **past_proxy({**os.environ, **dict(job.environment)}, address),
                    **coordinates(job, index, address),
                    **own,
                },
                name=str(index),
                label=str(index) if job.num_processes > 1 else "",
                cores=cores_near(shares, index),
            )
            for index, own in enumerate(visible)
        ]
