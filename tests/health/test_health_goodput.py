"""The parts of the wall time add up whatever happened, and lost work is not counted as productive."""

import math
import random
from dataclasses import dataclass, field
from typing import Any

import pytest

from mtx.health.goodput import Goodput, measure_goodput

PARTS = ("productive", "lost", "compile", "data_wait", "save", "evaluate", "restart", "down", "stalled", "other")


def event(name: str, time: float, **fields: float) -> dict[str, Any]:
    return {"event": name, "time": time, **fields}


def lines(*steps: int) -> list[dict[str, float]]:
    return [{"step": step, "step_seconds": 0.5, "data_wait_seconds": 0.1} for step in steps]


def seconds_of_parts(goodput: Goodput) -> dict[str, float]:
    return {name: getattr(goodput, f"{name}_seconds") for name in PARTS}


CRASH = [
    event("start", 100.0),
    event("compiled", 110.0, seconds=8.0),
    event("evaluated", 118.0, step=10, seconds=1.5),
    event("saved", 130.0, step=20, seconds=0.5),
    event("start", 150.0),
    event("resumed", 151.0, step=20),
    event("compiled", 155.0, seconds=3.0),
    event("saved", 160.0, step=40, seconds=0.25),
    event("finished", 170.0, step=40),
]


def test_a_crash_loses_the_steps_after_the_checkpoint() -> None:
    goodput = measure_goodput(CRASH, lines(10, 20, 30, 40), [lines(30, 36)])
    assert seconds_of_parts(goodput) == pytest.approx(
        {
            "productive": 40 * 0.4,
            "data_wait": 40 * 0.1,
            "lost": 16 * 0.5,
            "compile": 11.0,
            "save": 0.75,
            "evaluate": 1.5,
            "restart": 2.0 + 2.0,  # each was ready some seconds after its start, less what it compiled
            "stalled": 0.0,
            "down": 150.0 - 138.0,  # the first one was killed 16 steps after it had saved
            "other": 38.0 - (10 + 1.5 + 0.5 + 18.0) + 20.0 - (5 + 0.25 + 10.0),
        }
    )
    assert goodput.wall_seconds == pytest.approx(70.0)
    assert goodput.fraction == pytest.approx(16 / 70)
    first, second = goodput.attempts
    assert (first.start, first.end, first.ended, first.first_step, first.last_step) == (100.0, 138.0, "killed", 0, 36)
    assert (first.lost_steps, first.recovery_seconds) == (16, None)
    assert (second.ended, second.first_step, second.last_step, second.lost_steps) == ("finished", 20, 40, 0)
    assert second.recovery_seconds == 12.0 + 5.0
    assert goodput.num_failures == 1
    assert goodput.mtbf_seconds == pytest.approx(70.0 - 12.0)


def test_a_run_that_did_nothing_yet() -> None:
    nothing = measure_goodput([], [], [])
    assert (nothing.wall_seconds, nothing.fraction, nothing.mtbf_seconds) == (0.0, None, None)
    begun = measure_goodput([event("start", 5.0)], [], [[]])
    assert begun.fraction is None
    assert [attempt.ended for attempt in begun.attempts] == ["running"]


def test_metrics_after_the_last_event_count() -> None:
    goodput = measure_goodput([event("start", 0.0), event("compiled", 4.0, seconds=4.0)], lines(10, 100), [])
    assert goodput.wall_seconds == 54.0
    assert goodput.fraction == pytest.approx(40 / 54)


def test_an_attempt_that_never_came_to_a_step() -> None:
    killed = [event("start", 140.0), event("corruption", 141.5)]
    goodput = measure_goodput(CRASH[:4] + killed + CRASH[4:], lines(10, 20, 30, 40), [lines(30, 36)])
    assert [attempt.ended for attempt in goodput.attempts] == ["killed", "corruption", "finished"]
    assert [attempt.lost_steps for attempt in goodput.attempts] == [16, 0, 0]
    assert goodput.attempts[1].last_step is None
    assert goodput.attempts[2].recovery_seconds == 150.0 - 141.5 + 5.0
    assert goodput.restart_seconds == 4.0 + 1.5
    assert goodput.productive_seconds == pytest.approx(16.0)


def test_a_rollback_goes_on_in_its_attempt() -> None:
    journal = [
        event("start", 0.0, step=0),
        event("compiled", 5.0, seconds=4.0),
        event("saved", 15.0, step=20, seconds=0.0),
        event("spike", 20.5, step=30),
        event("rollback", 21.0, step=20, from_step=31),
        event("resumed", 23.0, step=20),
        event("finished", 33.0, step=40),
    ]
    goodput = measure_goodput(journal, lines(10, 20, 30, 40), [lines(30)])
    assert (goodput.num_rollbacks, goodput.num_failures) == (1, 0)
    assert goodput.lost_seconds == pytest.approx(11 * 0.5)  # the step after the last line was as slow
    assert goodput.restart_seconds == 1.0 + 2.0
    assert goodput.wall_seconds == pytest.approx(33.0)
    (attempt,) = goodput.attempts
    assert (attempt.ended, attempt.first_step, attempt.last_step, attempt.lost_steps) == ("finished", 0, 40, 11)


