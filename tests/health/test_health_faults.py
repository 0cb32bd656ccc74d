"""Faults happen where they were asked for, once, and never otherwise."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import programs
import pytest

from mtx.errors import UserError
from mtx.health import faults
from mtx.health.faults import Fault, parse_faults

PROGRAM = """
import sys
from mtx.health.faults import reach
for step in range(int(sys.argv[1]), 6):
    for phase in ("data", "step", "manifest"):
        print(phase, step, flush=True)
        reach(phase, step)
"""


def run_program(fault: str, first_step: int = 0, **more: str) -> subprocess.CompletedProcess[str]:
    env = programs.environment(MTX_FAULT=fault, **more)
    return subprocess.run([sys.executable, "-c", PROGRAM, str(first_step)], env=env, capture_output=True, text=True)


def test_forms() -> None:
    assert parse_faults("") == []
    assert parse_faults("kill:data:3; sleep:wait:4:0.5:1 ;clock:-3600:7;stop:save:2:0") == [
        Fault("kill:data:3", "kill", 3, "data"),
        Fault("sleep:wait:4:0.5:1", "sleep", 4, "wait", 0.5, 1),
        Fault("clock:-3600:7", "clock", 7, None, -3600.0),
        Fault("stop:save:2:0", "stop", 2, "save", process=0),
    ]


@pytest.mark.parametrize(
    "text", ["kill", "kill:data", "kill:data:3:0:0", "hurt:data:3", "kill:lunch:3", "kill:data:x", "sleep:data:3:soon"]
)
def test_mistakes_are_the_users(text: str) -> None:
    with pytest.raises(UserError, match="MTX_FAULT"):
        parse_faults(text)


def test_it_dies_at_the_place_and_once(tmp_path: Path) -> None:
    fired = {"MTX_FAULT_FIRED": str(tmp_path / "fired")}
    done = run_program("kill:step:3", **fired)
    assert done.returncode == -signal.SIGKILL
    assert done.stdout.splitlines()[-1] == "step 3"
    assert (tmp_path / "fired").read_text() == "kill:step:3 in process 0\n"
    assert run_program("kill:step:3", **fired).returncode == 0
    again = run_program("kill:step:3;kill:manifest:4", **fired)  # the other one is still to come
    assert again.stdout.splitlines()[-1] == "manifest 4"


def test_a_later_step_will_do() -> None:
    assert run_program("kill:data:2", first_step=4).stdout.splitlines() == ["data 4"]


def test_only_the_process_that_is_meant() -> None:
    assert run_program("kill:data:2:1", MTX_PROCESS_ID="0").returncode == 0
    assert run_program("kill:data:2:1", MTX_PROCESS_ID="1").returncode == -signal.SIGKILL
    assert run_program("kill:data:2", MTX_PROCESS_ID="1").returncode == -signal.SIGKILL


def test_sleep_and_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTX_FAULT", "sleep:data:2:0.3;clock:7200:3")
    monkeypatch.setattr(time, "time", time.time)  # is put back afterwards
    faults._planned.cache_clear()
    try:
        begin, clock = time.monotonic(), time.time()
        faults.reach("data", 1)
        assert time.monotonic() - begin < 0.2
        faults.reach("data", 2)
        faults.reach("data", 2)
        assert 0.3 <= time.monotonic() - begin < 0.6
        assert time.time() - clock < 60
        faults.reach("wait", 3)
        assert 7200 <= time.time() - clock < 7260
        assert time.monotonic() - begin < 60
    finally:
        faults._planned.cache_clear()
