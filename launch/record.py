"""The record of attempts, `launch.jsonl`: a line for what began and what ended.

Invariant: lines are appended whole and never changed.
"""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from typing import Any

from launch.job import ATTEMPTS
from launch.stream import say


def append(folder: Path, **fields: Any) -> None:
    """Adds a line to the record in a run directory.

    Raises:
        OSError: It cannot be written.
    """
    line = json.dumps({"time": time.time(), "host": socket.gethostname(), **fields})
    with (folder / ATTEMPTS).open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def try_append(folder: Path, **fields: Any) -> None:
    """The same where the work matters more than its record: that a disk is full is told."""
    try:
        append(folder, **fields)
    except OSError as error:
        say(f"{folder / ATTEMPTS} cannot be written: {error.strerror}")
