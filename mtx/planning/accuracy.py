"""The plan held against what was measured and published.

Decides what an error is: predicted over published, less one. Rows that say nothing about a figure have no error.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from mtx.planning.constants import Constants
from mtx.planning.conventions import case_to_time
from mtx.planning.memory import estimate_memory
from mtx.planning.plan import usable_bytes
from mtx.planning.published import PublishedRun
from mtx.planning.step_time import estimate_time


@dataclass(frozen=True)
class Comparison:
    """A published run and its prediction.

    Attributes:
        run: As published.
        step_seconds: Predicted; None: the row has no case, or products of numbers that no GPU here has a peak for.
        memory_bytes: Predicted.
        fits: Whether the plan says that it fits.
    """

    run: PublishedRun
    step_seconds: float | None
    memory_bytes: int | None
    fits: bool | None

    @property
    def time_error(self) -> float | None:
        """0.1: predicted to take 10 % longer than it did."""
        return _error(self.step_seconds, self.run.step_seconds)

    @property
    def memory_error(self) -> float | None:
        return _error(self.memory_bytes, self.run.memory_bytes)

    def as_json(self) -> dict[str, Any]:
        run = self.run
        return {
            "id": run.id,
            "skipped": run.skipped,
            "published_step_seconds": run.step_seconds,
            "step_seconds": self.step_seconds,
            "time_error": self.time_error,
            "published_memory_bytes": run.memory_bytes,
            "memory_bytes": self.memory_bytes,
            "memory_error": self.memory_error,
            "out_of_memory": run.out_of_memory,
            "fits": self.fits,
            "is_dense_bf16": run.is_dense_bf16,
        }


@dataclass(frozen=True)
class Errors:
    """Of some rows.

    Attributes:
        count: How many have a figure and a prediction.
        median: Of the absolute errors; None without rows.
        percentile_90: Of the absolute errors.
    """

    count: int
    median: float | None
    percentile_90: float | None


@dataclass(frozen=True)
class Summary:
    """Of a table.

    Attributes:
        time: All rows that have a time.
        time_dense_bf16: Dense models in bfloat16.
        memory: Rows with measured memory that tell what they recompute, since activations depend on it.
        called_fitting: Ids of rows that ran out of memory and are predicted to fit.
        skipped: Why rows have no case -> how many.
    """

    time: Errors
    time_dense_bf16: Errors
    memory: Errors
    called_fitting: tuple[str, ...]
    skipped: dict[str, int]

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def compare_runs(runs: Iterable[PublishedRun], constants: Constants | None = None) -> list[Comparison]:
    """Predicts each run that has a case."""
    found = []
    for run in runs:
        if run.case is None:
            found.append(Comparison(run, None, None, None))
            continue
        memory = estimate_memory(run.case).total
        timed = case_to_time(run.case, run.precision)
        seconds = None if timed is None else estimate_time(timed, constants).seconds
        found.append(Comparison(run, seconds, memory, memory <= usable_bytes(run.case.cluster.gpu, run.case.software)))
    return found


def summarize(comparisons: Iterable[Comparison]) -> Summary:
    """The errors of a table."""
    rows = list(comparisons)
    return Summary(
        time=_errors(row.time_error for row in rows),
        time_dense_bf16=_errors(row.time_error for row in rows if row.run.is_dense_bf16),
        memory=_errors(row.memory_error for row in rows if "recompute" not in row.run.inferred),
        called_fitting=tuple(row.run.id for row in rows if row.run.out_of_memory and row.fits),
        skipped=dict(Counter(row.run.skipped for row in rows if row.run.skipped is not None).most_common()),
    )


def _error(predicted: float | None, published: float | None) -> float | None:
    return None if predicted is None or published is None else predicted / published - 1.0


def _errors(errors: Iterable[float | None]) -> Errors:
    sizes = [abs(error) for error in errors if error is not None]
    if not sizes:
        return Errors(0, None, None)
    return Errors(len(sizes), float(np.median(sizes)), float(np.percentile(sizes, 90)))
