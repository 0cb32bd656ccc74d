"""Lets a launcher go on when the terminal that started it is closed.

Invariant: what goes on has no terminal, and what it would print is in a new file of the run directory.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from launch.job import LOGS


def detach(run_dir: str) -> tuple[int, Path] | None:
    """Goes on in a process of its own session, with its output in the next free RUN_DIR/logs/launch-N.log.

    Where a machine ends all processes of a user who logs out (systemd: KillUserProcesses=yes), it ends this one too.

    Returns:
        In the process that was called: the id of the one that goes on, and its log. There: None.

    Raises:
        OSError: The log cannot be written.
    """
    folder = Path(run_dir) / LOGS
    folder.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        path = folder / f"launch-{number}.log"
        try:
            log = os.open(str(path), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
            break
        except FileExistsError:
            number += 1
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        os.close(log)
        return pid, path
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, targets in ((nothing, (0,)), (log, (1, 2))):
        for target in targets:
            os.dup2(source, target)
        os.close(source)
    return None
