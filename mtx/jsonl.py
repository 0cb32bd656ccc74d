"""Files of one JSON object a line, written by runs that may be killed at any moment.

Decides how a line reaches the file and what a reader makes of a torn one; what the lines say is their writers' matter.

Invariant: a line is either whole or torn, and a torn line is never glued to the one after it.
"""

from __future__ import annotations

import errno
import json
import math
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mtx.errors import UserError

_FULL = (errno.ENOSPC, errno.EDQUOT)
MAX_WAITING = 10_000  # lines; a few megabytes


def say(text: str) -> None:
    """Prints a line on stderr."""
    print(text, file=sys.stderr, flush=True)


class LineWriter:
    """Appends lines to one file, each with a single write at its end, so that several writers may share it.

    A full disk (or quota) ends nothing: lines wait in memory, `MAX_WAITING` at most, and the first append that finds
    room writes them in their order. Threads may share a writer.
    """

    def __init__(self, path: Path, *, warn: Callable[[str], None] = say) -> None:
        """Opens the file, and makes it where there is none.

        Args:
            path: The file.
            warn: Told in a sentence when lines begin to wait, when some are dropped, and when it is over.

        Raises:
            UserError: It cannot be opened for writing.
        """
        self._path, self._warn = path, warn
        try:
            self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise UserError(
                f"{path} cannot be opened for writing: {error.strerror}; mend that, or name another folder"
            ) from None
        self._lock = threading.Lock()
        self._waiting: deque[bytes] = deque()
        self._delayed = self._dropped = 0  # lines, since the disk is full
        self._sync = False

    def append(self, record: Mapping[str, Any], *, durable: bool = False) -> bool:
        """Appends a record; a `durable` one has reached the disk when this returns.

        Floats are written in full precision: reading gives the same bits. JSON has no word for an infinity or for
        what is not a number; they become null.

        Returns:
            Whether it is there; False where it waits in memory because the disk is full.

        Raises:
            OSError: The file cannot be written for another reason.
        """
        text = json.dumps(_replace_non_finite(record), allow_nan=False)
        with self._lock:
            self._waiting.append(f"{text}\n".encode())
            self._sync |= durable
            if (cause := self._flush()) is None:
                return True
            if not self._delayed:
                self._warn(f"{self._path}: {cause}; its lines wait in memory until there is room")
            self._delayed += 1
            if len(self._waiting) > MAX_WAITING:
                if not self._dropped:
                    self._warn(f"{self._path}: {MAX_WAITING} lines wait for room; from now on the oldest are dropped")
                self._waiting.popleft()
                self._dropped += 1
            return False

    def close(self) -> None:
        """Closes the file; lines that still wait are tried once more."""
        with self._lock:
            cause = self._flush()
            if self._waiting:
                lost = len(self._waiting) + self._dropped
                self._warn(f"{self._path}: {cause}; {lost} line{'s are' if lost > 1 else ' is'} lost")
            os.close(self._file)

    def _flush(self) -> str | None:
        """Writes what waits; where the disk is full, the reason."""
        try:
            while self._waiting:
                self._write(self._waiting[0])
                self._waiting.popleft()
            if self._sync:
                os.fsync(self._file)
                self._sync = False
        except OSError as error:
            if error.errno not in _FULL:
                raise
            return error.strerror or str(error)
        if self._delayed:
            dropped = f"; {self._dropped} were dropped" if self._dropped else ""
            self._warn(f"{self._path}: there is room again, the lines that waited are written{dropped}")
            self._delayed = self._dropped = 0
        return None

    def _write(self, line: bytes) -> None:
        """Writes a line at its own place; nothing of it, or a torn one, is there when this raises."""
        size = os.fstat(self._file).st_size
        torn = size > 0 and os.pread(self._file, 1, size - 1) != b"\n"
        data = b"\n" * torn + line
        # Without its newline alone a line is whole, and the next one brings that.
        if os.write(self._file, data) < len(data) - 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def parse_line(line: str) -> dict[str, Any] | None:
    """The record of a line, or None where a kill tore it."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def read_records(path: Path) -> list[dict[str, Any]]:
    """The whole records of a file, in order; none where there is no file. Torn lines were never recorded."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    return [record for record in map(parse_line, lines) if record is not None]


def _replace_non_finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _replace_non_finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_replace_non_finite(item) for item in value]
    return value
