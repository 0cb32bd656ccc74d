"""Signs of life: what each process of a run says about itself, once a second, where all others can read it.

Decides the phases that a process can be in and the format of `RUN_DIR/heartbeats/PROCESS.json`. It draws no
conclusion from them: see `watch`.

A beat overwrites the same bytes of the same file instead of replacing it: that needs no room on a full disk, no work
of a metadata server, and a client of NFS sees it as soon as it opens the file.

Invariant: a process that lives changes its beats; to see that, nobody compares the clocks of two hosts.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

Phase = Literal[
    "start", "restore", "initialize", "compile", "data", "step", "wait", "evaluate", "save", "write", "manifest",
    "finish",
]  # fmt: skip
"""What a process does, in the order of one attempt and then of one step. `write` and `manifest` are the checkpoint
thread's; a main thread is never in them."""

FOLDER = "heartbeats"
_SIZE_BYTES = 1024


@dataclass(frozen=True, kw_only=True)
class Beat:
    """One sign of life.

    Attributes:
        process: Its index in the run.
        time: Unix seconds by the clock of that host, for people.
        phase_seconds: Since the main thread came to this phase.
        beat: Counts the beats of an attempt.
        exit_code: That the process ends with; None while it runs.
        cause: A sentence: why it ends with another code than 0.
    """

    process: int
    host: str
    pid: int
    time: float
    phase: Phase
    step: int
    phase_seconds: float
    beat: int
    exit_code: int | None = None
    cause: str | None = None


def write_beat(run_dir: Path, beat: Beat) -> None:
    """Writes a sign of life over the one before.

    Raises:
        OSError: It could not be written.
    """
    path = run_dir / FOLDER / f"{beat.process}.json"
    path.parent.mkdir(exist_ok=True)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        os.pwrite(file, json.dumps(asdict(beat)).encode().ljust(_SIZE_BYTES - 1) + b"\n", 0)
    finally:
        os.close(file)


def read_beat(run_dir: Path, process: int) -> Beat | None:
    """The last sign of life of a process, maybe of an earlier attempt; None where there is none, or none whole yet.

    Raises:
        OSError: It cannot be read, which says nothing about the process.
    """
    try:
        text = (run_dir / FOLDER / f"{process}.json").read_text(encoding="utf-8", errors="replace")
        values = json.loads(text.split("\n", 1)[0])
        return Beat(**{field.name: values[field.name] for field in fields(Beat)})
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def set_aside(run_dir: Path, process: int, path: Path) -> bool:
    """Moves the last sign of life of a lost process to `path`. Of several processes that try, one succeeds.

    Returns:
        Whether it was this one.

    Raises:
        OSError: It cannot be moved.
    """
    try:
        (run_dir / FOLDER / f"{process}.json").rename(path)
    except FileNotFoundError:
        return False
    return True
