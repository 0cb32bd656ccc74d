"""Hosts that ssh reaches: how they are asked what they are, given their processes, and taken for lost.

Decides when an attempt can begin. What runs on a host is `launch.worker`, which ends its processes when it hears
nothing of the loop any more.

Invariant: an attempt begins only when every host answers and none still runs processes of the last one.
"""

from __future__ import annotations

import ipaddress
import json
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch import nodes, worker
from launch.coordinates import join_address
from launch.job import LOGS, Job, LaunchError
from launch.loop import Place
from launch.processes import ENDED_WELL, Start
from launch.restarts import STALLED
from launch.stream import say

SSH = ("ssh", "-T", "-x")
PARALLEL = 64
"""Hosts that are asked at a time."""
ASK_S = 60.0
"""That a host has to answer: an interpreter that many hosts read at once from one file system starts slowly."""
SHOWN = 8
"""Hosts that are named, where hundreds could be."""
LOST = 255
"""What ssh ends with when it has failed itself."""
PASSED_ON = ("JAX_", "MTX_", "NCCL_", "PJRT_", "XLA_")
"""Variables of the launcher that begin so are taken along: a host has only what its own login sets."""

_DEFAULTS = (
    "BatchMode=yes",
    "ConnectTimeout=10",
    "ServerAliveInterval=5",  # a cut link is noticed within 15 s
    "ServerAliveCountMax=3",
    "ControlMaster=no",  # a shared connection would end with the first of its users, and has its own limits
    "ControlPath=none",
)


@dataclass(frozen=True)
class SshJob(Job):
    """A job on hosts that ssh reaches.

    Attributes:
        hosts: As ssh is told them, in the order of the processes.
        slots: Of each host: tasks of an array that it runs at a time.
        ssh_options: `ssh -o`, before those that are usual here: ssh takes the first it sees.
        ssh_config: `ssh -F`; None: the user's own.
        life_line_s: Seconds without a word of the launcher after which a host ends its processes.
        detach: Whether the loop goes on when the terminal is closed.
    """

    hosts: tuple[str, ...] = ()
    slots: tuple[int, ...] = ()
    ssh_options: tuple[str, ...] = ()
    ssh_config: str | None = None
    life_line_s: float = 30.0
    detach: bool = False

    @property
    def gone_s(self) -> float:
        """Seconds after which a host that has been lost runs nothing of this job any more."""
        return self.life_line_s + 2 * self.grace_s + 5


def ssh_words(job: SshJob, host: str, *more: str) -> list[str]:
    """What speaks to a host, up to the command there. The user's options come first: ssh takes the first it sees."""
    config = [] if job.ssh_config is None else ["-F", job.ssh_config]
    options = [part for option in (*job.ssh_options, *_DEFAULTS) for part in ("-o", option)]
    return [*SSH, *config, *options, *more, "--", host]


