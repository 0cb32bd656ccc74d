"""How far a build of a token store is, on stderr.

Invariant: nothing of it goes to stdout.
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mtx.data.encode_pool import Progress


class BuildBar:
    """Progress of a build on stderr: a bar on a terminal, a line now and then elsewhere, nothing when quiet."""

    _EVERY_S = 10.0

    def __init__(self, *, quiet: bool):
        self._quiet = quiet
        self._begin = self._last = time.monotonic()
        self._first_position: int | None = None
        self._bar: Any = None
        if not quiet and sys.stderr.isatty():
            import rich.progress
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeRemainingColumn

            columns = (BarColumn(), TextColumn("{task.percentage:3.0f}% {task.description}"), TimeRemainingColumn())
            self._bar = rich.progress.Progress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task("", total=1.0)

    def __enter__(self) -> BuildBar:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, progress: Progress) -> None:
        """Shows how far the build is."""
        counts, done = progress.counts, progress.position / max(1, progress.total_bytes)
        reused = f", {progress.reused_parts} parts reused" if progress.reused_parts else ""
        bad = f", {counts.bad_records:,} bad" if counts.bad_records else ""
        text = f"{counts.documents:,} documents, {counts.tokens / 1e6:,.1f}M tokens{bad}{reused}"
        now = time.monotonic()
        if self._bar:
            self._bar.update(self._task, completed=done, description=text)
        elif not self._quiet and now - self._last >= self._EVERY_S:
            self._last = now
            print(f"{done:4.0%}  {text}, {now - self._begin:.0f} s", file=sys.stderr, flush=True)
