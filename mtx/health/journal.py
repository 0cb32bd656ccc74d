"""The journal of a run: what happened to it and when, across all its attempts.

Decides the closed list of events and what each carries. It draws no conclusion: see `goodput`.

Invariant: an event that was recorded survives whatever happens next; nothing is ever taken out of a journal.
"""

from __future__ import annotations

import datetime
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

from mtx.health.revision import find_git_revision
from mtx.jsonl import LineWriter, read_records, say

NAME = "journal.jsonl"

Event = Literal[
    "start", "resumed", "accepted", "compiled", "started", "evaluated", "saved", "stored", "save_failed", "skipped",
    "spike", "rollback", "straggler", "corruption", "hang", "preempted", "plan", "finished",
]  # fmt: skip


class Journal:
    """Appends to `RUN_DIR/journal.jsonl`. Processes of one run may share it."""

    def __init__(
        self, run_dir: Path, *, config_digest: str, process: int = 0, warn: Callable[[str], None] = say
    ) -> None:
        """Opens the journal of a run directory that exists.

        Args:
            run_dir: The run directory.
            config_digest: Of the resolved config that this attempt runs with.
            process: Index of this process in the run.
            warn: Told in a sentence when a full disk makes events wait in memory, and when it is over.

        Raises:
            UserError: The file cannot be opened for writing.
        """
        self._writer = LineWriter(run_dir / NAME, warn=warn)
        self._origin = {
            "host": socket.gethostname(),
            "process": process,
            "config_digest": config_digest,
            "git_revision": find_git_revision(Path(__file__).parent),
        }

    def record(self, event: Event, **fields: Any) -> None:
        """Appends an event with its wall time and origin, through to the disk.

        Args:
            event: One of the closed list.
            fields: JSON values. By custom `step` (updates done), `seconds` (what it took), `cause` (a sentence).

        Raises:
            ValueError: The event is not in the list, or a field would hide what every event carries.
        """
        if event not in get_args(Event):
            raise ValueError(f"journal event {event!r} is none of {', '.join(get_args(Event))}")
        now = time.time()
        utc = datetime.datetime.fromtimestamp(now, datetime.UTC).isoformat(timespec="milliseconds")
        line = {"event": event, "time": now, "time_utc": utc, **self._origin}
        if hidden := line.keys() & fields.keys():
            raise ValueError(f"journal fields {sorted(hidden)} are set by the journal itself")
        self._writer.append(line | fields, durable=True)

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()


def read_journal(run_dir: Path) -> list[dict[str, Any]]:
    """The events of a run directory in the order they were recorded; a torn last line is left out."""
    return read_records(run_dir / NAME)
