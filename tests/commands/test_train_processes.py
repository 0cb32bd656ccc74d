"""Runs of two processes: they stop together, and where one is lost, stuck, slow or wrong, the run says which."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import numpy as np
import pytest
from programs import ROOT, free_port, run

from mtx.health.faults import FAULT, FIRED
from mtx.health.journal import read_journal

HOST = socket.gethostname()
SLOW = ["Train.eval_every = 1", "Train.eval_batches = 30"]
"""Steps that take long enough for a signal to come in between."""


class Ended(NamedTuple):
    codes: list[int | None]
    """None: killed by the test, since it was stopped."""
    outputs: list[str]
    seconds: float
    """From the fault, or the start, to the end of the last process that ended by itself."""


class Pair:
    """Two processes of one run."""

    def __init__(self, processes, files, fired):
        self.processes, self.files, self.fired, self.begin = processes, files, fired, time.time()

    def wait(self, count=2, timeout_s=120):
        """Waits for `count` of them to end."""
        deadline = time.monotonic() + timeout_s
        while sum(process.poll() is not None for process in self.processes) < count:
            assert time.monotonic() < deadline, self.outputs()
            time.sleep(0.05)
        begin = self.fired.stat().st_mtime if self.fired.exists() else self.begin
        return Ended([process.poll() for process in self.processes], self.outputs(), time.time() - begin)

    def outputs(self):
        texts = []
        for file in self.files:
            file.seek(0)
            texts.append(file.read())
        return texts


@contextmanager
def pair(workplace, name, *settings, fault="", program=()):
    """Starts two processes with a device each; kills what is left of them."""
    fired = workplace.folder / f"{name}-fired"
    env = workplace.environment(MTX_COORDINATOR=f"127.0.0.1:{free_port()}", MTX_NUM_PROCESSES="2")
    env |= {FAULT: fault, FIRED: str(fired)} if fault else {}
    command = workplace.command(name, *settings)
    command = [*program, *command[2:]] if program else command
    with ExitStack() as stack:
        files = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(2)]
        processes = [
            subprocess.Popen(
                [sys.executable, *command],
                env={**env, "MTX_PROCESS_ID": str(index)},
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
            )
            for index, file in enumerate(files)
        ]
        try:
            yield Pair(processes, files, fired)
        finally:
            for process in processes:
                process.kill()
                process.wait()


def wait_for_step(workplace, name, step):
    metrics, deadline = workplace.folder / name / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and f'"step": {step},' in metrics.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def events(workplace, name, *kinds):
    return [event for event in read_journal(workplace.folder / name) if event["event"] in kinds]


def training_losses(workplace, name):
    return [loss for _, validation, loss in workplace.losses(name) if validation is None]


@pytest.fixture(scope="module")
def undisturbed(workplace):
    with pair(workplace, "two-undisturbed") as two:
        assert two.wait().codes == [0, 0], two.outputs()
    return "two-undisturbed"


def find_late(workplace, name):
    """The process that the journal names as late or lost; the other one has left its stacks."""
    (hang,) = events(workplace, name, "hang")
    (late,) = hang["late"]
    assert (late["process"], late["host"]) == (1, HOST)
    assert f"process 1 on host {HOST} (phase {late['phase']}, step {late['step']})" in hang["cause"]
    (stacks,) = (workplace.folder / name / "stacks").glob("process-0-*.txt")
    assert "training/run.py" in stacks.read_text()
    return late


@pytest.mark.slow
def test_a_signal_to_one_stops_both(workplace, straight, undisturbed):
    name = "signalled"
    with pair(workplace, name, *SLOW) as two:
        wait_for_step(workplace, name, 3)
        two.processes[1].send_signal(signal.SIGUSR1)
        ended = two.wait()
    assert ended.codes == [4, 4], ended.outputs
    (preempted,) = events(workplace, name, "preempted")
    stopped = preempted["step"]
    assert 3 <= stopped < 20
    assert all(f"stopped after step {stopped} " in output for output in ended.outputs)
    assert not any("Traceback" in output for output in ended.outputs)
    workplace.train(name)
    proof = events(workplace, name, "resumed")[-1]["proof"]
    assert (proof["arrays"], proof["batch"]) == ("equal", "equal")
    assert proof["step"] == "bit-equal" or " of 1e-" in proof["step"]
    np.testing.assert_allclose(training_losses(workplace, name), training_losses(workplace, straight), rtol=3e-5)
    assert training_losses(workplace, name)[:stopped] == training_losses(workplace, undisturbed)[:stopped]


@pytest.mark.slow
def test_a_limit_stops_both(workplace, undisturbed):
    name, limit_s = "limited", 30
    with pair(workplace, name, "Train.steps = 100000", f"Train.stop_before = '{limit_s}s'") as two:
        ended = two.wait()
    assert ended.codes == [4, 4], ended.outputs
    assert ended.seconds < limit_s + 8  # what JAX takes to end, besides
    (preempted,) = events(workplace, name, "preempted")
    assert preempted["cause"] == f"Train.stop_before = '{limit_s}s'"
    assert preempted["time"] < two.begin + limit_s
    assert (workplace.folder / name / "checkpoints" / str(preempted["step"])).exists()


@pytest.mark.slow
def test_a_killed_process_costs_the_steps_since_the_checkpoint(workplace, undisturbed):
    """The other one ends, and the launcher starts both again."""
    name, fired = "bereft", workplace.folder / "bereft-fired"
    options = ["--processes", "2", "--devices-per-process", "1", "--max-restarts", "2", "--grace-s", "40"]
    train = [word for word in workplace.command(name) if word not in ("--cpu-devices", "1")]
    env = workplace.environment(**{FAULT: "kill:step:10:1", FIRED: str(fired)})
    done = run(["-m", "launch", "local", *options, "--", sys.executable, *train], env=env)
    lines = map(json.loads, (workplace.folder / name / "launch.jsonl").read_text().splitlines())
    first, second = (line for line in lines if line["event"] == "ended")
    assert first["codes"] == [6, -signal.SIGKILL], done.stderr
    assert first["time"] - fired.stat().st_mtime < 30
    assert second["codes"] == [0, 0]
    assert find_late(workplace, name)["step"] <= 10  # where it was in its last sign of life, one a second
    (resumed,) = events(workplace, name, "resumed")
    assert resumed["step"] in (4, 8)  # the second one may have been on its way
    assert resumed["proof"]["step"] == "bit-equal"
    assert workplace.losses(name) == workplace.losses(undisturbed)
    one, other = workplace.state(name, 20), workplace.state(undisturbed, 20)
    for leaf, values in one.items():
        np.testing.assert_array_equal(values, other[leaf], err_msg=leaf)


@pytest.mark.slow
def test_a_stopped_process_is_named(workplace, undisturbed):
    with pair(workplace, "stopped", "Health.peer_timeout_s = 5", fault="stop:step:6:1") as two:
        ended = two.wait(count=1)
    assert ended.codes == [6, None], ended.outputs
    assert ended.seconds < 15
    assert find_late(workplace, "stopped")["step"] <= 6


@pytest.mark.slow
def test_a_stuck_process_is_named(workplace, undisturbed):
    with pair(workplace, "stuck", "Health.hang_timeout_s = 8", fault="sleep:data:6:600:1") as two:
        ended = two.wait()
    assert ended.codes == [6, 6], ended.outputs
    late = find_late(workplace, "stuck")
    assert (late["phase"], late["step"]) == ("data", 6)
    assert late["seconds"] >= 8


READ_SLOWLY = """
import sys, time
from mtx.cli import main
from mtx.training import loop
make = loop.make_train_batch
def make_slowly(setup, reader, sizes, step):
    import jax
    time.sleep(1.0 if jax.process_index() == 1 and step in (9, 10) else 0.0)
    return make(setup, reader, sizes, step)
