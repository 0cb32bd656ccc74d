"""The interval is the one that loses least, and few failures give a wide range."""

import math
import random

import pytest

from mtx.health.interval import Advice, advise_interval, bound_mtbf, interval_of_daly, interval_of_young


def advise(**options: float | None) -> Advice:
    values = {
        "save_seconds": 0.5, "stored_seconds": 20.0, "step_seconds": 2.0, "up_seconds": 20 * 3600.0,
        "num_failures": 4, "every_steps": 100,
    }  # fmt: skip
    return advise_interval(**(values | options))  # type: ignore[arg-type]


def expected_wall(interval: float, save: float, mtbf: float) -> float:
    """Wall time per second of work where failures are exponential and a restart costs nothing (Daly 2006)."""
    return mtbf * math.expm1((interval + save) / mtbf) / interval


@pytest.mark.parametrize("mtbf", [60.0, 3600.0, 86400.0])
@pytest.mark.parametrize("save", [0.1, 5.0, 20.0])
def test_daly_loses_least(save: float, mtbf: float) -> None:
    daly, young = interval_of_daly(save, mtbf), interval_of_young(save, mtbf)
    best = min(expected_wall(daly * factor / 100, save, mtbf) for factor in range(20, 500))
    assert expected_wall(daly, save, mtbf) <= best * 1.0005
    assert expected_wall(daly, save, mtbf) <= expected_wall(young, save, mtbf)


def test_published_forms() -> None:
    assert interval_of_young(2.0, 100.0) == 20.0
    assert interval_of_daly(2.0, 100.0) == pytest.approx(20.0 * (1 + 0.1 / 3 + 0.01 / 9) - 2.0)
    assert interval_of_daly(300.0, 100.0) == 100.0


def test_bounds_of_a_poisson_process() -> None:
    """The table of Garwood: expected counts at 5 % on each side are 0-3.00, 0.0513-4.74, 0.355-6.30, 5.43-16.96."""
    for count, low, high in [(1, 0.0513, 4.744), (2, 0.3554, 6.296), (10, 5.425, 16.962), (200, 177.2, 224.9)]:
        assert bound_mtbf(1.0, count) == pytest.approx((1 / high, 1 / low), rel=1e-3)
    assert bound_mtbf(3600.0, 0) == (pytest.approx(3600.0 / -math.log(0.05)), math.inf)  # about a third


def test_bounds_hold_nine_times_in_ten() -> None:
    rng, hits = random.Random(0), 0
    for _ in range(400):
        count, time = 0, rng.expovariate(1.0)
        while time < 5.0:
            count, time = count + 1, time + rng.expovariate(1.0)
        low, high = bound_mtbf(5.0, count)
        hits += low <= 1.0 <= high
    assert hits >= 0.88 * 400  # exact bounds are rather too wide than too narrow


def test_no_interval_is_shorter_than_storing_takes() -> None:
    assert advise().best_seconds == pytest.approx(interval_of_daly(0.5, 5 * 3600.0))
    slow = advise(stored_seconds=900.0)
    assert (slow.low_seconds, slow.best_seconds, slow.high_seconds) == (900.0, 900.0, 900.0)
    assert advise(save_seconds=0.0, stored_seconds=0.0).best_seconds == 2.0


def test_more_failures_narrow_the_range() -> None:
    few, many = advise(), advise(num_failures=40)
    assert few.low_seconds < (few.best_seconds or 0) < (few.high_seconds or 0)
    assert (many.high_seconds or 0) / many.low_seconds < (few.high_seconds or 0) / few.low_seconds
    none = advise(num_failures=0)
    assert (none.mtbf_seconds, none.best_seconds, none.high_seconds) == (None, None, None)
    assert none.low_seconds == pytest.approx(interval_of_daly(0.5, 20 * 3600 / -math.log(0.05)))


@pytest.mark.parametrize(
    ("options", "verdict"),
    [
        ({}, "good"),
        ({"every_steps": None}, "unset"),
        ({"every_steps": 2000}, "too rare"),
        ({"every_steps": 5}, "too often"),
        ({"every_steps": 5, "save_seconds": 0.005}, "good"),
        ({"every_steps": 5, "num_failures": 0}, "too often"),
        ({"every_steps": 20000, "num_failures": 0}, "good"),
    ],
)
def test_what_is_said_of_the_config(options: dict[str, float | None], verdict: str) -> None:
    assert advise(**options).verdict == verdict


def test_the_cost_is_least_at_the_best() -> None:
    advice = advise()
    costs = [advice.cost((advice.best_seconds or 0) * factor) or 0 for factor in (0.5, 1.0, 2.0)]
    assert costs[1] == min(costs)
    assert costs[0] == pytest.approx(1.25 * costs[1], rel=0.02)
