"""One run of a drill's copy as real processes, through the restart loop, and what its files tell of it.

Decides how a run is started, watched and ended, and how two runs are compared. Does not decide what is done to it.

Invariant: no process of a `Launched` outlives its `with` block.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mtx.errors import UserError
from mtx.evaluation.drill_copy import Copy
from mtx.health.faults import FAULT, FIRED
from mtx.health.journal import read_journal
from mtx.jsonl import read_records
from mtx.reports import metrics

BIT_EQUAL = "bit-equal"
TOLERANCE = 1e-4
"""Relative, of losses on another number of devices: sums in another order differ by some 1e-7 at the first step, which
the steps of an optimizer that divides by the gradient's own size make larger."""

POLL_S = 0.02
Environment = Callable[[int], Mapping[str, str]]
"""From a number of devices to the environment variables of a process that has them."""


class DrillError(UserError):
    """What a scenario expected and did not find; the message says it."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How the restart loop is started.

    Attributes:
        processes: Of the run.
        devices: Simulated ones of each process.
        fault: What `MTX_FAULT` says.
        max_restarts: Failures without progress that are put up with.
        backoff_s: See `launch.job.Job`.
        grace_s: As well.
    """

    processes: int = 1
    devices: int = 1
    fault: str | None = None
    max_restarts: int = 2
    backoff_s: float = 0.2
    grace_s: float = 20.0


@dataclass(frozen=True)
class Place:
    """Where runs of a copy live: what they share, and how long one may take."""

    folder: Path
    copy: Copy
    environment: Environment
    timeout_s: float

    @property
    def command(self) -> list[str]:
        """`mtx train` of the copy, without its run directory."""
        return [sys.executable, "-m", "mtx", "train", str(self.copy.config)]

    def variables(self, devices: int) -> dict[str, str]:
        """The environment of a process; what one has compiled the others need not, and `launch status` is not told."""
        caches = {"MTX_COMPILATION_CACHE": str(self.folder / "xla"), "XDG_STATE_HOME": str(self.folder / "state")}
        return {**self.environment(devices), **caches}


@dataclass
class Seen:
    """When each number of logged steps was first seen, by the wall clock."""

    steps: list[tuple[float, int]] = field(default_factory=list)

    def add(self, step: int) -> None:
        if not self.steps or self.steps[-1][1] != step:
            self.steps.append((time.time(), step))


class Launched:
    """`python -m launch local -- mtx train` on one run directory."""

    def __init__(self, place: Place, run_dir: Path, launch: Launch, *, folder: Path | None = None) -> None:
        """Args: folder: For what the drill notes of it; None: the one that the run directory is in."""
        self.place, self.run_dir, self.launch = place, run_dir, launch
        self.folder = folder or run_dir.parent
        self.seen = Seen()
        self.fired = self.folder / "faults-fired"
        self._started = len(self.records("started"))

    def __enter__(self) -> Launched:
        number = len(list(self.folder.glob("launch-*.log"))) + 1
        variables = self.place.variables(self.launch.devices)
        if self.launch.fault is not None:
            variables |= {FAULT: self.launch.fault, FIRED: str(self.fired)}
        options = {
            "processes": self.launch.processes,
            "max-restarts": self.launch.max_restarts,
            "grace-s": self.launch.grace_s,
            "backoff-s": self.launch.backoff_s,
        }
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        self.output = self.folder / f"launch-{number}.log"
        with self.output.open("wb") as output:
            self.begin = time.time()
            self._process = subprocess.Popen(
                [sys.executable, "-m", "launch", "local", *words, "--", *self.place.command, "--run-dir", self.run_dir],
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return self

    def __exit__(self, *exception: object) -> None:
        if self._process.poll() is not None:
            return  # after its processes
        self._process.kill()
        self._process.wait()
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)

    def wait(self, until: Callable[[], bool] = lambda: False) -> int | None:
        """Watches the run to its end, or until something is true.

        Returns:
            The exit code of the launcher; None where it still runs.

        Raises:
            DrillError: It takes too long.
        """
        deadline = time.monotonic() + self.place.timeout_s
        while (code := self._process.poll()) is None and not until():
            self.seen.add(last_step(self.run_dir))
            if time.monotonic() > deadline:
                raise DrillError(f"hangs: not at its end after {self.place.timeout_s:.0f} s")
            time.sleep(POLL_S)
        self.seen.add(last_step(self.run_dir))
        return code

    def expect(self, code: int) -> None:
        """Watches the run to its end, which must be this exit code.

        Raises:
            DrillError: It is another one.
        """
        found = self.wait()
        if found != code:
            raise DrillError(f"ended with exit code {found} instead of {code}: {last_words(self.output)}")

    def wait_for_faults(self, count: int) -> float:
        """Waits until so many faults have happened; the wall-clock time of the last.

        Raises:
            DrillError: The run ends without.
        """
        code = self.wait(lambda: len(self.faults()) >= count)
        if len(self.faults()) < count:
            raise DrillError(
                f"{self.launch.fault} did not happen; the run ended with {code}: {last_words(self.output)}"
            )
        return self.fired.stat().st_mtime

    def faults(self) -> list[str]:
        """The faults that have happened."""
        return self.fired.read_text().splitlines() if self.fired.exists() else []

    def records(self, event: str) -> list[dict[str, Any]]:
        """What the launcher recorded, over all launches."""
        return [line for line in read_records(self.run_dir / "launch.jsonl") if line.get("event") == event]

    def pids(self) -> list[int]:
        """The processes of the newest attempt of this launch."""
        started = self.records("started")[self._started :]
        return started[-1]["pids"] if started else []


