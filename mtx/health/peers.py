"""What the signs of life of the other processes mean: who is silent, who failed, who is late.

Invariant: silence is measured by this process alone, in time that it lived through: a clock that jumps, or a pause of
the whole machine, makes nobody silent.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import get_args

from mtx.health.heartbeat import Beat, Phase, read_beat

_ORDER = {phase: place for place, phase in enumerate(get_args(Phase))}
_MAX_NAMED = 4


class Peers:
    """The other processes, as far as this one looks at them."""

    def __init__(self, run_dir: Path, watched: Iterable[int]) -> None:
        """Takes note of what is there now, which may be of an earlier attempt and says nothing about this one.

        Args:
            run_dir: The run directory.
            watched: Processes that will be looked at regularly.
        """
        self._run_dir = run_dir
        self._old = {process: self._read(process) for process in watched}
        self._beats: dict[int, Beat] = {}
        self._silence_s: dict[int, float] = {}

    def look(self, processes: Iterable[int], elapsed_s: float) -> None:
        """Reads the signs of life of some processes, `elapsed_s` seconds after the last look."""
        for process in processes:
            try:
                beat = read_beat(self._run_dir, process)
            except OSError:  # the disk's trouble says nothing about the process
                continue
            if process not in self._beats and (beat is None or beat == self._old.get(process)):
                continue  # has not begun; if it never does, that is a hang
            if beat is None or beat == self._beats.get(process):
                self._silence_s[process] += elapsed_s
            else:
                self._beats[process], self._silence_s[process] = beat, 0.0

    def forgive(self) -> None:
        """Silence so far does not count."""
        self._silence_s = dict.fromkeys(self._silence_s, 0.0)

    def silent(self, limit_s: float) -> list[Beat]:
        """The last beats of processes that have not ended and were silent for that long."""
        beats = self._beats.values()
        return [beat for beat in beats if beat.exit_code is None and self._silence_s[beat.process] >= limit_s]

    def failed(self) -> list[Beat]:
        """The last beats of processes that ended with an exit code other than 0."""
        return [beat for beat in self._beats.values() if beat.exit_code]

    def are_gone(self, limit_s: float) -> bool:
        """Whether all that are watched have ended or were silent for that long."""
        gone = {beat.process for beat in self._beats.values() if beat.exit_code is not None}
        return self._old.keys() <= gone | {beat.process for beat in self.silent(limit_s)}

    def beats(self, processes: Iterable[int]) -> list[Beat]:
        """The last beats of processes; of one that has not begun, one that says so."""
        return [self._beats.get(process) or _unknown(process) for process in processes]

    def _read(self, process: int) -> Beat | None:
        try:
            return read_beat(self._run_dir, process)
        except OSError:
            return None


def _unknown(process: int) -> Beat:
    """Of a process that has not begun, and is behind all others."""
    return Beat(
        process=process, host="unknown", pid=0, time=0.0, phase="start", step=-1, phase_seconds=math.inf, beat=0
    )


def find_late(beats: Sequence[Beat]) -> list[Beat]:
    """Of processes that do not go on, those that the others wait for: they are the least far in the run.

    Who waits for others comes to that phase after what it does alone, so a process in `data` of a step is behind those
    that wait for the same step. Processes that have ended are waited for by nobody. Empty where all are equally far.
    """
    running = [beat for beat in beats if beat.exit_code is None]
    places = [(beat.step, _ORDER[beat.phase]) for beat in running]
    return [beat for beat, place in zip(running, places) if place == min(places)] if len(set(places)) > 1 else []


def describe(beats: Sequence[Beat]) -> str:
    """'process 1 on host h7 (phase wait, step 120)'; of many the first few, and how many more."""
    texts = [f"process {b.process} on host {b.host} (phase {b.phase}, step {b.step})" for b in beats[:_MAX_NAMED]]
    more = len(beats) - len(texts)
    return ", ".join(texts) + (f" and {more} more" if more > 0 else "")
