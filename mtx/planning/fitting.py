"""Finds the constants of the time model from measured steps.

Decides what a good fit is: the relative errors of seconds, of which large ones count linearly (Huber), since a misprint
must not bend the model. Constants keep inside their physical limits.

Invariant: a constant that is not free stays as it is.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from mtx.planning.case import Case
from mtx.planning.constants import Constants
from mtx.planning.layers import describe_step
from mtx.planning.step_time import time_step

TURN = 0.06
"""Relative error from which on an error counts linearly."""
LIMITS = {
    "matmul_efficiency": (0.5, 1.0, 0.05),
    "float8_efficiency": (0.3, 1.0, 0.15),
    "matmul_fill": (0.0, 2000.0, 150.0),
    "attention_efficiency": (0.1, 1.0, 0.1),
    "first_flash": (0.2, 1.0, 0.1),
    "older_instructions": (0.2, 1.0, 0.1),
    "memory_efficiency": (0.3, 1.0, 0.1),
    "unfused_traffic": (1.0, 5.0, 0.5),
    "nvlink_efficiency": (0.2, 1.0, 0.1),
    "network_efficiency": (0.1, 1.0, 0.1),
    "nvlink_latency_s": (0.0, 5e-5, 3e-6),
    "network_latency_s": (0.0, 2e-4, 1e-5),
    "overlap": (0.0, 1.0, 0.2),
    "tensor_overlap": (0.0, 1.0, 0.2),
    "layer_launch_s": (0.0, 5e-4, 2e-5),
    "step_launch_s": (0.0, 5e-2, 5e-3),
}
"""Smallest and largest value, and how well each is known beforehand (a standard deviation)."""
QUALITY_LIMITS = (0.1, 2.0, 0.2)


def fit(
    points: Sequence[tuple[Case, float]],
    start: Constants,
    free: Sequence[str],
    weights: Sequence[float] | None = None,
    begin: Constants | None = None,
) -> Constants:
    """The constants with which the model comes closest to measured seconds, and which are not far from `start`.

    Levenberg-Marquardt on relative errors, with derivatives by differences.

    Args:
        points: Cases with the seconds of a step.
        start: What is known beforehand, with a width of LIMITS around it; also all that stays.
        free: Names of constants to fit; 'quality.NAME@GENERATION': the quality of a software.
        weights: How much each point counts; None: 1.
        begin: Where the search begins; None: at `start`.
    """
    weight = np.ones(len(points)) if weights is None else np.array(weights)
    expected = np.array([_get(start, name) for name in free])
    width = np.array([_width(name) for name in free])
    low, high = np.array([_limits(name) for name in free]).T

    works = [describe_step(case) for case, _ in points]

    def errors_of(constants: Constants, which: Sequence[int]) -> np.ndarray:
        return np.array([math.log(time_step(works[i], constants).seconds / points[i][1]) for i in which])

    def cost(x: np.ndarray, errors: np.ndarray) -> float:
        sizes = np.abs(errors)
        huber = np.where(sizes < TURN, errors**2 / 2, TURN * (sizes - TURN / 2))
        return float((weight * huber).sum() + (TURN * (x - expected) / width) ** 2 @ np.full(len(x), 0.5))

    everything = range(len(points))
    affected = [_affected(name, points) for name in free]
    x = expected.copy() if begin is None else np.array([_get(begin, name) for name in free])
    errors = errors_of(_set(start, free, x), everything)
    best, damping = cost(x, errors), 1e-2
    for _ in range(30):
        jacobian = np.zeros((len(points), len(free)))
        for column, which in enumerate(affected):
            moved = x.copy()
            step = 0.02 * width[column]
            moved[column] += step if x[column] + step <= high[column] else -step
            change = errors_of(_set(start, free, moved), which) - errors[which]
            jacobian[which, column] = change / (moved - x)[column] * width[column]
        counted = weight * np.minimum(1.0, TURN / np.maximum(np.abs(errors), 1e-12))
        normal = jacobian.T @ (counted[:, None] * jacobian) + TURN**2 * np.eye(len(free))
        slope = jacobian.T @ (counted * errors) + TURN**2 * (x - expected) / width
        improvement = 0.0
        while damping < 1e6:
            change = np.linalg.solve(normal + damping * np.diag(np.diag(normal)), -slope) * width
            moved = np.clip(x + change, low, high)
            found = errors_of(_set(start, free, moved), everything)
            if (value := cost(moved, found)) < best:
                improvement, x, best, errors, damping = best - value, moved, value, found, damping / 5
                break
            damping *= 5
        if improvement < 1e-4 * best:
            break
    return _set(start, free, x)


def _affected(name: str, points: Sequence[tuple[Case, float]]) -> list[int]:
    """Points that a constant has an effect on."""
    if not name.startswith("quality."):
        return list(range(len(points)))
    software, _, generation = name.removeprefix("quality.").partition("@")
    return [
        i
        for i, (case, _) in enumerate(points)
        if case.software == software and generation in ("", case.cluster.gpu.generation)
    ]


def _limits(name: str) -> tuple[float, float]:
    return (QUALITY_LIMITS if name.startswith("quality.") else LIMITS[name])[:2]


def _width(name: str) -> float:
    return (QUALITY_LIMITS if name.startswith("quality.") else LIMITS[name])[2]


def _get(constants: Constants, name: str) -> float:
    if name.startswith("quality."):
        software, _, generation = name.removeprefix("quality.").partition("@")
        return constants.quality_of(software, generation)
    value: float = getattr(constants, name)
    return value


def _set(start: Constants, names: Sequence[str], values: np.ndarray) -> Constants:
    chosen = dict(zip(names, map(float, values)))
    qualities = {name.removeprefix("quality."): value for name, value in chosen.items() if name.startswith("quality.")}
    numbers = {name: value for name, value in chosen.items() if not name.startswith("quality.")}
    return dataclasses.replace(start, **numbers, quality={**start.quality, **qualities})
