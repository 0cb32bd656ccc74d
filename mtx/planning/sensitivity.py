"""What if: the step's time with one property of the machines changed.

Decides which properties; the time model says what becomes of the step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mtx.planning.case import Case, Cluster
from mtx.planning.hardware import Gpu


@dataclass(frozen=True)
class Change:
    """One property changed.

    Attributes:
        what: In words.
        step_seconds: Then.
        relative: Change of the step's time: 0.1 means that it takes 10 % longer.
    """

    what: str
    step_seconds: float
    relative: float


def _network(cluster: Cluster, factor: float) -> Cluster:
    return dataclasses.replace(cluster, nic_bandwidth=cluster.nic_bandwidth * factor)


def _nvlink(cluster: Cluster, factor: float) -> Cluster:
    return _with_gpu(cluster, nvlink_bandwidth=cluster.gpu.nvlink_bandwidth * factor)


def _memory(cluster: Cluster, factor: float) -> Cluster:
    return _with_gpu(cluster, memory_bandwidth=cluster.gpu.memory_bandwidth * factor)


def _matmul(cluster: Cluster, factor: float) -> Cluster:
    gpu: Gpu = cluster.gpu
    dense, measured = ({k: v * factor for k, v in t.items()} for t in (gpu.dense_flops, gpu.measured_flops))
    return _with_gpu(cluster, dense_flops=dense, measured_flops=measured)


def _with_gpu(cluster: Cluster, **fields: Any) -> Cluster:
    return dataclasses.replace(cluster, gpu=dataclasses.replace(cluster.gpu, **fields))


SCENARIOS: tuple[tuple[str, Callable[[Cluster, float], Cluster], float], ...] = (
    ("network half as fast", _network, 0.5),
    ("network twice as fast", _network, 2.0),
    ("NVLink half as fast", _nvlink, 0.5),
    ("memory bandwidth -10 %", _memory, 0.9),
    ("memory bandwidth +10 %", _memory, 1.1),
    ("matmul rate -10 %", _matmul, 0.9),
    ("matmul rate +10 %", _matmul, 1.1),
)


def vary(case: Case, base_seconds: float, step_seconds: Callable[[Case], float]) -> tuple[Change, ...]:
    """The step's time in each scenario.

    Args:
        base_seconds: With the machines as they are.
        step_seconds: The estimate.
    """
    changes = []
    for what, change, factor in SCENARIOS:
        seconds = step_seconds(dataclasses.replace(case, cluster=change(case.cluster, factor)))
        changes.append(Change(what, seconds, seconds / base_seconds - 1.0))
    return tuple(changes)
