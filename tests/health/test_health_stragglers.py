"""The process that is slow by itself is named, and those that wait for it are not."""

from __future__ import annotations

import json

import numpy as np
import programs
import pytest

from mtx.health.stragglers import find_outliers

NO_FLOOR = np.zeros(2)


@pytest.mark.parametrize("processes", [3, 4, 100])
def test_one_of_many(processes: int) -> None:
    times = np.random.default_rng(0).uniform(0.9, 1.1, (processes, 2))
    assert find_outliers(times, 1.5, NO_FLOOR) == []
    times[2, 1] = 2.0
    ((process, kind, value, usual),) = find_outliers(times, 1.5, NO_FLOOR)
    assert (process, kind, value) == (2, 1, 2.0)
    assert usual == np.median(np.delete(times[:, 1], 2))


def test_the_slower_of_two() -> None:
    assert [o.process for o in find_outliers(np.array([[1.0], [1.6]]), 1.5, np.zeros(1))] == [1]
    assert find_outliers(np.array([[1.0], [1.4]]), 1.5, np.zeros(1)) == []


def test_a_whole_slow_host_is_found() -> None:
    times = np.ones((32, 1))
    times[8:16] = 3.0
    assert [o.process for o in find_outliers(times, 1.5, np.zeros(1))] == list(range(8, 16))


def test_what_is_too_little_names_nobody() -> None:
    times = np.array([[1e-6, 0.0], [1e-5, 0.04], [1e-6, 0.0]])
    assert find_outliers(times, 1.5, np.full(2, 0.05)) == []
    times[1, 1] = 0.06
    assert [(o.process, o.kind) for o in find_outliers(times, 1.5, np.full(2, 0.05))] == [(1, 1)]


PROGRAM = """
import json, time
from mtx.mesh import start_process
start_process()
import jax
from mtx.health.stragglers import Stragglers
events = []
stragglers = Stragglers(ratio=1.5, record=lambda event, **fields: events.append([event, fields]))
time.sleep(1)
told = stragglers.compare(100, {"waiting for data": 0.5 if jax.process_index() else 0.01, "work of its host": 0.02})
again = stragglers.compare(200, {"waiting for data": 0.01, "work of its host": 0.02})
print(json.dumps([events, told, stragglers._measure_probe()]))
"""


def test_two_processes_agree_on_the_slow_one() -> None:
    env = programs.environment(2, MTX_COMPILATION_CACHE="")
    for output in programs.run_processes(["-c", PROGRAM], count=2, env=env):
        events, told, probe_seconds = json.loads(output.splitlines()[-1])
        mine = [fields for event, fields in events if "waiting for data" in fields["cause"]]
        assert [(fields["step"], fields["late_process"]) for fields in mine] == [(100, 1)]
        assert mine[0]["cause"] == "waiting for data took 0.5 s, and 0.01 s on the other processes"
        assert mine[0]["late_host"]
        assert any(line.startswith("step 100: process 1 on host") for line in told)
        assert not any("work of its host" in fields["cause"] for _, fields in events)
        assert 0 < probe_seconds < 2
