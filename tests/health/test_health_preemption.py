"""A signal or a limit becomes a flag, here and on the other processes of the run."""

import os
import re
import signal
import subprocess
import sys
import time

import programs
import pytest

from mtx.health.deadline import Deadline
from mtx.health.preemption import Preemption


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_is_a_flag_until_it_is_polled(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with Preemption() as preemption:
        assert not preemption.requested()
        os.kill(os.getpid(), number)
        assert preemption.requested()
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.requested()
        assert preemption.cause == number.name  # the first one
    assert signal.getsignal(number) is before
    with Preemption() as preemption:
        assert not preemption.requested()


def test_a_second_interrupt_is_not_waited_for() -> None:
    with Preemption() as preemption:
        os.kill(os.getpid(), signal.SIGINT)
        assert preemption.requested()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_limit_leaves_room_for_a_step_and_a_save() -> None:
    deadline = Deadline(1e6 - 0.5)
    remaining = deadline.remaining_seconds()
    with Preemption(deadline=deadline) as preemption:
        assert not preemption.requested()
        assert not preemption.requested(reserve_seconds=remaining - 60)
        assert preemption.requested(reserve_seconds=remaining)
        assert preemption.requested()
        assert preemption.cause == "Train.stop_before = 999999.5"


def test_the_clock_of_process_0_counts() -> None:
    with Preemption(process=1, deadline=Deadline(1e6)) as preemption:
        assert not preemption.requested(reserve_seconds=1e9)


PROGRAM = """
import os, signal, sys, time
who, when, number, limit_s = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
from mtx.mesh import start_process
start_process()
import jax
from mtx.health.deadline import Deadline
from mtx.health.preemption import Preemption
process = jax.process_index()
deadline = Deadline(limit_s) if limit_s else None
with Preemption(process=process, num_processes=2, deadline=deadline) as preemption:
    if when == "before":
        if process == who:
            os.kill(os.getpid(), number)
        time.sleep(2.5)  # as if it compiled; the others know by now
    for step in range(400, 1400):
        if process == who and when == "twice" and step in (420, 425):
            os.kill(os.getpid(), number)
        time.sleep(0.02)
        if preemption.requested():
            print("STOP", step, preemption.cause)
            break
"""


def stop_two(who: int, when: str, number: int = signal.SIGTERM, limit_s: float = 0) -> tuple[int, list[str]]:
    """The step at which both stop, and what each one says was the cause."""
    env = programs.environment(
        MTX_COORDINATOR=f"127.0.0.1:{programs.free_port()}", MTX_NUM_PROCESSES="2", MTX_COMPILATION_CACHE=""
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(who), when, str(int(number)), str(limit_s)],
            env=env | {"MTX_PROCESS_ID": str(index)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=60) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    stops = [re.findall(r"^STOP (\d+) (.*)$", out, re.MULTILINE) for out, _ in outputs]
    assert all(len(stop) == 1 for stop in stops), outputs
    (first, cause), (second, other) = stops[0][0], stops[1][0]
    assert first == second
    return int(first), [cause, other]


@pytest.mark.parametrize("who", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_processes_stop_at_the_same_step(number: signal.Signals, who: int) -> None:
    step, causes = stop_two(who, "twice", number)
    assert 420 <= step < 1300
    if number == signal.SIGUSR1:
        assert causes[who] == "SIGUSR1"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_before_the_first_step_stops_after_it(number: signal.Signals) -> None:
    step, _ = stop_two(1, "before", number)
    assert step == 400


def test_a_limit_stops_all_processes() -> None:
    begin = time.monotonic()
    _, causes = stop_two(0, "never", limit_s=12)
    assert causes[0] == "Train.stop_before = 12.0"
    assert time.monotonic() - begin < 14
