"""How far apart checkpoints should be: what a save costs against what a failure loses.

Decides from three measured numbers: C, the seconds that the loop stands still for a save; M, the mean time between
failures; and the seconds until a checkpoint is stored, before which the next one cannot be. Young (1974,
doi:10.1145/361147.361115) sets the interval to sqrt(2 C M); Daly (2006, doi:10.1016/j.future.2004.11.016) has the next
terms and holds for costly saves, too. Few failures tell M badly: its bounds are the exact ones of a Poisson process
(Garwood 1936, doi:10.1093/biomet/28.3-4.437), at 5 % on each side; without a failure the lower one is the rule of three
(Hanley and Lippman-Hand 1983, doi:10.1001/jama.1983.03330370053031).

Invariant: no interval is advised that is shorter than what storing a checkpoint takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

_TAIL = 0.05
# The cost is flat around its least: at twice or half the best interval it is a quarter above.
_NEAR = 2.0
_CHEAP = 0.001  # share of the time; saves that take less are not worth a word

Verdict = Literal["unset", "good", "too rare", "too often"]


def interval_of_young(save_seconds: float, mtbf_seconds: float) -> float:
    """Seconds between checkpoints, first order: sqrt(2 C M)."""
    return math.sqrt(2 * save_seconds * mtbf_seconds)


def interval_of_daly(save_seconds: float, mtbf_seconds: float) -> float:
    """Seconds between checkpoints, with the higher-order terms; at most about M, where saves cost as much."""
    if save_seconds >= 2 * mtbf_seconds:
        return mtbf_seconds
    ratio = save_seconds / (2 * mtbf_seconds)
    return interval_of_young(save_seconds, mtbf_seconds) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - save_seconds


def bound_mtbf(up_seconds: float, num_failures: int) -> tuple[float, float]:
    """Bounds of the mean time between failures, seconds, 90 % between them; the upper is infinite without a failure."""
    most = _solve(lambda mean: _poisson_cdf(num_failures, mean) - _TAIL, num_failures)
    if not num_failures:
        return up_seconds / most, math.inf
    least = _solve(lambda mean: _poisson_cdf(num_failures - 1, mean) - (1 - _TAIL), num_failures)
    return up_seconds / most, up_seconds / least


def _poisson_cdf(count: int, mean: float) -> float:
    """Probability of `count` events or fewer where `mean` are expected."""
    log = math.log(mean)
    return math.fsum(math.exp(k * log - mean - math.lgamma(k + 1)) for k in range(count + 1))


def _solve(falling: Callable[[float], float], count: int) -> float:
    """Where a falling function of the expected number of events is zero, by bisection."""
    low, high = 1e-9, 10.0 + 4.0 * count
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if falling(middle) > 0 else (low, middle)
    return (low + high) / 2


@dataclass(frozen=True, kw_only=True)
class Advice:
    """The interval for a run, and what it rests on. Times are seconds."""

    save_seconds: float
    """C: the loop stands still for a checkpoint."""
    stored_seconds: float
    """From asking for a checkpoint until it is complete."""
    step_seconds: float
    up_seconds: float
    num_failures: int
    """Failures and rollbacks in `up_seconds`: whatever went back to a checkpoint."""
    mtbf_seconds: float | None
    mtbf_low_seconds: float
    mtbf_high_seconds: float | None
    """None without a failure, as it is then unbounded."""
    young_seconds: float | None
    best_seconds: float | None
    """Daly's interval; None without a failure."""
    low_seconds: float
    high_seconds: float | None
    every_steps: int | None
    """What the config says."""

    def steps(self, seconds: float) -> int:
        """Steps in an interval, one at least."""
        return max(1, round(seconds / self.step_seconds))

    @property
    def every_seconds(self) -> float | None:
        """Time between the checkpoints of the config."""
        return None if self.every_steps is None else self.every_steps * self.step_seconds

    def cost(self, interval_seconds: float) -> float | None:
        """Share of the time for saves and work to be done again, first order; None without a failure."""
        if self.mtbf_seconds is None:
            return None
        return self.save_seconds / interval_seconds + interval_seconds / (2 * self.mtbf_seconds)

    @property
    def verdict(self) -> Verdict:
        """What is to be said of the config's interval."""
        if self.every_seconds is None:
            return "unset"
        if self.every_seconds * _NEAR < self.low_seconds and self.save_seconds > _CHEAP * self.every_seconds:
            return "too often"
        if self.high_seconds is not None and self.every_seconds > _NEAR * self.high_seconds:
            return "too rare"
        return "good"


def advise_interval(
    *,
    save_seconds: float,
    stored_seconds: float,
    step_seconds: float,
    up_seconds: float,
    num_failures: int,
    every_steps: int | None,
) -> Advice:
    """The checkpoint interval for a run; the arguments, all measured, are the fields of `Advice`."""
    low, high = bound_mtbf(up_seconds, num_failures)
    mtbf = up_seconds / num_failures if num_failures else None

    def choose(mtbf_seconds: float) -> float:
        return max(interval_of_daly(save_seconds, mtbf_seconds), stored_seconds, step_seconds)

    return Advice(
        save_seconds=save_seconds,
        stored_seconds=stored_seconds,
        step_seconds=step_seconds,
        up_seconds=up_seconds,
        num_failures=num_failures,
        mtbf_seconds=mtbf,
        mtbf_low_seconds=low,
        mtbf_high_seconds=None if mtbf is None else high,
        young_seconds=None if mtbf is None else interval_of_young(save_seconds, mtbf),
        best_seconds=None if mtbf is None else choose(mtbf),
        low_seconds=choose(low),
        high_seconds=None if mtbf is None else choose(high),
        every_steps=every_steps,
    )
