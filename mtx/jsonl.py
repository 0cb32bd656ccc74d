"""Files of one JSON object a line, written by runs that may be killed at any moment.

Decides how a line reaches the file and what a reader makes of a torn one; what the lines say is their writers' matter.

Invariant: a line is either whole or torn, and a torn line is never glued to the one after it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class LineWriter:
    """Appends lines to one file, each with a single write at its end, so that several writers may share it."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        size = os.fstat(self._file).st_size
        self._torn = size > 0 and os.pread(self._file, 1, size - 1) != b"\n"

    def append(self, record: Mapping[str, Any], *, durable: bool = False) -> None:
        """Appends a record; a `durable` one has reached the disk when this returns.

        Floats are written in full precision: reading gives the same bits. JSON has no word for an infinity or for
        what is not a number; they become null.
        """
        text = json.dumps(_replace_non_finite(record), allow_nan=False)
        rest = memoryview(f"{chr(10) if self._torn else ''}{text}\n".encode())
        self._torn = True  # until all of it is there: a full disk may take a part only
        while rest:
            rest = rest[os.write(self._file, rest) :]
        self._torn = False
        if durable:
            os.fsync(self._file)

    def close(self) -> None:
        """Closes the file."""
        os.close(self._file)


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
