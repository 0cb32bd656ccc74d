"""What is seen of processes: their lines on the terminal, coloured by their prefix, and in logs.

Invariant: neither a terminal that has gone nor a full disk ends a run.
"""

from __future__ import annotations

import errno
import os
import re
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

_PREFIX = re.compile(r"^\[[^\]\s]+\] ", re.MULTILINE)
_COLOURS = (36, 33, 32, 35, 34, 31, 96, 93, 92, 95, 94, 91)


class Log:
    """A new file, written as lines come. A full disk costs the log what does not fit, never the run."""

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        """Raises: OSError: The file exists, or cannot be made."""
        self._file = os.open(str(path), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self._path, self._say, self._fails = path, say, False

    def write(self, data: bytes) -> None:
        try:
            while data:
                data = data[os.write(self._file, data) :]
            self._fails = False
        except OSError as error:
            if not self._fails:
                self._say(f"{self._path} misses what follows until it can be written again: {error.strerror}")
            self._fails = True

    def close(self) -> None:
        try:
            os.close(self._file)
        except OSError as error:  # a network file system may tell only now that its disk is full
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
                raise
            self._say(f"{self._path}: {error.strerror}")


def show(text: str) -> None:
    """Lines of processes on the terminal: prefixes in colour, each process its own, where it is one and wants it."""
    write(sys.stdout, paint(text) if wants_colour(sys.stdout) else text)


def wants_colour(stream: TextIO) -> bool:
    """Whether it is a terminal, and its user has not said otherwise (no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR")


def paint(text: str) -> str:
    """Lines with their prefixes in colour."""
    return _PREFIX.sub(lambda match: f"\x1b[{_colour(match[0])}m{match[0]}\x1b[0m", text)


def writable(text: str, stream: TextIO) -> str:
    """The text with what the stream's encoding lacks told in ASCII."""
    encoding = stream.encoding or "ascii"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def say(line: str) -> None:
    """Tells the user, apart from what the processes print."""
    write(sys.stderr, f"launch: {line}\n")


def write(stream: TextIO, text: str) -> None:
    """Writes to the terminal. Where that has gone, nobody is told any more, and the run goes on."""
    try:
        stream.write(writable(text, stream))
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _colour(prefix: str) -> int:
    return _COLOURS[zlib.crc32(prefix.encode()) % len(_COLOURS)]