def last_step(run_dir: Path) -> int:
    """The last step that `metrics.jsonl` tells of; 0: none."""
    try:
        with (run_dir / metrics.NAME).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return 0
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):  # torn, or the end of one
            continue
    return 0


def last_words(path: Path) -> str:
    """The last line that speaks of an error, else the last line."""
    lines = [line.strip() for line in path.read_text(errors="replace").splitlines() if line.strip()]
    telling = [line for line in lines if "Error" in line or "mtx: " in line]
    return (telling or lines or ["no output"])[-1][:300]


def compare(run_dir: Path, reference: Path) -> str:
    """How the numbers of a run differ from those of the undisturbed one: BIT_EQUAL, or the difference in words.

    Compared are loss and gradient norm of every step, the losses of every evaluation, and the digests of the arrays of
    the last checkpoint.
    """
    actual, expected = _numbers(run_dir), _numbers(reference)
    if missing := sorted(expected.keys() ^ actual.keys(), key=str):
        return f"lines of metrics are missing or too many, first {missing[0]}"
    if actual == expected:
        arrays, wanted = _digests(run_dir), _digests(reference)
        differing = sorted(name for name in arrays.keys() | wanted.keys() if arrays.get(name) != wanted.get(name))
        return f"arrays differ in the end, first {differing[0]}" if differing else BIT_EQUAL
    worst = max(abs(a - b) / max(abs(b), 1e-30) for key in expected for a, b in zip(actual[key], expected[key]))
    first = min((key for key in expected if actual[key] != expected[key]), key=lambda key: key[0])
    return f"{worst:.1e}, first at step {first[0]}"


def is_within_tolerance(comparison: str) -> bool:
    """Whether losses that `compare` found to differ do so within `TOLERANCE`."""
    if comparison == BIT_EQUAL or comparison.startswith("arrays"):
        return True
    return not comparison.startswith("lines") and float(comparison.split(",")[0]) <= TOLERANCE


def count_undone(run_dir: Path) -> list[int]:
    """For each resume that undid some, the steps that were done and had to be done again."""
    return [sum("eval" not in line for line in lines) for lines in metrics.read_undone_metrics(run_dir)]


def check_resumes(launched: Launched) -> list[int]:
    """The steps that attempts went on from, each the newest complete checkpoint that the attempt before it left.

    Raises:
        DrillError: One went on from another step.
    """
    found = [event for event in read_journal(launched.run_dir) if event["event"] == "resumed"]
    for event in found:
        left = [record["newest_step"] for record in launched.records("ended") if record["time"] < event["time"]]
        if left and left[-1] != event["step"]:
            raise DrillError(f"went on from step {event['step']}; the newest complete checkpoint was {left[-1]}")
    return [event["step"] for event in found]


def seconds_to_recover(seen: Sequence[tuple[float, int]], fault: float, ended: float, step: int) -> float | None:
    """Seconds from a fault to when a step was seen after the attempt had ended; None: it was not."""
    return next((when - fault for when, reached in seen if when > ended and reached >= step), None)


def _numbers(run_dir: Path) -> dict[tuple[int, str | None], tuple[float, ...]]:
    names = ("loss", "grad_norm")
    return {
        (line["step"], line.get("eval")): tuple(line[name] for name in names if name in line)
        for line in metrics.read_metrics(run_dir)
    }


def _digests(run_dir: Path) -> dict[str, str]:
    newest = max((run_dir / "checkpoints").glob("*/manifest.json"), key=lambda path: _step(path.parent.name))
    return json.loads(newest.read_text())["meta"].get("digests", {})


def _step(name: str) -> int:
    return int(name) if name.isdecimal() else -1
