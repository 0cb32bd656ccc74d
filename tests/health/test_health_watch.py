"""Real processes that are killed, stopped or stuck: the others end in time, say who it was, and leave their stacks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import programs
import pytest

from mtx.health.heartbeat import Beat, read_beat, write_beat
from mtx.health.journal import read_journal

PROGRAM = str(programs.ROOT / "tests" / "health" / "watched_program.py")
PEER_TIMEOUT_S, HANG_TIMEOUT_S = 3, 5


class Outcome(NamedTuple):
    codes: list[int | None]
    """Exit codes; None for a process that had to be killed in the end."""
    outputs: list[str]
    seconds: float
    """From the fault, if any, until the last process that ended did."""


def run_watched(
    run_dir: Path,
    fault: str = "",
    *,
    count: int = 2,
    steps: int = 200,
    mistake: str = "",
    hang_timeout_s: float = HANG_TIMEOUT_S,
) -> Outcome:
    """Runs processes until all have ended, but the one that a fault stops."""
    env = programs.environment(MTX_FAULT=fault, MTX_FAULT_FIRED=str(run_dir / "fired"), MTX_COMPILATION_CACHE="")
    if count > 1:
        env |= {"MTX_COORDINATOR": f"127.0.0.1:{programs.free_port()}", "MTX_NUM_PROCESSES": str(count)}
    arguments = [str(run_dir), str(hang_timeout_s), str(PEER_TIMEOUT_S), str(steps), *filter(None, [mistake])]
    expected = count - fault.startswith("stop")
    with ExitStack() as stack:
        files = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(count)]
        processes = [
            subprocess.Popen(
                [sys.executable, PROGRAM, *arguments],
                env=env | ({"MTX_PROCESS_ID": str(index)} if count > 1 else {}),
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=programs.ROOT,
            )
            for index, file in enumerate(files)
        ]
        begin = time.monotonic()
        try:
            while sum(p.poll() is not None for p in processes) < expected and time.monotonic() < begin + 60:
                time.sleep(0.05)
            codes = [process.poll() for process in processes]
            fired = run_dir / "fired"
            seconds = time.time() - fired.stat().st_mtime if fired.exists() else time.monotonic() - begin
        finally:
            for process in processes:
                process.kill()
                process.wait()
        for file in files:
            file.seek(0)
        return Outcome(codes, [file.read() for file in files], seconds)


def test_a_run_that_goes_well_ends_well(tmp_path: Path) -> None:
    outcome = run_watched(tmp_path, steps=60)
    assert outcome.codes == [0, 0], outcome.outputs
    assert read_journal(tmp_path) == []
    assert not (tmp_path / "stacks").exists()
    for process in range(2):
        beat = read_beat(tmp_path, process)
        assert beat is not None
        assert (beat.process, beat.phase, beat.step, beat.exit_code) == (process, "finish", 60, 0)
        assert beat.beat > 2


def test_a_killed_process_ends_the_run(tmp_path: Path) -> None:
    outcome = run_watched(tmp_path, "kill:step:30:1")
    assert outcome.codes == [6, -signal.SIGKILL], outcome.outputs
    assert outcome.seconds < 30
    (event,) = read_journal(tmp_path)
    assert event["event"] == "hang"
    assert [late["process"] for late in event["late"]] == [1]
    assert "process 1 on host" in outcome.outputs[0]
    assert "Traceback" in outcome.outputs[0]  # of the collective that failed


def test_a_killed_coordinator_ends_the_run(tmp_path: Path) -> None:
    """JAX aborts its clients within a moment, before anything of ours could."""
    outcome = run_watched(tmp_path, "kill:step:30:0")
    assert outcome.codes[0] == -signal.SIGKILL
    assert outcome.codes[1] in (6, -signal.SIGABRT), outcome.outputs
    assert outcome.seconds < 30


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_process_ends_the_run(tmp_path: Path, stopped: int) -> None:
    outcome = run_watched(tmp_path, f"stop:step:30:{stopped}")
    other = 1 - stopped
    assert outcome.codes[other] == 6, outcome.outputs
    assert outcome.codes[stopped] is None
    assert outcome.seconds < PEER_TIMEOUT_S + 10
    (event,) = read_journal(tmp_path)
    (late,) = event["late"]
    assert (event["process"], late["process"]) == (other, stopped)
    assert late["host"] == event["host"]
    assert late["phase"] in ("data", "step")
    assert f"process {stopped} on host {late['host']} (phase {late['phase']}" in event["cause"]
    assert event["cause"] in outcome.outputs[other]
    (stacks,) = (tmp_path / "stacks").glob(f"process-{other}-*.txt")
    assert "watched_program.py" in stacks.read_text()


@pytest.mark.slow
def test_a_third_process_follows_the_first(tmp_path: Path) -> None:
    outcome = run_watched(tmp_path, "stop:step:30:2", count=3)
    assert outcome.codes == [6, 6, None], outcome.outputs
    assert outcome.seconds < PEER_TIMEOUT_S + 10
    (event,) = read_journal(tmp_path)
    assert [late["process"] for late in event["late"]] == [2]
    assert event["cause"] in outcome.outputs[1]


def test_a_stuck_process_is_named(tmp_path: Path) -> None:
    outcome = run_watched(tmp_path, "sleep:data:30:100:1")
    assert outcome.codes == [6, 6], outcome.outputs
    assert outcome.seconds < HANG_TIMEOUT_S + 10
    (event,) = read_journal(tmp_path)
    (late,) = event["late"]
    assert (late["process"], late["phase"], late["step"]) == (1, "data", 30)
    assert late["seconds"] >= HANG_TIMEOUT_S
    (stacks,) = (tmp_path / "stacks").glob("process-1-*.txt")
    assert "faults.py" in stacks.read_text()  # where it sleeps
    assert all(event["cause"] in output for output in outcome.outputs)


@pytest.mark.slow
def test_one_process_alone_is_watched_too(tmp_path: Path) -> None:
    outcome = run_watched(tmp_path, "sleep:wait:0:100;sleep:data:5:100", count=1)
    assert outcome.codes == [6], outcome.outputs
    (event,) = read_journal(tmp_path)
    assert (event["late"][0]["phase"], event["late"][0]["step"]) == ("data", 5)


@pytest.mark.parametrize("mistaken", [0, 1])
def test_a_mistake_of_one_process_ends_all_with_its_code(tmp_path: Path, mistaken: int) -> None:
    outcome = run_watched(tmp_path, mistake=str(mistaken))
    assert outcome.codes == [2, 2], outcome.outputs
    assert outcome.seconds < 30
    assert "a mistake of one process" in outcome.outputs[1 - mistaken]
    assert read_journal(tmp_path) == []


@pytest.mark.slow
def test_signs_of_an_earlier_attempt_confuse_nobody(tmp_path: Path) -> None:
    """Left by an attempt of more processes that failed: the same bytes for ever, with an exit code."""
    for process in range(3):
        beat = Beat(process=process, host="h", pid=1, time=1.0, phase="wait", step=9, phase_seconds=0.0, beat=7)
        write_beat(tmp_path, replace(beat, exit_code=6 if process else None))
    outcome = run_watched(tmp_path, "sleep:data:30:4:1", steps=60)  # the run stands still: they look at each other
    assert outcome.codes == [0, 0], outcome.outputs


@pytest.mark.slow
def test_a_folder_that_cannot_be_written_ends_nothing(tmp_path: Path) -> None:
    (tmp_path / "heartbeats").write_text("not a folder")
    outcome = run_watched(tmp_path, "sleep:data:30:8:1", steps=60, hang_timeout_s=60)
    assert outcome.codes == [0, 0], outcome.outputs
    for output in outcome.outputs:
        assert output.count("cannot write its signs of life") == 1


def test_it_costs_next_to_nothing(tmp_path: Path) -> None:
    from mtx.health.watch import Watch

    assert "MTX_FAULT" not in os.environ
    watch = Watch(
        tmp_path, process=0, num_processes=1, hang_timeout_s=60, peer_timeout_s=20, record=lambda *_, **__: None
    )
    with watch:
        begin = time.perf_counter()
        for step in range(1000):
            watch.enter("data", step)
        assert time.perf_counter() - begin < 0.1
