"""`python -m launch.slot JOB HOST COMMAND...`: a process here that stands for one on a host which ssh reaches.

What runs tasks of an array starts, signals and waits for processes of this machine; this passes all of it on.

Invariant: when it has gone, in whatever way, the process there ends too.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from launch import restarts
from launch.job import LOGS, LaunchError
from launch.loop import SIGNALS
from launch.processes import Attempt, Start
from launch.remote import LOST, SshJob, greeting, ssh_words, worker_command
from launch.stream import say


def slot_words(job: SshJob, host: str) -> list[str]:
    """The words before a command that make it run on a host. Of the job's environment they hold the names only."""
    alone = dataclasses.replace(job, command=(), num_nodes=1, processes_per_node=1, hosts=(), slots=())
    fields = {**dataclasses.asdict(alone), "environment": [name for name, _ in job.environment]}
    root = str(Path(__file__).resolve().parents[1])
    paths = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    return ["env", f"PYTHONPATH={paths}", sys.executable, "-m", "launch.slot", json.dumps(fields), host]


def main(argv: Sequence[str]) -> int:
    """Runs the command there; its exit code, or 6 where the host was lost."""
    fields, host = json.loads(argv[0]), argv[1]
    names = [name for name in fields.pop("environment") if name in os.environ]
    job = SshJob(**fields, environment=tuple((name, os.environ[name]) for name in names))
    signals: list[int] = []
    for number in SIGNALS:
        signal.signal(number, lambda number, frame: signals.append(number))
    logs = Path(job.run_dir) / LOGS / "hosts" / f"{host.replace(os.sep, '-')}-{time.time_ns()}"
    start = Start(
        words=[*ssh_words(job, host), worker_command(job, 0, "", str(logs), argv[2:])],
        environment=os.environ,
        name=None,
        title=f"ssh {host}",
        greeting=greeting(job),
    )
    try:
        attempt = Attempt([start], logs, grace_s=job.grace_s, signals=signals, say=say, collects=False)
        ((code,), _) = attempt.run()
    except (LaunchError, OSError) as error:
        say(str(error))
        return LaunchError.exit_code
    if code == LOST:
        say(f"host {host} was lost, or cannot be reached")
        return restarts.STALLED
    return restarts.as_exit(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
