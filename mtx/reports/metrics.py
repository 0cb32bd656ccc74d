"""`metrics.jsonl`: the numbers of a run, one line per logged step, across all its attempts.

Decides what happens to it at a resume or a rollback: lines of later steps, which it undoes, move to
`metrics.before-resume-N.jsonl` with the first free N. So the file always reads like that of a run that was never
interrupted, and nothing is lost.

Invariant: steps never go backwards in `metrics.jsonl`, and every line ever written is in it or beside it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mtx.errors import UserError
from mtx.jsonl import LineWriter, parse_line, read_records, say

NAME = "metrics.jsonl"
_UNDONE = "metrics.before-resume-{}.jsonl"


class MetricsFile:
    """Appends to `RUN_DIR/metrics.jsonl`, floats in full precision. On a full disk lines wait, as `LineWriter` does."""

    def __init__(self, run_dir: Path, *, start_step: int, warn: Callable[[str], None] = say) -> None:
        """Opens the metrics of a run that goes on after `start_step`; lines of later steps are moved aside.

        Raises:
            UserError: The files cannot be written.
        """
        self._run_dir, self._warn = run_dir, warn
        self._open(start_step)

    def log(self, record: Mapping[str, Any]) -> None:
        """Appends a line of training or evaluation."""
        self._writer.append(record)

    def rewind(self, step: int) -> None:
        """Goes on after `step`; lines of later steps are moved aside.

        Raises:
            UserError: The files cannot be written.
        """
        self._writer.close()
        self._open(step)

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()

    def _open(self, step: int) -> None:
        path = self._run_dir / NAME
        try:
            _move_later_lines(self._run_dir, step)
        except OSError as error:
            raise UserError(
                f"{path}: the lines after step {step} cannot be moved aside: {error.strerror}; mend that, start again"
            ) from None
        self._writer = LineWriter(path, warn=self._warn)


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Lines of training and of evaluation (these have `eval`), in order."""
    return read_records(run_dir / NAME)


def read_undone_metrics(run_dir: Path) -> list[list[dict[str, Any]]]:
    """The lines that each resume undid, oldest resume first."""
    found: list[list[dict[str, Any]]] = []
    while (path := run_dir / _UNDONE.format(len(found) + 1)).exists():
        found.append(read_records(path))
    return found


def _move_later_lines(run_dir: Path, start_step: int) -> None:
    path = run_dir / NAME
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    records = [parse_line(line.decode(errors="replace")) for line in lines]
    kept = [index for index, record in enumerate(records) if record is not None and record["step"] <= start_step]
    rest = lines[kept[-1] + 1 :] if kept else lines
    if not rest:
        return
    number = 1
    while (aside := run_dir / _UNDONE.format(number)).exists():
        number += 1
    # In this order a kill in between leaves lines twice, never nowhere; and the second part needs no room on the disk.
    with aside.open("xb") as file:
        file.writelines(rest)
        file.flush()
        os.fsync(file.fileno())
    with path.open("r+b") as file:
        file.truncate(sum(map(len, lines)) - sum(map(len, rest)))
        os.fsync(file.fileno())