@pytest.mark.parametrize(
    ("last", "ended", "failures"),
    [
        ([event("preempted", 9.0, step=5), event("saved", 9.5, step=5)], "preempted", 0),
        ([event("hang", 9.0)], "hang", 1),
        ([event("spike", 9.0, step=5)], "diverged", 1),
        ([event("saved", 9.0, step=5)], "running", 0),
    ],
)
def test_how_an_attempt_ends(last: list[dict[str, Any]], ended: str, failures: int) -> None:
    goodput = measure_goodput([event("start", 0.0), event("compiled", 4.0, seconds=4.0), *last], lines(5), [])
    assert ([attempt.ended for attempt in goodput.attempts], goodput.num_failures) == ([ended], failures)
    assert sum(seconds_of_parts(goodput).values()) == pytest.approx(goodput.wall_seconds)


@pytest.mark.parametrize("jump", [-1000.0, 1000.0])
def test_a_clock_that_jumps_breaks_nothing(jump: float) -> None:
    journal = [entry | {"time": entry["time"] + jump * (entry["time"] > 120)} for entry in CRASH]
    goodput = measure_goodput(journal, lines(10, 20, 30, 40), [lines(30, 36)])
    assert goodput.productive_seconds == pytest.approx(16.0)
    assert goodput.lost_seconds == pytest.approx(8.0)
    assert min(seconds_of_parts(goodput).values()) >= 0
    assert sum(seconds_of_parts(goodput).values()) == pytest.approx(goodput.wall_seconds)


@dataclass
class Simulation:
    """A run on a clock, with what it records and what it truly spent its time on."""

    rng: random.Random
    now: float = 0.0
    saved: int = 0
    journal: list[dict[str, Any]] = field(default_factory=list)
    file: list[dict[str, Any]] = field(default_factory=list)
    undone: list[list[dict[str, Any]]] = field(default_factory=list)
    took: dict[int, tuple[float, float]] = field(default_factory=dict)
    truth: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))

    def spend(self, part: str, most: float) -> float:
        seconds = self.rng.uniform(0, most)
        self.truth[part] += seconds
        self.now += seconds
        return seconds

    def record(self, name: str, **fields: float) -> None:
        self.journal.append(event(name, self.now, **fields))

    def go_back(self) -> None:
        """Undoes the steps after the last checkpoint."""
        for step in [step for step in self.took if step > self.saved]:
            self.truth["lost"] += sum(self.took.pop(step))
        if later := [line for line in self.file if line["step"] > self.saved]:
            self.undone.append(later)
            self.file = [line for line in self.file if line["step"] <= self.saved]

    def attempt(self, steps: int) -> None:
        """An attempt of so many steps at most, each logged and every seventh saved, until something happens to it."""
        self.record("start", step=self.saved)
        self.go_back()
        self.spend("restart", 5.0)
        if self.saved:
            self.record("resumed", step=self.saved)
        self.record("compiled", seconds=self.spend("compile", 9.0))
        step, end = self.saved, self.saved + self.rng.randrange(1, steps)
        while step < end:
            step += 1
            work, waiting = self.rng.uniform(0.5, 1.5), self.rng.uniform(0.0, 0.2)
            self.took[step] = (work, waiting)
            self.now += work + waiting
            self.file.append({"step": step, "step_seconds": work + waiting, "data_wait_seconds": waiting})
            if step % 5 == 0:
                self.record("evaluated", step=step, seconds=self.spend("evaluate", 2.0))
            if step % 7 == 0:
                self.record("saved", step=step, seconds=self.spend("save", 1.0))
                self.saved = step
                self.record("stored", step=step, seconds=1.0)
            if self.rng.random() < 0.05:
                self.record("spike", step=step)
                self.record("rollback", step=self.saved, from_step=step)
                self.go_back()
                self.spend("restart", 3.0)
                self.record("resumed", step=self.saved)
                step = self.saved
            elif self.rng.random() < 0.03:
                self.spend("stalled", 50.0)
                return self.record("hang")
        return None


@pytest.mark.parametrize("seed", range(60))
def test_the_parts_are_what_the_time_was_spent_on(seed: int) -> None:
    run = Simulation(random.Random(seed))
    for _ in range(run.rng.randrange(1, 8)):
        run.attempt(40)
        run.spend("down", 30.0)
    run.attempt(40)
    if run.journal[-1]["event"] != "hang":
        run.record("finished", step=max(run.took, default=0))
    run.truth["productive"] = math.fsum(work for work, _ in run.took.values())
    run.truth["data_wait"] = math.fsum(waiting for _, waiting in run.took.values())

    goodput = measure_goodput(run.journal, run.file, run.undone)
    found = seconds_of_parts(goodput)
    assert goodput.wall_seconds == pytest.approx(run.now)
    assert sum(found.values()) == pytest.approx(goodput.wall_seconds)
    assert found == pytest.approx(run.truth, abs=1e-6)
    assert sum(attempt.ended == "hang" for attempt in goodput.attempts) == sum(
        e["event"] == "hang" for e in run.journal
    )
