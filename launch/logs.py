"""What a job has printed: the logs of its attempts, or what its target knows of them.

Invariant: lines are shown whole and in order, and never twice.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import BinaryIO

from launch import registry
from launch.job import LOGS, LaunchError
from launch.processes import ALL_LOG
from launch.stream import paint, say, wants_colour, writable

FOLLOWED = 20
"""Lines that come before those that are followed."""
POLL_S = 0.2
ASK_S = 2.0
"""Between two questions whether the job still lives."""
_BLOCK = 1 << 16


def show(record: registry.Record, *, attempt: str | None, process: int | None, lines: int | None, follow: bool) -> int:
    """Prints what a job has printed; the exit code.

    Args:
        attempt: Which; None: the newest, and with `follow` those after it.
        process: Its log alone; None: what all have printed.
        lines: How many of the last ones; None: all, or `FOLLOWED` where it follows.
        follow: Whether to go on until the job has ended.

    Raises:
        LaunchError: There is no such log.
    """
    if lines is not None and lines < 0:
        raise LaunchError(f"--lines {lines}: 0 or more")
    words = registry.target_of(record).log_command(record) if record.handle else None
    if words is not None and attempt is None and process is None:
        return _run(words)
    folder, name = Path(record.run_dir) / LOGS, ALL_LOG if process is None else f"{process}.log"
    if lines is None and follow:
        lines = FOLLOWED
    try:
        path = _find(folder, name, attempt)
        if follow:
            return _follow(record, folder, name, attempt, lines)
        if path is None:
            raise LaunchError(_missing(record, folder, name, attempt))
        with path.open("rb") as file:
            _seek(file, lines)
            for text in iter(lambda: file.read(_BLOCK), b""):
                rest = b"" if text.endswith(b"\n") else file.readline()
                _print(text + rest)
        return 0
    except KeyboardInterrupt:
        return 130


def attempts(folder: Path, name: str) -> list[str]:
    """The attempts that have such a log, oldest first; examinations of the hosts come before all attempts."""
    found = [path.parent.name for path in folder.glob(f"*/{name}")]
    return sorted(found, key=lambda text: (text.isdecimal(), int("0" + "".join(filter(str.isdecimal, text))), text))


def _find(folder: Path, name: str, attempt: str | None) -> Path | None:
    there = attempts(folder, name)
    if attempt is not None:
        return folder / attempt / name if attempt in there else None
    return folder / there[-1] / name if there else None


def _missing(record: registry.Record, folder: Path, name: str, attempt: str | None) -> str:
    there = ", ".join(attempts(folder, name)) or "none"
    which = "no attempt" if attempt is None else f"no attempt {attempt}"
    return f"job {record.name}: {which} in {folder} has {name}; attempts that have it: {there}"


def _follow(record: registry.Record, folder: Path, name: str, attempt: str | None, lines: int | None) -> int:
    shown, waits = "", False
    while True:
        alive = _lives(record)
        there = attempts(folder, name) if attempt is None else [attempt] * (_find(folder, name, attempt) is not None)
        later = there[there.index(shown) + 1 :] if shown in there else there[-1:]
        for number in later:
            shown = number
            if attempt is None and (waits or len(there) > 1):
                say(f"attempt {number}")
            with (folder / number / name).open("rb") as file:
                _seek(file, lines)
                lines = None  # of those that come later, all
                _drain(record, folder, name, number, file, to_end=attempt is not None)
        if later:
            continue
        if not alive:
            if not shown:
                raise LaunchError(_missing(record, folder, name, attempt))
            return 0
        if not waits and not shown:
            say(f"job {record.name}: {registry.state(record)}; no log yet")
            waits = True
        if attempt is not None and shown:
            return 0
        time.sleep(ASK_S)


def _drain(record: registry.Record, folder: Path, name: str, number: str, file: BinaryIO, *, to_end: bool) -> None:
    """Prints what comes until the attempt has ended: a later one has begun, or the job lives no more."""
    rest, asked, ended = b"", time.monotonic(), False
    while True:
        data = file.read(_BLOCK)
        if data:
            whole, newline, rest = (rest + data).rpartition(b"\n")
            _print(whole + newline)
            continue
        if ended:
            break
        if time.monotonic() > asked + ASK_S:
            asked = time.monotonic()
            newer = attempts(folder, name)
            # Then everything was written before: once more to the end of the file.
            ended = (number in newer and newer[-1] != number) or not _lives(record)
            continue
        time.sleep(POLL_S)
    if rest:
        _print(rest + b"\n")


def _lives(record: registry.Record) -> bool:
    try:
        return bool(record.handle) and registry.lives(record)
    except LaunchError as error:
        say(f"{error}; asks again")
        time.sleep(ASK_S)
        return True


def _seek(file: BinaryIO, lines: int | None) -> None:
    """To where the last `lines` lines begin."""
    if lines is None:
        return
    end = file.seek(0, os.SEEK_END)
    position, text = end, b""
    while position and text.count(b"\n") <= lines:
        step = min(_BLOCK, position)
        position = file.seek(position - step)
        text = file.read(step) + text
    last = text.splitlines(keepends=True)[-lines:] if lines else []
    file.seek(end - sum(map(len, last)))


def _run(words: list[str]) -> int:
    try:
        return subprocess.run(words, check=False).returncode
    except OSError as error:
        raise LaunchError(f"{words[0]}: {error.strerror}") from None
    except KeyboardInterrupt:
        return 130


def _print(data: bytes) -> None:
    text = writable(data.decode("utf-8", "replace"), sys.stdout)
    sys.stdout.write(paint(text) if wants_colour(sys.stdout) else text)
    sys.stdout.flush()
