"""`python -m launch.allocation FILE`: the loop of a job inside the hosts that Slurm has given it.

Decides how processes get from the first host to all of them: one `srun` an attempt with one `launch.worker` on each
host, which sees all of the host's GPUs and starts the processes itself. Signals and signs of life go through the
standard input of `srun`, since `srun` itself answers SIGTERM by killing everything; a host that hears nothing any more
ends its processes, so that none writes into a run that Slurm has started again elsewhere.

Invariant: an attempt begins only while Slurm says that the job runs, and when no task of the last one is left.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch import nodes, worker
from launch.coordinates import join_address
from launch.hostlist import expand_hosts
from launch.job import Job, LaunchError, read
from launch.loop import Loop, Place
from launch.processes import Start
from launch.restarts import PREEMPTED
from launch.stream import say

ASK_S = 60.0
"""That Slurm's commands have to answer: a busy controller takes its time."""
PROBE_S = 120.0
"""That the first host has to tell of itself: an interpreter on a shared file system starts slowly."""

WATCH_S = 15.0
"""Between two questions whether the hosts are still the job's."""

_OURS = ("RUNNING", "CONFIGURING", "SUSPENDED", "SIGNALING")


@dataclass(frozen=True)
class SlurmJob(Job):
    """A job that Slurm gives hosts to.

    Attributes:
        partition, account, qos, constraint, exclude, reservation, mem: As `sbatch` takes them; None: its defaults.
        time_limit: As `sbatch --time` takes it; None: the partition's.
        cpus_per_node: Cores of each host, which others may share; None: whole hosts (of an array: a task's cores).
        warn_s: Seconds before the time limit at which the run is told to save and is queued again; 0: it is not told.
        sbatch_options: More options of `sbatch`, after all others.
        wait: Whether the one who submits waits for the end.
        life_line_s: Seconds without a word of the loop after which a host ends its processes.
    """

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time_limit: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    reservation: str | None = None
    cpus_per_node: int | None = None
    mem: str | None = None
    warn_s: int = 120
    sbatch_options: tuple[str, ...] = ()
    wait: bool = False
    life_line_s: float = 60.0


def from_fields(fields: Mapping[str, Any]) -> SlurmJob:
    """The job whose fields were kept as JSON, which has no tuples."""
    tuples = {
        "command": tuple(fields["command"]),
        "environment": tuple((name, value) for name, value in fields["environment"]),
        "sbatch_options": tuple(fields["sbatch_options"]),
    }
    return SlurmJob(**{**fields, **tuples})


def package_path(environment: Mapping[str, str]) -> str:
    """PYTHONPATH with the folder of this package in front; `launch.worker.forget_path` takes it away again."""
    root = str(Path(__file__).resolve().parents[1])
    return os.pathsep.join(filter(None, (root, environment.get("PYTHONPATH"))))


def ask(*words: str) -> subprocess.CompletedProcess[str]:
    """What a command of Slurm answers.

    Raises:
        LaunchError: It is not there, or does not answer.
    """
    try:
        return subprocess.run(
            words, capture_output=True, text=True, errors="replace", timeout=ASK_S, stdin=subprocess.DEVNULL
        )
    except FileNotFoundError:
        raise LaunchError(f"{words[0]}: no such program; a login node of a Slurm cluster has it") from None
    except subprocess.TimeoutExpired:
        raise LaunchError(
            f"{words[0]} has not answered for {ASK_S:.0f} s: is slurmctld well? (scontrol ping)"
        ) from None


def srun_words(job: SlurmJob, name: str, *, hosts: int) -> list[str]:
    """What starts one task on each of the first hosts, up to its command.

    Nothing is left to SLURM_* and site defaults that would bind the task to some cores or GPUs, or end the step early.
    """
    words = [
        "srun", f"--nodes={hosts}", f"--ntasks={hosts}", "--ntasks-per-node=1", "--relative=0", f"--job-name={name}",
        "--export=ALL", "--input=all", "--cpu-bind=none", "--mpi=none", "--kill-on-bad-exit=0", "--wait=0", "--overlap",
    ]  # fmt: skip
    if job.gpus_per_node:
        words.append(f"--gpus-per-node={job.gpus_per_node}")
    if job.cpus_per_node is not None:
        words.append(f"--cpus-per-task={job.cpus_per_node}")
    return words


