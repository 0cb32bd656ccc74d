"""A signal becomes a flag, here and on the other processes of the run."""

import os
import signal
import socket
import subprocess
import sys

import pytest

from mtx.health.preemption import Preemption


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_a_flag_until_it_is_polled(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with Preemption() as preemption:
        assert not preemption.requested_at(1)
        assert preemption.cause is None
        os.kill(os.getpid(), number)
        assert preemption.requested_at(2)
        assert preemption.requested_at(3)
        assert preemption.cause == number.name
    assert signal.getsignal(number) is before
    with Preemption() as preemption:
        assert not preemption.requested_at(1)


PROGRAM = """
import os, signal, sys, time
import jax
port, index, number = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
jax.config.update("jax_platforms", "cpu")
jax.distributed.initialize(f"127.0.0.1:{port}", 2, index, cluster_detection_method="deactivate")
from mtx.health.preemption import Preemption
with Preemption(num_processes=2) as preemption:
    for step in range(1000):
        if step == 20 and index == 1:
            os.kill(os.getpid(), number)
        time.sleep(0.01)
        if preemption.requested_at(step):
            print("STOP", step)
            break
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_processes_stop_at_the_same_step(number: signal.Signals) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(port), str(index), str(int(number))],
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
    stops = [out.split("STOP ")[1] for out, _ in outputs]
    assert stops[0] == stops[1]
    assert 20 <= int(stops[0]) < 999
