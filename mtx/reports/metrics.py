"""`metrics.jsonl`: the numbers of a run, one line per logged step, across all its attempts.

Decides what happens to it at a resume: lines of later steps, which the resume undoes, move to
`metrics.before-resume-N.jsonl` with the first free N. So the file always reads like that of a run that was never
interrupted, and nothing is lost.

Invariant: steps never go backwards in `metrics.jsonl`, and every line ever written is in it or beside it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mtx.jsonl import LineWriter, parse_line, read_records

NAME = "metrics.jsonl"
_UNDONE = "metrics.before-resume-{}.jsonl"


class MetricsFile:
    """Appends to `RUN_DIR/metrics.jsonl`, floats in full precision."""

    def __init__(self, run_dir: Path, *, start_step: int) -> None:
        """Opens the metrics of a run that goes on after `start_step`; lines of later steps are moved aside."""
        _move_later_lines(run_dir, start_step)
        self._writer = LineWriter(run_dir / NAME)

    def log(self, record: Mapping[str, Any]) -> None:
        """Appends a line of training or evaluation."""
        self._writer.append(record)

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()


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
    keep = [record is not None and record["step"] <= start_step for record in records]
    if all(keep):
        return
    number = 1
    while (aside := run_dir / _UNDONE.format(number)).exists():
        number += 1
    # In this order a kill in between leaves lines twice, never nowhere.
    _write_durably(aside, [line for line, kept in zip(lines, keep) if not kept], mode="xb")
    rest = path.with_suffix(".partial")
    _write_durably(rest, [line for line, kept in zip(lines, keep) if kept], mode="wb")
    rest.replace(path)


def _write_durably(path: Path, lines: list[bytes], *, mode: str) -> None:
    with path.open(mode) as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
