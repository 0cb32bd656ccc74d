"""Event files for TensorBoard, from the records of `metrics.jsonl`. The only file that touches tensorboardX.

Decides when they reach the disk. They are a convenience, written without tensorboardX's thread: where that dies of a
full disk, its queue fills and the run waits for ever.

Invariant: nothing that happens to these files ends a run or holds it up.
"""

from __future__ import annotations

import math
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

_FLUSH_SECONDS = 60.0


class TensorBoard:
    """Writes `RUN_DIR/tensorboard/`: tags `train/KEY` and `eval/NAME/KEY`, at the record's step."""

    def __init__(self, run_dir: Path, *, start_step: int, warn: Callable[[str], None]) -> None:
        """Opens a new event file that hides what earlier attempts wrote beyond `start_step`.

        Args:
            run_dir: The run directory.
            start_step: Last step whose records stay.
            warn: Told in a sentence when a file cannot be written; nothing more is then.
        """
        self._folder, self._warn = run_dir / "tensorboard", warn
        self._writer: Any = None  # a RecordWriter
        self.rewind(start_step)

    def rewind(self, step: int) -> None:
        """Goes on in a new event file after `step`; what was written of later steps is hidden."""
        from tensorboardX.proto.event_pb2 import SessionLog
        from tensorboardX.record_writer import RecordWriter

        self.close()

        def begin() -> None:
            self._folder.mkdir(exist_ok=True)
            name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{time.time_ns()}"
            self._writer, self._flushed = RecordWriter(str(self._folder / name)), 0.0
            self._write(file_version="brain.Event:2")
            self._write(step=step + 1, session_log=SessionLog(status=SessionLog.START))

        self._attempt(begin)

    def log(self, record: Mapping[str, Any]) -> None:
        """Writes every finite number of a record but its step."""
        from tensorboardX.summary import scalar

        prefix = f"eval/{record['eval']}" if "eval" in record else "train"

        def write() -> None:
            for key, value in record.items():
                if key != "step" and isinstance(value, int | float) and math.isfinite(value):
                    self._write(step=record["step"], summary=scalar(f"{prefix}/{key}", value))
            if time.monotonic() - self._flushed > _FLUSH_SECONDS:
                self._flushed = time.monotonic()
                self._writer.flush()

        if self._writer is not None:
            self._attempt(write)

    def close(self) -> None:
        """Writes what is buffered."""
        if self._writer is not None:
            self._attempt(self._writer.close)
            self._writer = None

    def _write(self, **fields: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event  # 0.5 s

        self._writer.write(Event(wall_time=time.time(), **fields).SerializeToString())

    def _attempt(self, act: Callable[[], None]) -> None:
        try:
            act()
        except OSError as error:
            self._warn(f"{self._folder}: {error.strerror or error}; nothing more is written there, the run goes on")
            if self._writer is not None:
                with suppress(OSError):  # it was told; what is buffered cannot be written
                    self._writer.close()
                self._writer = None
