"""What a run that is starting may expect, and how that goes into its journal beside what it then measures.

Decides nothing of the estimates; only for which runs there are any.

Invariant: no forecast for devices that neither the table nor a calibration of this very machine knows.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtx.config import schema
from mtx.planning.calibration import read_calibration
from mtx.planning.case import Case, Cluster
from mtx.planning.hardware import find_gpu
from mtx.planning.memory import estimate_memory
from mtx.planning.step_time import estimate_time

CALIBRATION = "MTX_CALIBRATION"
"""Environment variable that names the calibration file of the machine that trains."""


@dataclass(frozen=True)
class Forecast:
    """For one step of the full batch.

    Attributes:
        step_seconds: Its time.
        memory_bytes: Of the device that holds most, all that a program takes there.
    """

    step_seconds: float
    memory_bytes: int


def forecast(
    run: schema.Run, sizes: Mapping[str, int], device_kind: str, calibration: Path | None = None
) -> Forecast | None:
    """Plans a run for the devices that it has found.

    Args:
        run: The run.
        sizes: Devices along each mesh axis.
        device_kind: As `jax.Device.device_kind` says it.
        calibration: A file of `mtx.planning.calibration`; None: the constants that are shipped.

    Returns:
        None where the devices are unknown: in no row of the table, and not what the calibration was measured on.

    Raises:
        UserError: The calibration is no such file.
    """
    run = dataclasses.replace(run, mesh=schema.Mesh(**sizes))
    num_devices, gpu, constants = 1, find_gpu(device_kind), None
    for size in sizes.values():
        num_devices *= size
    if calibration is not None:
        measured = read_calibration(calibration)
        constants = measured.constants
        # Simulated devices share the cores of one machine: fewer of them are each faster.
        alike = not measured.machine.get("simulated") or measured.machine.get("num_devices") == num_devices
        if measured.gpu is not None and re.fullmatch(measured.gpu.device_kind, device_kind):
            gpu = measured.gpu if alike else None
        elif measured.gpu is not None or measured.machine.get("device_kind") != device_kind:
            constants = None  # of other devices
    if gpu is None:
        return None
    case = Case.of(run, Cluster.of(gpu, num_devices), check=False)
    return Forecast(estimate_time(case, constants).seconds, estimate_memory(case).total)


def journal_fields(
    planned: Forecast | None, *, step_seconds: float, peak_bytes: int | None
) -> dict[str, float | int | None]:
    """Plan beside measurement, as the journal's event `plan` has them; null where one is unknown.

    Args:
        planned: Of `forecast`.
        step_seconds: Of a step after the first ones, measured.
        peak_bytes: Of `read_peak_bytes`.
    """
    return {
        "planned_step_seconds": None if planned is None else planned.step_seconds,
        "step_seconds": step_seconds,
        "planned_bytes": None if planned is None else planned.memory_bytes,
        "peak_bytes": peak_bytes,
    }


def read_peak_bytes(devices: Iterable[Any]) -> int | None:
    """The most memory that any of these devices' allocators has given out; None where they do not count (CPUs).

    Args:
        devices: `jax.Device`s of this process.
    """
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in devices]
    found = [int(peak) for peak in peaks if peak is not None]
    return max(found) if found else None
