"""One point of a study: `mtx train` in a process of its own, ended as soon as it has been measured.

Decides when a point is measured, what its figures are, and why one failed. The run is the one that a user would start,
data, prefetching and metrics included; it is killed once the figures
stand in its `metrics.jsonl`, before it would save anything.

Invariant: no process of a point outlives its measurement, or the process that measures.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from mtx.config import render, schema
from mtx.health.journal import read_journal
from mtx.reports.metrics import read_metrics

POLL_S = 0.1
LEAST_STEPS = 3
"""Measured steps without which a point that its time limit ends tells nothing."""

Failure = Literal["misfit", "out of memory", "time-out", "crash"]
CONFIG, RUN, LOG = "point.gin", "run", "output.log"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How long a point is run.

    Attributes:
        warmup_steps: Not measured.
        steps: Measured, at most.
        seconds: Of the whole point at most, compilation included.
    """

    warmup_steps: int
    steps: int
    seconds: float

    @property
    def last_step(self) -> int:
        return self.warmup_steps + self.steps


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a point's files say of it; the keys of `measured` in `study_document`."""

    step_seconds: float
    step_seconds_min: float
    step_seconds_max: float
    steps: int
    tokens_per_second: float
    memory_bytes: int | None
    memory_kind: Literal["device", "compiler"] | None
    compile_seconds: float | None
    seconds: float
    loss_first: float | None
    loss_last: float | None


@dataclass(frozen=True)
class Outcome:
    """Measured, or why not."""

    measured: Measured | None
    failure: Failure | None = None
    reason: str | None = None

    def as_json(self) -> dict[str, Any]:
        measured = None if self.measured is None else asdict(self.measured)
        return {"measured": measured, "failure": self.failure, "reason": self.reason}


def make_partial(run: schema.Run, limits: Limits) -> schema.Run:
    """The run that is measured: of full batches, each step logged, nothing evaluated or saved before the end.

    Of a run that nobody ends the last step comes soon: whoever loses the process that measures is not left with it.
    """
    enough = 2 * limits.last_step + 10
    steps = run.train.steps if run.train.steps is not None and run.train.steps >= enough else enough
    return replace(
        run,
        train=replace(
            run.train,
            steps=steps,
            tokens=None,
            batch_ramp=None,
            log_every=1,
            eval_every=None,
            eval_batches=schema.Train.eval_batches,
            stop_before=None,
        ),
        data=replace(run.data, validation={}),
        checkpoint=schema.Checkpoint(probe=False),
    )


def measure(
    run: schema.Run, folder: Path, limits: Limits, *, environment: Mapping[str, str], launcher: Sequence[str] = ()
) -> Outcome:
    """Trains a run until it is measured.

    Args:
        run: Of `make_partial`.
        folder: For its files; an earlier attempt's are thrown away.
        environment: Of the process, its devices included.
        launcher: Target and options of `python -m launch`, which starts the processes of the run; empty: one process
            is started here. Killing the launcher must end them.
    """
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text(render.dump(run, {}), encoding="utf-8")
    words = [sys.executable, "-m", "mtx", "train", str(folder / CONFIG), "--run-dir", str(folder / RUN), "--quiet"]
    if launcher:
        words = [sys.executable, "-m", "launch", *launcher, "--max-restarts", "0", "--", *words]
        environment = {**environment, "XDG_STATE_HOME": str(folder / "state")}  # a point is no job of its own
    begin = time.monotonic()
    with (folder / LOG).open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "mtx.evaluation.bound", str(os.getpid()), *words],
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    failure: tuple[Failure, str] | None = None
    try:
        while (steps := _count_steps(folder / RUN)) < limits.last_step:
            if process.poll() is not None:
                failure = _explain(folder / LOG, process.returncode)
                break
            if time.monotonic() - begin > limits.seconds:
                if steps < limits.warmup_steps + LEAST_STEPS:
                    failure = ("time-out", f"{_steps_done(steps)} in {limits.seconds:.0f} s: raise Study.minutes")
                break
            time.sleep(POLL_S)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        shutil.rmtree(folder / RUN / "checkpoints", ignore_errors=True)  # of a run that came to its end meanwhile
    if failure is not None:
        return Outcome(None, *failure)
    return Outcome(_read(folder / RUN, limits, run, time.monotonic() - begin))


def _count_steps(run_dir: Path) -> int:
    steps = [record["step"] for record in read_metrics(run_dir) if "eval" not in record]
    return steps[-1] if steps else 0


def _steps_done(steps: int) -> str:
    return f"only {steps} steps" if steps else "not one step"


def _read(run_dir: Path, limits: Limits, run: schema.Run, seconds: float) -> Measured:
    lines = [record for record in read_metrics(run_dir) if "eval" not in record]
    lines = [record for record in lines if limits.warmup_steps < record["step"] <= limits.last_step]
    times = [record["step_seconds"] for record in lines]
    events = {event["event"]: event for event in read_journal(run_dir)}
    compiled, plan = events.get("compiled", {}), events.get("plan", {})
    memory: tuple[int | None, Literal["device", "compiler"] | None] = None, None
    if plan.get("peak_bytes") is not None:
        memory = plan["peak_bytes"], "device"
    elif compiled.get("temp_bytes") is not None and compiled.get("argument_bytes") is not None:
        memory = compiled["temp_bytes"] + compiled["argument_bytes"], "compiler"
    median = statistics.median(times)
    return Measured(
        step_seconds=median,
        step_seconds_min=min(times),
        step_seconds_max=max(times),
        steps=len(times),
        tokens_per_second=run.train.global_batch_size * run.train.seq_len / median,
        memory_bytes=memory[0],
        memory_kind=memory[1],
        compile_seconds=compiled.get("seconds"),
        seconds=seconds,
        loss_first=lines[0]["loss"],
        loss_last=lines[-1]["loss"],
    )


_OUT_OF_MEMORY = re.compile(r"RESOURCE_EXHAUSTED|[Oo]ut of memory|bad_alloc|MemoryError|CUDA_ERROR_OUT_OF_MEMORY")


def _explain(log: Path, code: int) -> tuple[Failure, str]:
    """Why a process ended before it was measured."""
    # A launcher puts the number of the process before what it says.
    lines = [re.sub(r"^\[\d+\] ", "", line).strip() for line in log.read_text(errors="replace").splitlines()]
    lines = [line for line in lines if line]
    telling = [line for line in lines if _OUT_OF_MEMORY.search(line)]
    if telling or code == -signal.SIGKILL:
        killed = "killed (signal 9), as the kernel does when the host's memory is used up"
        return "out of memory", (telling or [killed])[-1][:500]
    # What a user's mistake ends with may go over several lines, from `mtx: ` on.
    mistakes = [number for number, line in enumerate(lines) if line.startswith("mtx: ")]
    said = " ".join(lines[mistakes[-1] :]).removeprefix("mtx: ") if mistakes else (lines or ["it said nothing"])[-1]
    ending = f"signal {-code}" if code < 0 else f"exit code {code}"
    return "crash", f"{said[:500]} ({ending}; {log.name})"
