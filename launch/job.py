"""What is to be started, as plain data.

Decides which run directory a command trains in. Starts nothing and reads no environment.

Invariant: a job says all that it takes to start it again.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

NAME, ATTEMPTS, LOGS = "job.json", "launch.jsonl", "logs"
"""What a launcher keeps in a run directory."""


class LaunchError(Exception):
    """A mistake in what the user gave. Exit code 2."""

    exit_code = 2


@dataclass(frozen=True)
class Job:
    """A run and how it is kept running.

    Attributes:
        command: What each process executes.
        run_dir: The run directory that the command trains in.
        num_processes: How many processes together make one attempt.
        devices_per_process: Simulated CPU devices of each; None: the devices that the machine has.
        max_restarts: How many failures in a row, without a newer checkpoint, are put up with.
        backoff_s: Seconds before the first restart that waits; doubled with each further failure.
        grace_s: Seconds that the others have to end by themselves when a process has failed, and again after SIGTERM.
    """

    command: tuple[str, ...]
    run_dir: str
    num_processes: int = 1
    devices_per_process: int | None = None
    max_restarts: int = 5
    backoff_s: float = 5.0
    grace_s: float = 30.0

    @property
    def process_command(self) -> tuple[str, ...]:
        """The command with the number of its simulated devices."""
        if self.devices_per_process is None:
            return self.command
        return (*self.command, "--cpu-devices", str(self.devices_per_process))


def find_run_dir(command: Sequence[str]) -> str | None:
    """Where a command trains: its `--run-dir`, or what `mtx train RUN.gin` takes without; None: it does not say."""
    for index, word in enumerate(command):
        if word == "--run-dir" and index + 1 < len(command):
            return command[index + 1]
        if word.startswith("--run-dir="):
            return word.partition("=")[2]
    configs = [word for word in command if word.endswith(".gin")]
    return str(Path("runs") / Path(configs[0]).stem) if "train" in command and configs else None


def keep(job: Job) -> Path:
    """Writes the job into its run directory, beside those that were there before; the file that holds it.

    Raises:
        OSError: The directory cannot be written to.
    """
    folder = Path(job.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**dataclasses.asdict(job), "working_directory": os.getcwd()}, indent=1) + "\n"
    path, number = folder / NAME, 1
    while path.exists():
        if path.read_text(encoding="utf-8") == text:
            return path
        number += 1
        path = folder / f"job-{number}.json"
    path.write_text(text, encoding="utf-8")
    return path
