"""Layouts certified in processes of their own.

XLA's simulated devices can wait for each other for ever, or abort their process: that is then the finding about one
layout, and the others go on. A process is given a folder in which `request.json` lies: the config as text, and where
the reference is. It writes `reference.npz` (one device) or `result.json` (a layout) there.

    python -m mtx.evaluation.isolation FOLDER

Invariant: no process outlives its time limit, or the iteration over the results.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from mtx.config import reader, render, schema
from mtx.errors import UserError
from mtx.evaluation.agreement import Outcome
from mtx.evaluation.certify import Plan, Result, compare_layout, compute_reference
from mtx.health.parent import end_with_parent
from mtx.mesh import start_process

REQUEST, REFERENCE, RESULT, OUTPUT = "request.json", "reference.npz", "result.json", "output.txt"
COMMAND = (sys.executable, "-m", "mtx.evaluation.isolation")
POLL_S = 0.05

Environment = Callable[[int], Mapping[str, str]]
"""From a number of devices to the environment variables of a process that has them."""


def certify_apart(plan: Plan, environment: Environment, *, timeout_s: float, jobs: int) -> Iterator[Result]:
    """Compares layouts in processes of their own; results come in the order of the layouts.

    Args:
        timeout_s: After which a process is killed.
        jobs: Processes at a time.

    Raises:
        UserError: One device did not compute the run in time.
        RuntimeError: One device cannot compute the run.
    """
    with tempfile.TemporaryDirectory(prefix="mtx-certify-") as name:
        folder = Path(name)
        reference = _Task(folder / "reference", plan.reference, None, environment(1), timeout_s)
        for _ in _run_all([reference], 1):
            _require(reference, timeout_s)
        tasks = [
            _Task(
                folder / str(number), plan.place(layout), reference.folder, environment(layout.num_devices), timeout_s
            )
            for number, layout in enumerate(plan.layouts)
        ]
        for task in _run_all(tasks, jobs):
            yield dataclasses.replace(task.result(), seconds=task.seconds)


def describe(run: schema.Run) -> str:
    """A run as text that loads to an equal one."""
    return render.dump(run, {})


class _Task:
    """A reduced run that is computed in a process of its own."""

    def __init__(
        self, folder: Path, run: schema.Run, reference: Path | None, environment: Mapping[str, str], timeout_s: float
    ):
        self.folder, self.run, self.timeout_s, self.seconds = folder, run, timeout_s, 0.0
        self._reference, self._environment = reference, environment
        self._process: subprocess.Popen[bytes] | None = None
        self.failure: str | None = None

    def start(self) -> None:
        self.folder.mkdir()
        request = {"config": describe(self.run), "reference": self._reference and str(self._reference)}
        (self.folder / REQUEST).write_text(json.dumps(request))
        self._begin = time.monotonic()
        with (self.folder / OUTPUT).open("wb") as output:
            self._process = subprocess.Popen(
                [*COMMAND, str(self.folder)],
                env=dict(self._environment),
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
            )

    def has_ended(self) -> bool:
        """Whether the process has come to its end; at the time limit it is brought to it."""
        if self._process is None:
            return False
        if self._process.poll() is None:
            self.seconds = time.monotonic() - self._begin
            if self.seconds < self.timeout_s:
                return False
            self.failure = f"hangs: killed after {self.timeout_s:.0f} s"
            self.end()
        elif self._process.returncode and self.failure is None:
            self.failure = f"crashed: {_last_words(self.folder / OUTPUT)} ({_ending(self._process.returncode)})"
        return True

    def end(self) -> None:
        """Makes sure that nothing runs any more."""
        if self._process is not None:
            self._process.kill()  # of no effect where it has ended; a deadlock ignores every other signal
            self._process.communicate()

    def result(self) -> Result:
        if self.failure is not None:
            return Result(mesh=dataclasses.asdict(self.run.mesh), failure=self.failure)
        return Result(**json.loads((self.folder / RESULT).read_text()))


def _require(reference: _Task, timeout_s: float) -> None:
    if reference.failure is not None:
        if reference.failure.startswith("hangs"):
            raise UserError(f"one device did not compute the reduced run in {timeout_s:.0f} s: raise --timeout-s")
        raise RuntimeError(f"one device cannot compute the reduced run: {reference.failure}")


def _run_all(tasks: Sequence[_Task], jobs: int) -> Iterator[_Task]:
    """Runs tasks, a few at a time; yields each in their order when it has ended."""
    waiting, running = list(tasks), list[_Task]()
    try:
        for task in tasks:
            while not task.has_ended():
                running = [other for other in running if not other.has_ended()]
                while waiting and len(running) < jobs:
                    running.append(waiting.pop(0))
                    running[-1].start()
                time.sleep(POLL_S)
            yield task
    finally:
        for task in tasks:
            task.end()


def _last_words(path: Path) -> str:
    """What a process that died said: its last line that speaks of an error, or its last line."""
    lines = [line.strip() for line in path.read_text(errors="replace").splitlines() if line.strip()]
    telling = [line for line in lines if "Error" in line or "error:" in line or "Check failed" in line]
    return (telling or lines or ["no output"])[-1][:500]


def _ending(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def _save(path: Path, outcomes: Mapping[int, Outcome]) -> None:
    arrays: dict[str, np.ndarray] = {}
    for num_layers, outcome in outcomes.items():
        arrays |= {f"{num_layers}/loss/{name}": np.asarray(v) for name, v in outcome.losses.items()}
        arrays |= {f"{num_layers}/gradient/{name}": leaf for name, leaf in outcome.gradients.items()}
    np.savez(path, **arrays)  # type: ignore[arg-type]


def _load(path: Path) -> dict[int, Outcome]:
    outcomes: dict[int, Outcome] = {}
    with np.load(path) as arrays:
        for key in arrays:
            num_layers, kind, name = key.split("/")
            outcome = outcomes.setdefault(int(num_layers), Outcome({}, {}))
            if kind == "loss":
                outcome.losses[name] = float(arrays[key])
            else:
                outcome.gradients[name] = arrays[key]
    return outcomes


def main(folder: Path) -> None:
    """What a process does."""
    end_with_parent()
    request = json.loads((folder / REQUEST).read_text())
    run = reader.load_text(request["config"], "the reduced config").run
    start_process()
    if request["reference"] is None:
        _save(folder / REFERENCE, compute_reference(run))
        return
    result = compare_layout(run, _load(Path(request["reference"]) / REFERENCE))
    (folder / RESULT).write_text(json.dumps(dataclasses.asdict(result), allow_nan=False))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
