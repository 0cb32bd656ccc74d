"""Finds the constants of the time model from measured steps.

Decides what a good fit is: the relative errors of seconds, of which large ones count linearly (Huber), since a misprint
must not bend the model. Constants keep inside their physical limits.

Invariant: a constant that is not free stays as it is.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from mtx.planning.case import Case
from mtx.planning.constants import Constants
from mtx.planning.step_time import estimate_time

TURN = 0.06
"""Relative error from which on an error counts linearly."""
LIMITS = {
    "matmul_efficiency": (0.3, 1.0),
    "matmul_fill": (0.0, 2000.0),
    "attention_efficiency": (0.1, 1.0),
    "memory_efficiency": (0.2, 1.0),
    "unfused_traffic": (1.0, 5.0),
    "nvlink_efficiency": (0.2, 1.0),
    "network_efficiency": (0.1, 1.0),
    "nvlink_latency_s": (0.0, 5e-5),
    "network_latency_s": (0.0, 2e-4),
    "overlap": (0.0, 1.0),
    "tensor_overlap": (0.0, 1.0),
    "layer_launch_s": (0.0, 5e-4),
    "step_launch_s": (0.0, 5e-2),
}


def fit(points: Sequence[tuple[Case, float]], start: Constants, free: Sequence[str]) -> Constants:
    """The constants with which the model comes closest to measured seconds.

    Args:
        points: Cases with the seconds of a step.
        start: Where to begin, and all that stays.
        free: Names of constants to fit; 'quality.NAME': the quality of a software.
    """
    return fit_residuals(
        lambda constants: [math.log(estimate_time(c, constants).seconds / s) for c, s in points], start, free
    )


def fit_residuals(
    residuals: Callable[[Constants], Sequence[float]], start: Constants, free: Sequence[str]
) -> Constants:
    """Levenberg-Marquardt on weighted residuals, with derivatives by differences."""
    x = np.array([_get(start, name) for name in free])
    scale = np.array([_scale(name) for name in free])

    def cost(values: np.ndarray) -> tuple[float, np.ndarray]:
        errors = np.array(residuals(_set(start, free, values)))
        sizes = np.abs(errors)
        return float(np.where(sizes < TURN, errors**2 / 2, TURN * (sizes - TURN / 2)).sum()), errors

    best, errors = cost(x)
    damping = 1e-2
    for _ in range(40):
        jacobian = np.empty((len(errors), len(free)))
        for column, name in enumerate(free):
            step = 1e-3 * scale[column]
            high = _limits(name)[1]
            moved = x.copy()
            moved[column] += step if x[column] + step <= high else -step
            jacobian[:, column] = (np.array(residuals(_set(start, free, moved))) - errors) / (moved - x)[column]
        jacobian *= scale
        weight = np.minimum(1.0, TURN / np.maximum(np.abs(errors), 1e-12))
        normal, slope = jacobian.T @ (weight[:, None] * jacobian), jacobian.T @ (weight * errors)
        improved = False
        while damping < 1e6:
            change = np.linalg.solve(normal + damping * np.diag(np.diag(normal) + 1e-9), -slope) * scale
            moved = np.array([min(max(v, _limits(n)[0]), _limits(n)[1]) for v, n in zip(x + change, free)])
            value, found = cost(moved)
            if value < best:
                improved = best - value > 1e-6 * best
                x, best, errors, damping = moved, value, found, damping / 5
                break
            damping *= 5
        if not improved:
            break
    return _set(start, free, x)


def _limits(name: str) -> tuple[float, float]:
    return (0.1, 2.0) if name.startswith("quality.") else LIMITS[name]


def _scale(name: str) -> float:
    low, high = _limits(name)
    return (high - low) / 5


def _get(constants: Constants, name: str) -> float:
    if name.startswith("quality."):
        return constants.quality_of(name.removeprefix("quality."))
    value: float = getattr(constants, name)
    return value


def _set(start: Constants, names: Sequence[str], values: np.ndarray) -> Constants:
    chosen = dict(zip(names, map(float, values)))
    qualities = {name.removeprefix("quality."): value for name, value in chosen.items() if name.startswith("quality.")}
    numbers = {name: value for name, value in chosen.items() if not name.startswith("quality.")}
    return dataclasses.replace(start, **numbers, quality={**start.quality, **qualities})
