"""What is to be started, as plain data.

Decides which run directory a command trains in, and what a job is called. Starts nothing and reads no environment.

Invariant: a job says all that it takes to start it again.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NAME, ATTEMPTS, LOGS = "job.json", "launch.jsonl", "logs"
"""What a launcher keeps in a run directory."""

_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")


class LaunchError(Exception):
    """A mistake in what the user gave. Exit code 2."""

    exit_code = 2


@dataclass(frozen=True)
class Job:
    """A run and how it is kept running. A target adds what only it needs to know, in a class of its own.

    Attributes:
        command: What each process executes.
        run_dir: The run directory that the command trains in; of an array, the folder that it keeps its logs in.
        name: By which `status`, `logs` and `stop` find it.
        working_directory: Where the command is started, on every node.
        num_nodes: Hosts, each with the same number of processes.
        gpus_per_node: GPUs of each host, shared out evenly among its processes; None: those there are.
        processes_per_node: Processes on each host.
        devices_per_process: Simulated CPU devices of each; None: the devices that the machine has.
        environment: Variables of every process, besides those it inherits.
        python: The interpreter, 3.9 or newer, that starts the processes on their hosts.
        max_restarts: How many failures in a row, without a newer checkpoint, are put up with.
        backoff_s: Seconds before the first restart that waits; doubled with each further failure.
        grace_s: Seconds that the others have to end by themselves when a process has failed, and again after SIGTERM.
        start_timeout_s: Seconds that every host has to say that it has begun.
        preflight: Whether the hosts are examined (`mtx doctor --cluster`) before the first attempt.
        tasks: Of an array: how many shards of work the command is run for, with `--shard I/N`; None: it is a run.
        parallel: How many tasks of an array run at a time; None: as many as there is room for.
    """

    command: tuple[str, ...]
    run_dir: str
    name: str = "run"
    working_directory: str = "."
    num_nodes: int = 1
    gpus_per_node: int | None = None
    processes_per_node: int = 1
    devices_per_process: int | None = None
    environment: tuple[tuple[str, str], ...] = ()
    python: str = "python3"
    max_restarts: int = 5
    backoff_s: float = 5.0
    grace_s: float = 30.0
    start_timeout_s: float = 300.0
    preflight: bool = False
    tasks: int | None = None
    parallel: int | None = None

    @property
    def num_processes(self) -> int:
        """Processes of one attempt, on all hosts together."""
        return self.num_nodes * self.processes_per_node

    @property
    def process_command(self) -> tuple[str, ...]:
        """The command with the number of its simulated devices."""
        if self.devices_per_process is None:
            return self.command
        return (*self.command, "--cpu-devices", str(self.devices_per_process))

    @property
    def preflight_command(self) -> tuple[str, ...]:
        """What examines the hosts before the run: the run's own program."""
        simulated = () if self.devices_per_process is None else ("--cpu-devices", str(self.devices_per_process))
        return (*program(self.command), "doctor", "--cluster", "--run-dir", self.run_dir, *simulated)


def program(command: Sequence[str]) -> tuple[str, ...]:
    """The words of a command that start `mtx` itself: `mtx`, or `python -m mtx`."""
    if "-m" in command[1:3] and "mtx" in command[:4]:
        return tuple(command[: command.index("mtx") + 1])
    return tuple(command[:1])


def option(command: Sequence[str], name: str) -> str | None:
    """The value that a command gives an option, as `NAME VALUE` or `NAME=VALUE`; None: it does not."""
    for index, word in enumerate(command):
        if word == name and index + 1 < len(command):
            return command[index + 1]
        if word.startswith(f"{name}="):
            return word.partition("=")[2]
    return None


def find_run_dir(command: Sequence[str]) -> str | None:
    """Where a command trains: its `--run-dir`, or what `mtx train RUN.gin` takes without; None: it does not say."""
    given = option(command, "--run-dir")
    if given is not None:
        return given
    configs = [word for word in command if word.endswith(".gin")]
    return str(Path("runs") / Path(configs[0]).stem) if "train" in command and configs else None


def make_name(text: str | None, run_dir: str) -> str:
    """The name of a job: the one given, or the run directory's with other characters than letters, digits, `.`, `_` and
    `-` replaced.

    Raises:
        LaunchError: The given one has others, or is longer than 63.
    """
    if text is None:
        text = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(run_dir).resolve().name)[:63].strip("._-") or "run"
    if not _NAME.fullmatch(text):
        raise LaunchError(
            f"--name {text!r}: up to 63 letters, digits, '.', '_' and '-', with a letter or digit at both ends"
        )
    return text


def keep(job: Job, target: str, arguments: Sequence[str]) -> Path:
    """Writes the job into its run directory, beside those that were there before; the file that holds it.

    Args:
        target: Name of the target.
        arguments: Those of `python -m launch`, which start the same job again.

    Raises:
        OSError: The directory cannot be written to.
    """
    folder = Path(job.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    again = shlex.join([sys.executable, "-m", "launch", *arguments])
    repeat = f"cd {shlex.quote(os.getcwd())} && {again}"
    fields = {"target": target, "repeat": repeat, "arguments": list(arguments), **dataclasses.asdict(job)}
    text = json.dumps(fields, indent=1) + "\n"
    path, number = folder / NAME, 1
    while path.exists():
        if path.read_text(encoding="utf-8") == text:
            os.utime(path)
            return path
        number += 1
        path = folder / f"job-{number}.json"
    # Its environment may hold what others must not read.
    with os.fdopen(os.open(str(path), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
    return path


def newest_job(run_dir: Path) -> Path | None:
    """The file of the job that was started last in a run directory; None: none was."""
    paths = [path for path in run_dir.glob("job*.json") if re.fullmatch(r"job(-[0-9]+)?\.json", path.name)]
    return max(paths, key=lambda path: (path.stat().st_mtime, len(path.name), path.name), default=None)


def read_arguments(path: Path) -> tuple[str, list[str]]:
    """The folder and the arguments of `python -m launch` that started a job which `keep` wrote.

    Raises:
        LaunchError: It is none.
    """
    fields = _load(path)
    try:
        return str(fields["working_directory"]), [str(word) for word in fields["arguments"]]
    except (KeyError, TypeError):
        raise LaunchError(f"{path}: it does not say with which arguments it was started") from None


def read(path: Path) -> tuple[str, dict[str, Any]]:
    """The target and the fields of a job that `keep` wrote.

    Raises:
        LaunchError: It is none.
    """
    fields = _load(path)
    fields.pop("arguments", None)
    fields.pop("repeat", None)
    return str(fields.pop("target")), fields


def _load(path: Path) -> dict[str, Any]:
    try:
        fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not {"target", "name"} <= fields.keys():
            raise ValueError("fields are missing")
    except (OSError, ValueError, AttributeError) as error:
        raise LaunchError(f"{path}: no job of this launcher ({error})") from None
    return fields
