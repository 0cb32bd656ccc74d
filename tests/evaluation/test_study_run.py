"""Points of a study as real processes: why one fails, and that none outlives who started it."""

import dataclasses
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pids import is_running
from programs import ROOT, environment
from tiny import GPT, make_run

from mtx.config import schema
from mtx.errors import UserError
from mtx.evaluation.study_probe import probe
from mtx.evaluation.study_run import LOG, RUN, Limits, _explain, make_partial, measure

LIMITS = Limits(warmup_steps=1, steps=2, seconds=60)


def make_point(**data):
    return make_partial(dataclasses.replace(make_run(GPT), data=schema.Data(**data)), LIMITS)


def test_point_that_cannot_train_says_why(tmp_path):
    folder = tmp_path / "point"
    (folder / RUN).mkdir(parents=True)  # of an attempt that was killed
    (folder / RUN / "metrics.jsonl").write_text('{"step": 99, "step_seconds": 1.0}\n')
    outcome = measure(make_point(train={"no/such/store": 1.0}), folder, LIMITS, environment=environment())
    assert (outcome.measured, outcome.failure) == (None, "crash")
    assert "no/such/store" in outcome.reason
    assert "exit code 2" in outcome.reason
    assert (folder / LOG).exists()


def test_point_that_takes_too_long_is_killed(tmp_path):
    limits = Limits(warmup_steps=1, steps=2, seconds=0.3)
    outcome = measure(make_point(train={"no/such/store": 1.0}), tmp_path / "p", limits, environment=environment())
    assert (outcome.failure, outcome.reason) == ("time-out", "not one step in 0 s: raise Study.minutes")


@pytest.mark.parametrize(("said", "code", "failure"), [
    ("jaxlib.XlaRuntimeError: RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes\nmore\n", 1, "out of memory"),
    ("", -signal.SIGKILL, "out of memory"),
    ("hello\nmtx: two words\nand a line\n", 2, "crash"),
    ("", -signal.SIGSEGV, "crash"),
])  # fmt: skip
def test_reasons(tmp_path, said, code, failure):
    log = tmp_path / "output.log"
    log.write_text(said)
    found, reason = _explain(log, code)
    assert found == failure
    assert reason
    if "mtx:" in said:
        assert reason == "two words and a line (exit code 2; output.log)"


@pytest.mark.skipif(sys.platform != "linux", reason="signals of dead parents are Linux's")
def test_program_ends_with_the_one_that_started_it(tmp_path):
    sleeper = "import os, pathlib, sys, time; pathlib.Path(sys.argv[1]).write_text(str(os.getpid())); time.sleep(300)"
    parent = (
        "import os, subprocess, sys\n"
        "begin = [sys.executable, '-m', 'mtx.evaluation.bound', str(os.getpid())]\n"
        "words = [*begin, sys.executable, '-c', *sys.argv[1:]]\n"
        "subprocess.Popen(words, start_new_session=True).wait()"
    )
    note = tmp_path / "pid"
    process = subprocess.Popen([sys.executable, "-c", parent, sleeper, str(note)], cwd=ROOT, env=environment())
    deadline = time.monotonic() + 60
    while not (note.exists() and note.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.wait()
    while is_running(int(note.read_text())):
        assert time.monotonic() < deadline, "it goes on by itself"
        time.sleep(0.02)


def test_program_without_its_parent_does_not_start(tmp_path):
    note = tmp_path / "started"
    words = ["-m", "mtx.evaluation.bound", "1", sys.executable, "-c", f"open({str(note)!r}, 'w')"]
    subprocess.run([sys.executable, *words], cwd=ROOT, env=environment(), check=True)
    assert not note.exists()


def test_machine_is_measured():
    machine = probe(environment(2), simulated=True)
    assert (machine.device_kind, machine.num_devices, machine.simulated, machine.in_table) == ("cpu", 2, True, False)
    assert 1e8 < machine.matmul_flops["float32"] < 1e14
    assert 1e7 < machine.memory_bandwidth < 1e13
    assert machine.gpu.peak_flops("float32") == machine.matmul_flops["float32"]
    assert machine.gpu.nvlink_domain == 2


def test_machine_that_does_not_answer():
    with pytest.raises(UserError, match="could not be measured"):
        probe(environment(1, JAX_PLATFORMS="nonsense"), simulated=False)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_probe_ends_with_the_process_that_asked():
    program = "import os; from mtx.evaluation.study_probe import probe; probe(dict(os.environ), simulated=True)"
    parent = subprocess.Popen([sys.executable, "-c", program], env=environment(1))
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    wait_until(lambda: any(b"mtx.evaluation.bound" in words_of(child) for child in children.read_text().split()))
    probes = children.read_text().split()
    wait_until(lambda: not any(b"mtx.evaluation.bound" in words_of(child) for child in probes))
    parent.kill()
    parent.wait()
    wait_until(lambda: not any(words_of(child) for child in probes))


def words_of(pid):
    """The command line of a process; empty once it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def wait_until(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