def worker_words(job: SlurmJob, coordinator: str, logs: str, command: Sequence[str]) -> list[str]:
    """What `srun` starts on each host."""
    where = ["--node-variable", "SLURM_NODEID", f"--logs={logs}"]
    words = worker.arguments(job, coordinator, where=where, life_line_s=job.life_line_s)
    return [job.python, *words, "--", *command]


class Allocation(Place):
    """The hosts that Slurm has given to the job that this process is part of."""

    def __init__(self, job: SlurmJob, environment: Mapping[str, str]) -> None:
        """Raises: LaunchError: There are fewer than the job wants."""
        self._job, self._number = job, environment["SLURM_JOB_ID"]
        self._environment = {**environment, **dict(job.environment)}
        self._environment["PYTHONPATH"] = package_path(self._environment)
        hosts = environment.get("SLURM_JOB_NODELIST") or environment.get("SLURM_NODELIST", "")
        self._hosts = expand_hosts(hosts)[: job.num_nodes]
        if len(self._hosts) < job.num_nodes:
            raise LaunchError(
                f"--nodes {job.num_nodes}: this allocation, job {self._number}, has {len(self._hosts)} ({hosts}); "
                "take fewer, or allocate more"
            )
        self._step = f"mtx-{socket.gethostname()}-{os.getpid()}"
        """Name of the steps of this loop, by which those that are left over are found."""
        self._began = 0.0
        self._restarts = environment.get("SLURM_RESTART_COUNT", "0")
        self._lost: str | None = None
        threading.Thread(target=self._watch, daemon=True).start()

    def wait_until_ready(self, stopping: Callable[[], bool]) -> None:
        """An allocation that is ending takes no new attempt: that is the same as being told to stop."""
        reason = self._find_end()
        if reason is not None and not stopping():
            say(f"{reason}: no attempt is started any more")
            signal.raise_signal(signal.SIGTERM)

    def _find_end(self) -> str | None:
        """Why the hosts are not this loop's any more; None: they are, or Slurm does not say."""
        try:
            answer = ask("scontrol", "--oneliner", "show", "job", self._number)
        except LaunchError:  # a controller that is started again is none of a run's business
            return None
        fields = dict(word.partition("=")[::2] for word in answer.stdout.split() if "=" in word)
        state = fields.get("JobState", "RUNNING")
        if state not in _OURS:
            return f"Slurm has ended this allocation (job {self._number} is {state.lower()})"
        if fields.get("Restarts", self._restarts) != self._restarts:
            return f"Slurm has started job {self._number} again elsewhere"
        return None

    def _watch(self) -> None:
        """A host that Slurm has lost goes on running: it finds out here. Not in `trouble`, which must not wait."""
        while self._lost is None:
            time.sleep(WATCH_S)
            self._lost = self._find_end()

    def starts(self, command: Sequence[str], logs: Path) -> list[Start]:
        """One `srun` with one worker on each host.

        Raises:
            LaunchError: The first host does not tell its address and a port.
        """
        job, folder = self._job, str(Path(self._job.working_directory, logs))
        found = self._probe()
        coordinator = join_address(str(found["address"]), found["port"])
        self._began = time.monotonic()
        return [
            Start(
                words=[
                    *srun_words(job, self._step, hosts=job.num_nodes),
                    *worker_words(job, coordinator, folder, command),
                ],
                environment=self._environment,
                name=None,
                greeting=json.dumps({"environment": {}}),
            )
        ]

    def trouble(self, logs: Path) -> str | None:
        """A host that does not begin, or whose processes failed: `srun` waits for the others without an end."""
        seconds = time.monotonic() - self._began
        return self._lost or nodes.find_trouble(logs, self._hosts, seconds, self._job.start_timeout_s)

    def codes(self, logs: Path, codes: list[int], own: list[int]) -> list[int]:
        """What the hosts have told; where one has not, what `srun` ended with counts as well."""
        told = [node for node in nodes.read_nodes(logs).values() if node.codes is not None]
        return nodes.own_codes(logs) + ([] if len(told) == len(self._hosts) else own)

    def clean_up(self, logs: Path) -> None:
        """Ends what is left of the step. A host that cannot be reached has ended its processes itself by the time that
        this gives up: it has heard nothing for that long."""
        deadline = time.monotonic() + self._job.life_line_s + 2 * self._job.grace_s + 10
        told = False
        while time.monotonic() < deadline:
            answer = ask("squeue", "--noheader", "--steps", f"--jobs={self._number}", "--format=%i %j")
            left = [line.split()[0] for line in answer.stdout.splitlines() if line.split()[1:] == [self._step]]
            if answer.returncode == 0 and not left:
                return
            if left and not told:
                say(f"step {', '.join(left)} still has tasks: they are killed")
                told = True
            if left:
                ask("scancel", "--signal=KILL", *left)
            time.sleep(0.5)

    def _probe(self) -> dict[str, Any]:
        """What the first host says of itself."""
        job = self._job
        peers = [_reachable(name) for name in self._hosts[1:2]]
        words = [*srun_words(job, f"{self._step}-probe", hosts=1), job.python, "-m", "launch.worker", "--probe", *peers]
        try:
            done = subprocess.run(
                words, capture_output=True, text=True, timeout=PROBE_S, env=self._environment, stdin=subprocess.DEVNULL
            )
        except FileNotFoundError:
            raise LaunchError("srun: no such program on the host that this runs on") from None
        except subprocess.TimeoutExpired:
            raise LaunchError(f"host {self._hosts[0]} has not started a task for {PROBE_S:.0f} s") from None
        try:
            found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        except (IndexError, ValueError):
            told = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()[-1]
            raise LaunchError(f"host {self._hosts[0]} does not start a task: {told}") from None
        return found


