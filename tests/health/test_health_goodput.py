"""The parts of the wall time add up, and lost work is not counted as productive."""

import pytest

from mtx.health.goodput import measure_goodput


def event(name: str, time: float, **fields: float) -> dict[str, object]:
    return {"event": name, "time": time, **fields}


def lines(*steps: int) -> list[dict[str, float]]:
    return [{"step": step, "step_seconds": 0.5} for step in steps]


def test_a_crash_loses_the_steps_after_the_checkpoint() -> None:
    journal = [
        event("start", 100.0),
        event("compiled", 110.0, seconds=8.0),
        event("saved", 130.0, step=20, seconds=0.5),
        event("start", 150.0),
        event("resumed", 151.0, step=20),
        event("compiled", 155.0, seconds=3.0),
        event("saved", 160.0, step=40, seconds=0.25),
        event("finished", 170.0, step=40),
    ]
    goodput = measure_goodput(journal, lines(10, 20, 30, 40), [lines(30, 36)])
    assert goodput.wall_seconds == 70.0
    assert goodput.productive_seconds == 20.0
    assert goodput.lost_seconds == 8.0  # 16 steps after step 20
    assert (goodput.compile_seconds, goodput.save_seconds) == (11.0, 0.75)
    assert goodput.other_seconds == pytest.approx(70.0 - 20.0 - 8.0 - 11.75)
    assert goodput.fraction == pytest.approx(20 / 70)


def test_a_run_that_did_nothing_yet() -> None:
    nothing = measure_goodput([], [], [])
    assert (nothing.wall_seconds, nothing.fraction, nothing.other_seconds) == (0.0, None, 0.0)
    assert measure_goodput([event("start", 5.0)], [], [[]]).fraction is None


def test_metrics_after_the_last_event_count() -> None:
    goodput = measure_goodput([event("start", 0.0), event("compiled", 4.0, seconds=4.0)], lines(10, 100), [])
    assert goodput.wall_seconds == 54.0
    assert goodput.fraction == pytest.approx(50 / 54)
