"""Event files for TensorBoard, from the records of `metrics.jsonl`. The only file that touches tensorboardX."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class TensorBoard:
    """Writes `RUN_DIR/tensorboard/`: tags `train/KEY` and `eval/NAME/KEY`, at the record's step."""

    def __init__(self, run_dir: Path, *, start_step: int) -> None:
        """Opens a new event file that hides what earlier attempts wrote beyond `start_step`."""
        from tensorboardX import SummaryWriter  # 0.5 s

        # By itself the name has the time in seconds: an attempt that ends within one would be written over.
        self._writer = SummaryWriter(
            str(run_dir / "tensorboard"), purge_step=start_step + 1, filename_suffix=f".{time.time_ns()}"
        )

    def log(self, record: Mapping[str, Any]) -> None:
        """Writes every number of a record but its step."""
        prefix = f"eval/{record['eval']}" if "eval" in record else "train"
        for key, value in record.items():
            if key != "step" and isinstance(value, int | float):
                self._writer.add_scalar(f"{prefix}/{key}", value, record["step"])

    def close(self) -> None:
        """Writes what is buffered and ends the thread."""
        self._writer.close()