def remote_command(job: SshJob, words: Sequence[str]) -> str:
    """What the shell of a host is given to run python with `words`: every value quoted."""
    paths = os.pathsep.join(filter(None, (str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH"))))
    python = shlex.join(["exec", "env", f"PYTHONPATH={paths}", job.python, *words])
    return f"cd {shlex.quote(job.working_directory)} && {python}"


def worker_command(job: SshJob, index: int, coordinator: str, logs: str, command: Sequence[str]) -> str:
    """What the shell of host `index` is given to run its processes."""
    where = ["--node", str(index), f"--logs={logs}"]
    words = worker.arguments(job, coordinator, where=where, life_line_s=job.life_line_s)
    return remote_command(job, [*words, "--", *command])


def greeting(job: SshJob) -> str:
    """The first line over the standard input of a worker: no command line shows the values of variables."""
    taken_along = {name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)}
    return json.dumps({"environment": {**taken_along, **dict(job.environment)}})


class Hosts(Place):
    """The hosts of a job."""

    def __init__(self, job: SshJob) -> None:
        self._job = job
        self._answers: dict[int, dict[str, Any]] = {}
        self._ready_once = False
        self._began = 0.0
        self._all_begun = False
        self._lost: dict[int, tuple[int | None, float]] = {}
        """Hosts that did not tell how the last attempt ended: process id of the worker, and until when it can run."""
        logs = [path for path in (Path(job.run_dir) / LOGS).glob("*") if path.name.isdecimal()]
        if logs:  # of a launcher that was killed a moment ago
            untold = {i: node for i, node in nodes.read_nodes(max(logs, key=_number)).items() if node.codes is None}
            limit = time.monotonic() + job.gone_s
            self._lost = {i: (node.pid, limit) for i, node in untold.items() if i < job.num_nodes}

    def wait_until_ready(self, stopping: Callable[[], bool]) -> None:
        """Returns when every host answers and none has processes of the last attempt, or when `stopping()` is true.

        Raises:
            LaunchError: At the first attempt: a host refuses, or does not answer within `start_timeout_s`.
        """
        job, begin, pause = self._job, time.monotonic(), 1.0
        told: dict[str, str] = {}
        self._answers = {}
        while not stopping():
            missing = [index for index in range(job.num_nodes) if index not in self._answers]
            with ThreadPoolExecutor(max_workers=PARALLEL) as pool:
                reasons = list(pool.map(lambda index: self._ask(index, stopping), missing))
            waiting = {job.hosts[index]: reason for index, reason in zip(missing, reasons) if reason is not None}
            if stopping():
                return
            if not waiting:
                self._lost.clear()
                self._ready_once = True
                return
            if waiting != told:
                say(f"waits for {len(waiting)} of {job.num_nodes} hosts: {_shown(waiting)}")
                told = waiting
            if not self._ready_once and time.monotonic() > begin + job.start_timeout_s:
                raise LaunchError(f"hosts do not answer within {job.start_timeout_s:g} s: {_shown(waiting)}")
            until = time.monotonic() + pause
            while time.monotonic() < until and not stopping():
                time.sleep(0.05)
            pause = min(10.0, 2 * pause)

    def _ask(self, index: int, stopping: Callable[[], bool]) -> str | None:
        """Why a host is not ready; None: it is, and what it answered is kept.

        Raises:
            LaunchError: At the first attempt: it never will be.
        """
        job, host = self._job, self._job.hosts[index]
        peers = [self._resolved(job.hosts[1])] if index == 0 and job.num_nodes > 1 else []
        pid, limit = self._lost.get(index, (None, 0.0))
        words = ["-m", "launch.worker", "--probe", *peers, *([] if pid is None else ["--alive", str(pid)])]
        code, answer, errors = _run([*ssh_words(job, host), remote_command(job, words)], stopping)
        lines = [line.strip() for line in errors.splitlines() if line.strip()]
        last = lines[-1] if lines else f"exit code {code}"
        if code == 0:
            try:
                found: dict[str, Any] = json.loads(answer.splitlines()[-1])
                alive = found["alive"]
            except (ValueError, LookupError, TypeError):
                code, last = 1, f"it answers {answer[-200:]!r}; its login must not print anything after our command"
            else:
                if alive:
                    return f"process {pid} of the last attempt still runs there"
                if index in self._lost and pid is None and time.monotonic() < limit:
                    return f"what may run there ends within {limit - time.monotonic():.0f} s"
                self._answers[index] = found
                return None
        final = code != LOST or any(text in errors for text in _REFUSED)
        if final and not self._ready_once and not stopping() and code != _NO_ANSWER:
            raise LaunchError(f"host {host}: {last}{_advice(errors, code, job)}")
        return last

    def _resolved(self, host: str) -> str:
        """What the user's ssh configuration calls a host; other hosts do not know his names."""
        done = subprocess.run(
            [*ssh_words(self._job, host)[:-2], "-G", "--", host], capture_output=True, text=True, check=False
        )
        names = [line.split(None, 1)[1] for line in done.stdout.splitlines() if line.startswith("hostname ")]
        if done.returncode or not names:
            raise LaunchError(f"ssh -G {host}: {(done.stderr.strip().splitlines() or ['no answer'])[-1]}")
        if names[0].startswith("-"):
            raise LaunchError(f"host {host}: its HostName is {names[0]!r}")
        return names[0]

    def starts(self, command: Sequence[str], logs: Path) -> list[Start]:
        """One ssh a host.

        Raises:
            LaunchError: The first host is reached by the others at an address that only it can reach.
        """
        job, first = self._job, self._answers[0]
        address = str(first["address"])
        others = {str(answer["host"]) for answer in self._answers.values()} - {str(first["host"])}
        if others and ipaddress.ip_address(address).is_loopback:
            raise LaunchError(
                f"host {job.hosts[0]}: the name of {job.hosts[1]} leads to {address}, itself; mend /etc/hosts there"
            )
        coordinator = join_address(address, first["port"])
        self._began, self._all_begun = time.monotonic(), False
        return [
            Start(
                words=[*ssh_words(job, host), worker_command(job, index, coordinator, str(logs), command)],
                environment=os.environ,
                name=None,
                title=f"ssh {host}",
                greeting=greeting(job),
            )
            for index, host in enumerate(job.hosts)
        ]

    def trouble(self, logs: Path) -> str | None:
        """A host that does not begin. How one ends is told by its ssh."""
        if self._all_begun:
            return None
        self._all_begun = len(nodes.read_nodes(logs)) == self._job.num_nodes
        if self._all_begun:
            return None
        seconds = time.monotonic() - self._began
        return nodes.find_trouble(logs, self._job.hosts, seconds, self._job.start_timeout_s)

    def codes(self, logs: Path, codes: list[int], own: list[int]) -> list[int]:
        """Those of the processes, as their hosts told them. A host was lost where its ssh failed or had to be killed;
        where it has not told how its processes ended either, they may still run."""
        job, found = self._job, nodes.read_nodes(logs)
        told = {index for index, node in found.items() if node.codes is not None}
        all_told = nodes.own_codes(logs)
        if len(told) < job.num_nodes and len(own) == job.num_nodes and all(0 <= code < LOST for code in own):
            return [*all_told, *own]  # a worker could not begin
        limit, lost = time.monotonic() + job.gone_s, []
        for index, (host, code) in enumerate(zip(job.hosts, codes)):
            node = found.get(index)
            if index not in told:
                self._lost[index] = (node.pid if node else None, limit)
                why = "it has not told how its processes ended"
            elif code < 0 or code >= LOST:
                why = "its connection ended before its processes"
            else:
                continue
            name = f"{host} ({node.host})" if node and node.host != host else host
            lost.append(f"host {name} was lost: {why}")
        for line in lost[:SHOWN]:
            say(line)
        if len(lost) > SHOWN:
            say(f"and {len(lost) - SHOWN} more")
        if not lost or (len(told) == job.num_nodes and all(code in ENDED_WELL for code in all_told)):
            return all_told
        return [*all_told, STALLED]


_NO_ANSWER = -signal.SIGKILL
_REFUSED = (
    "Host key verification failed",
    "Permission denied",
    "Bad configuration option",
    "Bad owner or permissions",
    "Could not resolve hostname",
    "no matching host key type",
    "Too many authentication failures",
)
"""What ssh says, with its own exit code, of a host that it will say again."""


def _run(words: Sequence[str], stopping: Callable[[], bool]) -> tuple[int, str, str]:
    """Exit code, output and errors of a command that is killed after `ASK_S` and when `stopping()`."""
    deadline = time.monotonic() + ASK_S
    with subprocess.Popen(
        list(words),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        while True:
            try:
                output, errors = process.communicate(timeout=0.2)
            except subprocess.TimeoutExpired:
                if stopping() or time.monotonic() > deadline:
                    process.kill()
            else:
                code = process.returncode
                return code, output, errors or (f"no answer for {ASK_S:g} s" if code == _NO_ANSWER else "")


def _advice(errors: str, code: int, job: SshJob) -> str:
    """What to do about it."""
    if "Host key verification failed" in errors:
        return "; compare its key, then log in once by hand, or correct known_hosts"
    if "Permission denied" in errors and code == LOST:
        return "; a key that needs no pass phrase typed: ssh-agent, or IdentityFile in --ssh-config"
    if "Could not resolve hostname" in errors:
        return "; correct the list of hosts, or name it in --ssh-config"
    if code in (126, 127):
        return f"; {job.python} must be a Python 3.9 or newer there: --python"
    if code != LOST:
        return f"; {job.working_directory}, this package and {job.python} must be at the same place on every host"
    return ""


def _shown(waiting: dict[str, str]) -> str:
    """The first hosts and why; with hundreds, how many more."""
    shown = [f"{host} ({reason})" for host, reason in list(waiting.items())[:SHOWN]]
    return "; ".join(shown) + (f"; and {len(waiting) - SHOWN} more" if len(waiting) > SHOWN else "")


def _number(path: Path) -> int:
    return int(path.name)
