"""Plays the scenarios of a drill, one after the other, each in a run directory of its own.

Decides what is checked after each. Does not decide what the scenarios are (`drill`).

Invariant: whatever is done to shared files is undone before the next scenario.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from mtx.checkpoints import manifest
from mtx.evaluation import drill_faults as faults
from mtx.evaluation.drill import Result, Scenario
from mtx.evaluation.drill_copy import EVERY
from mtx.evaluation.drill_run import (
    BIT_EQUAL,
    TOLERANCE,
    DrillError,
    Launch,
    Launched,
    Place,
    check_resumes,
    compare,
    count_undone,
    is_within_tolerance,
    last_words,
    seconds_to_recover,
)
from mtx.health.journal import read_journal

_DISK_BYTES = 64 << 20


class Stage:
    """Plays scenarios in a folder."""

    def __init__(self, place: Place, *, no_mounts: str | None) -> None:
        """Args: no_mounts: Why no disk can be mounted here; None: it can."""
        self._place, self._no_mounts = place, no_mounts
        self._references: dict[int, Path] = {}

    def reference(self, processes: int) -> Path:
        """The run directory of an undisturbed run, made when it is first asked for.

        Raises:
            DrillError: It does not come to its end.
        """
        if processes not in self._references:
            run_dir = self._folder(f"undisturbed-{processes}") / "run"
            with Launched(self._place, run_dir, Launch(processes=processes, max_restarts=0)) as launched:
                launched.expect(0)
            self._references[processes] = run_dir
        return self._references[processes]

    def play(self, scenario: Scenario) -> Result:
        """Plays a scenario; what goes wrong in it is part of the result."""
        begin = time.monotonic()
        if scenario.on_private_disk and self._no_mounts is not None:
            return Result(name=scenario.name, what=scenario.what, outcome="not possible here", detail=self._no_mounts)
        reference = self.reference(scenario.processes)
        folder = self._folder(scenario.name)
        play = _Play(self._place, scenario, folder, reference)
        detail = ""
        with ExitStack() as stack:
            try:
                if scenario.on_private_disk:
                    stack.enter_context(_disk_of(play))
                play.run()
            except DrillError as error:
                detail = str(error)
        return dataclasses.replace(
            play.result,
            outcome="failed" if detail else "passed",
            detail=detail,
            seconds=time.monotonic() - begin,
            run_dir=str(folder),
        )

    def _folder(self, name: str) -> Path:
        folder = self._place.folder / name
        folder.mkdir()
        return folder


@contextmanager
def _disk_of(play: _Play) -> Iterator[None]:
    """Puts the run directory on a disk of its own; it is copied to the other one in the end."""
    with faults.small_disk(play.folder / "disk", _DISK_BYTES) as disk:
        play.disk, play.run_dir = disk, disk / "run"
        try:
            yield
        finally:
            if play.run_dir.exists():
                shutil.copytree(play.run_dir, play.folder / "run")


class _Play:
    """One scenario."""

    def __init__(self, place: Place, scenario: Scenario, folder: Path, reference: Path) -> None:
        self.place, self.scenario, self.folder, self.reference = place, scenario, folder, reference
        self.run_dir = folder / "run"
        self.disk = folder
        self.result = Result(name=scenario.name, what=scenario.what, outcome="failed")

    def run(self) -> None:
        """Raises: DrillError: Something was not as it must be."""
        scenario = self.scenario
        restarts = scenario.act in (None, "full disk", "filling disk", "SIGTERM") and scenario.then is None
        launch = Launch(
            processes=scenario.processes,
            devices=scenario.devices,
            fault=scenario.fault,
            max_restarts=2 if restarts else 0,
            grace_s=scenario.grace_s,
        )
        with Launched(self.place, self.run_dir, launch, folder=self.folder) as launched:
            since = launched.wait_for_faults(1)
            if scenario.act in ("full disk", "filling disk"):
                self._fill_disk(launched)
            elif scenario.act == "SIGTERM":
                self._terminate(launched)
            launched.wait()
        self._check_first_attempt(launched, since)
        if not restarts:
            self._damage()
            processes, devices = scenario.then or (scenario.processes, scenario.devices)
            launch = Launch(processes=processes, devices=devices, grace_s=scenario.grace_s)
            with Launched(self.place, self.run_dir, launch, folder=self.folder) as launched:
                since = launched.begin
                launched.expect(0)
        self._check_end(launched, since)

    def _damage(self) -> None:
        """Does what the scenario does between the two launches."""
        act = self.scenario.act
        newest = self.run_dir / "checkpoints" / str(self._newest())
        if act == "flip":
            faults.flip_byte(faults.largest_file(newest))
        elif act == "delete":
            faults.largest_file(newest).unlink()
        elif act == "truncate":
            faults.truncate(faults.largest_file(newest))
        elif act == "corrupt data":
            shard = faults.largest_file(self.place.copy.stores[0] / "tokens")
            faults.flip_byte(shard)
            try:
                self._refused(through_launcher=True)
            finally:
                faults.flip_byte(shard)
        elif act == "read-only":
            before = _fingerprint(self.run_dir)
            with faults.read_only(self.disk):
                self._refused(through_launcher=True)
                self._refused(through_launcher=False)
            if _fingerprint(self.run_dir) != before:
                raise DrillError("files changed that could not be written")

    def _newest(self) -> int:
        steps = [path.parent.name for path in (self.run_dir / "checkpoints").glob("*/manifest.json")]
        complete = [int(name) for name in steps if name.isdecimal()]
        if not complete:
            raise DrillError("no checkpoint is complete")
        return max(complete)

    def _refused(self, *, through_launcher: bool) -> None:
        """Tries to go on, which must end with exit code 2, a message, and every checkpoint as it was."""
        checkpoints = _fingerprint(self.run_dir / "checkpoints")
        if through_launcher:
            with Launched(self.place, self.run_dir, Launch(max_restarts=0), folder=self.folder) as launched:
                launched.expect(2)
            said = launched.output.read_text(errors="replace")
        else:
            command = [*self.place.command, "--run-dir", str(self.run_dir)]
            try:
                done = subprocess.run(
                    command,
                    env=self.place.variables(1),
                    capture_output=True,
                    text=True,
                    timeout=self.place.timeout_s,
                )
            except subprocess.TimeoutExpired as error:
                raise DrillError(f"hangs: not refused after {self.place.timeout_s:.0f} s") from error
            said = done.stderr
            if done.returncode != 2:
                raise DrillError(f"exit code {done.returncode} instead of 2: {said.strip()[-300:]}")
        if "Traceback" in said:
            raise DrillError(f"refused with a traceback: {said.strip()[-300:]}")
        if _fingerprint(self.run_dir / "checkpoints") != checkpoints:
            raise DrillError("refused, but checkpoints changed")

    def _fill_disk(self, launched: Launched) -> None:
        """Fills the disk at a save, which fails while the run sleeps, and makes room before the next."""
        (pid,) = launched.pids()
        self._wait_until_stopped(pid)
        free_bytes = _checkpoint_bytes(self.reference) // 2 if self.scenario.act == "full disk" else 0
        ballast = faults.fill(self.disk, free_bytes)
        faults.go_on(pid)
        launched.wait_for_faults(3)
        self._wait_until_stopped(pid)
        ballast.unlink()
        faults.go_on(pid)

    def _terminate(self, launched: Launched) -> None:
        (pid,) = launched.pids()
        self._wait_until_stopped(pid)
        os.kill(pid, signal.SIGTERM)
        faults.go_on(pid)

    def _wait_until_stopped(self, pid: int) -> None:
        if not faults.wait_until_stopped(pid, time.monotonic() + self.place.timeout_s):
            raise DrillError("the run did not stop where it was told to")

    def _check_first_attempt(self, launched: Launched, since: float) -> None:
        scenario, ended = self.scenario, launched.records("ended")
        self.result = dataclasses.replace(self.result, exit_codes=[record["codes"] for record in ended])
        if not ended:
            raise DrillError(f"no attempt came to its end: {last_words(launched.output)}")
        codes, seconds = ended[0]["codes"], ended[0]["time"] - since
        if any(codes):
            self.result = dataclasses.replace(self.result, seconds_to_end=seconds)
        if scenario.first_codes is not None and not set(codes) <= set(scenario.first_codes):
            raise DrillError(f"the first attempt ended with {codes}: {last_words(launched.output)}")
        if scenario.ends_within_s is not None and seconds > scenario.ends_within_s:
            raise DrillError(f"ended {seconds:.0f} s after the fault, not within {scenario.ends_within_s:.0f} s")

    def _check_end(self, launched: Launched, since: float) -> None:
        scenario, ended = self.scenario, launched.records("ended")
        lost = sum(count_undone(self.run_dir))
        is_damaged = scenario.act in ("flip", "delete", "truncate")
        resumes = [] if is_damaged else check_resumes(launched)
        losses = compare(self.run_dir, self.reference) if ended[-1]["codes"] == [0] * len(ended[-1]["codes"]) else None
        reached = max(launched.seen.steps[0][1], (resumes[-1] if resumes else 0) + lost)
        beyond = min(reached + 1, self.place.copy.steps)
        recovered = seconds_to_recover(launched.seen.steps[1:], since, max(since, ended[0]["time"]), beyond)
        self.result = dataclasses.replace(
            self.result,
            exit_codes=[record["codes"] for record in ended],
            losses=losses,
            steps_lost=lost,
            seconds_to_recover=recovered if len(ended) > 1 else None,
        )
        if losses is None:
            raise DrillError(f"did not come to its end: {last_words(launched.output)}")
        if scenario.then is None and losses != BIT_EQUAL:
            raise DrillError(f"not the numbers of an undisturbed run: {losses}")
        if not is_within_tolerance(losses):
            raise DrillError(f"not the numbers of an undisturbed run within {TOLERANCE:.0e}: {losses}")
        if lost > scenario.may_lose:
            raise DrillError(f"{lost} steps lost, with a checkpoint every {EVERY}")
        found = {event["event"] for event in read_journal(self.run_dir)}
        if missing := set(scenario.events) - found:
            raise DrillError(f"the journal does not tell of it: no {', '.join(sorted(missing))}")
        if is_damaged and not list(self.run_dir.glob("checkpoints/*.bad-*")):
            raise DrillError("the damaged checkpoint was not set aside")
        if problems := manifest.verify(self.run_dir / "checkpoints" / str(self.place.copy.steps)):
            raise DrillError(f"the last checkpoint does not verify: {problems[0]}")


def _fingerprint(folder: Path) -> dict[str, str]:
    """The digest of every file below a folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
                found[str(path)] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _checkpoint_bytes(run_dir: Path) -> int:
    """Bytes of the last checkpoint of a run."""
    steps = [path.parent for path in (run_dir / "checkpoints").glob("*/manifest.json")]
    return manifest.read(max(steps, key=lambda path: int(path.name))).size_bytes
