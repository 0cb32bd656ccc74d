"""What the measured points of a study say about the planner: a few constants fitted on them.

Decides how many constants so many points can determine, and which ones come first.

Invariant: with fewer than `POINTS_PER_CONSTANT` points for each, a constant stays as it is.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mtx.errors import UserError
from mtx.evaluation.study import Task
from mtx.planning.calibration import Calibration
from mtx.planning.case import Case
from mtx.planning.constants import Constants, load_constants
from mtx.planning.fitting import fit
from mtx.planning.hardware import GPUS
from mtx.planning.step_time import estimate_time

POINTS_PER_CONSTANT = 3
FREE = (
    "quality.mtx@{generation}", "matmul_fill", "step_launch_s", "layer_launch_s", "nvlink_efficiency",
    "network_efficiency",
)  # fmt: skip
"""By how much of a step they explain: how fast all computation is; how large products must be to be fast, which is
known of the table's GPUs; what each step and each layer adds; the links that points use."""


def calibrate(tasks: Sequence[Task], path: Path, start: Constants | None = None) -> tuple[Calibration, dict[str, Any]]:
    """Fits constants on the points that were measured.

    Args:
        tasks: All points.
        path: The calibration's file, to be named in the summary.
        start: None: the constants that are shipped.

    Returns:
        The calibration, and the key `calibration` of the document.

    Raises:
        UserError: Nothing was measured.
    """
    start = load_constants() if start is None else start
    measured = [task for task in tasks if task.record is not None and task.record["measured"] and task.plan]
    if not measured:
        raise UserError(f"no point was measured, so there is nothing to write into {path}")
    points = [_point(task) for task in measured]
    free = _choose(points)
    constants = fit(points, start, free)
    before, after = ([estimate_time(case, used).seconds for case, _ in points] for used in (start, constants))
    machines = [task.machine for task in measured if task.machine is not None]
    machine = max(machines, key=lambda machine: machine.num_devices)
    calibration = Calibration(
        gpu=None if machine.in_table else machine.gpu,
        constants=constants,
        machine=dataclasses.asdict(machine),
        points=[
            {"name": task.point.name, "step_seconds": seconds, "plan_before": old, "plan_after": new}
            for task, (_, seconds), old, new in zip(measured, points, before, after)
        ],
    )
    seconds = [value for _, value in points]
    return calibration, {
        "file": str(path),
        "free": list(free),
        "points": len(points),
        "median_error_before": _median_error(before, seconds),
        "median_error_after": _median_error(after, seconds),
    }


def _point(task: Task) -> tuple[Case, float]:
    assert task.plan is not None
    assert task.record is not None
    return task.plan.case, task.record["measured"]["step_seconds"]


def _choose(points: Sequence[tuple[Case, float]]) -> tuple[str, ...]:
    """The first constants of FREE that these points use, as many as they determine."""
    clusters = [case.cluster for case, _ in points]
    used = {
        "matmul_fill": any(cluster.gpu.name not in GPUS for cluster in clusters),
        "nvlink_efficiency": any(cluster.num_gpus > 1 for cluster in clusters),
        "network_efficiency": any(cluster.num_gpus > cluster.domain for cluster in clusters),
    }
    names = [name for name in FREE if used.get(name, True)]
    chosen = names[: max(1, len(points) // POINTS_PER_CONSTANT)]
    return tuple(name.format(generation=clusters[0].gpu.generation) for name in chosen)


def _median_error(planned: Sequence[float], measured: Sequence[float]) -> float:
    return statistics.median(abs(plan / seconds - 1) for plan, seconds in zip(planned, measured))