def _reachable(name: str) -> str:
    """A host's name where it resolves, else the address that Slurm reaches it by."""
    try:
        socket.getaddrinfo(name, None)
        return name
    except OSError:
        answer = ask("scontrol", "--oneliner", "show", "node", name)
        found = [word.partition("=")[2] for word in answer.stdout.split() if word.startswith("NodeAddr=")]
        return found[0] if found else name


def main(path: str) -> int:
    """Runs the loop of a job where Slurm has started it; the exit code."""
    worker.forget_path(os.environ)
    try:
        _, fields = read(Path(path))
        return run(from_fields(fields), path)
    except LaunchError as error:
        print(f"launch: {error}", file=sys.stderr, flush=True)
        return error.exit_code


def run(job: SlurmJob, path: str | None = None) -> int:
    """The loop, in the allocation that this process is part of; the exit code.

    Args:
        path: File of the job, where it was submitted: then it is queued again when its time was over.

    Raises:
        LaunchError: It cannot be started.
    """
    restarted = os.environ.get("SLURM_RESTART_COUNT", "0") != "0"
    loop = Loop(job, Allocation(job, os.environ), carries_on=restarted)
    code = loop.run()
    if path is not None and code == PREEMPTED and set(loop.signals) == {signal.SIGUSR1}:
        number = os.environ["SLURM_JOB_ID"]
        answer = ask("scontrol", "requeue", number)
        if answer.returncode:
            repeat = json.loads(Path(path).read_text(encoding="utf-8"))["repeat"]
            say(f"Slurm does not queue job {number} again ({answer.stderr.strip()}); go on with\n  {repeat}")
        else:
            say(f"the time was over: job {number} is queued again, and goes on from what was saved")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