loop.make_train_batch = make_slowly
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_slow_process_is_named(workplace, undisturbed):
    with pair(workplace, "slow", "Health.straggler_every = 4", program=["-c", READ_SLOWLY]) as two:
        ended = two.wait()
    assert ended.codes == [0, 0], ended.outputs
    named = [event for event in events(workplace, "slow", "straggler") if "waiting for data" in event["cause"]]
    assert {(event["late_process"], event["late_host"]) for event in named} == {(1, HOST)}
    assert workplace.losses("slow") == workplace.losses(undisturbed)


CORRUPT = """
import sys
import jax
import numpy as np
from mtx.cli import main
from mtx.training.loop import Loop
compare = Loop._compare_copies
def corrupt(leaf):
    copies = [np.asarray(shard.data).copy() for shard in leaf.addressable_shards]
    copies[1].view(np.uint32).reshape(-1)[0] ^= 1
    arrays = [jax.device_put(copy, shard.device) for copy, shard in zip(copies, leaf.addressable_shards)]
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, arrays)
def compare_corrupt(self, stored, step):
    if step == 6:
        leaves, tree = jax.tree.flatten(stored["params"])
        stored = {**stored, "params": jax.tree.unflatten(tree, [corrupt(leaves[0]), *leaves[1:]])}
    return compare(self, stored, step)
Loop._compare_copies = compare_corrupt
sys.exit(main(sys.argv[1:]))
"""
"""Trains, with a bit of a parameter flipped in the memory of the second device after step 6."""


def test_a_device_that_remembers_wrongly_ends_the_run(workplace):
    name = "corrupt"
    command = workplace.command(name, "Rules.zero = 0", "Health.digest_every = 2", devices=2)
    process = run(["-c", CORRUPT, *command[2:]], env=workplace.environment(2), check=False)
    assert process.returncode == 6, process.stderr
    assert "Traceback" not in process.stderr
    (corruption,) = events(workplace, name, "corruption")
    assert corruption["step"] == 6
    assert f"device 1 of process 0 on host {HOST}" in corruption["cause"]
    assert f"on host {HOST}" in process.stderr
    assert sorted(path.name for path in (workplace.folder / name / "checkpoints").iterdir()) == ["4"]
